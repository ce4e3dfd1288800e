"""`scalp bench serve`: measure throughput and latency of a running endpoint."""

from __future__ import annotations

from typing import Any, Literal

import httpx

from jobs.bench import inputs, load, open_inference
from jobs.bench.measure import OwnProcess, write_result
from jobs.common.console import SUMMARY_FILE, console, show
from scalp_core import storage
from scalp_core.errors import UserError

KIND = "serve-url"
Protocol = Literal["scalp", "oip"]
_WARM_UP_S = 1.0
_CHECK_S = 60.0


def bench_serve(
    out: str,
    url: str,
    photographs: str | None = None,
    clients: int = 8,
    rate: float | None = None,
    seconds: float = 30.0,
    key: str | None = None,
    protocol: Protocol = "scalp",
    model: str = "scalp",
) -> dict[str, Any]:
    """Load an endpoint, and measure its answers; the arguments are the options of `scalp bench serve`.

    Returns:
        The summary, which is also written to `out`.

    Raises:
        UserError: The URL or the images are invalid, or the endpoint does not grade the first image.
    """
    _check_url(url)
    files = inputs.read_images(photographs)
    if protocol == "oip":
        requests = open_inference.make_requests(url, model, files, key)
    else:
        requests = load.make_requests(files, key)
    _check_endpoint(url, requests)
    client = OwnProcess(load.setup_requests, requests)
    try:
        with console.status(f"loading {url}"):
            run, size = (load.open_loop, rate) if rate else (load.closed, clients)
            result = client.call(run, url, size, _WARM_UP_S, seconds)
    finally:
        client.close()
    try:
        row = load.summarize([result]) | {"refused": len(result.refusals)}
    except ValueError as error:
        raise UserError(f"{url}: {error} in {seconds:g} s") from None
    settings = {"url": url, "photographs": photographs, "clients": clients, "rate": rate, "seconds": seconds}
    settings |= {"protocol": protocol} | ({"model": model} if protocol == "oip" else {})
    summary = write_result(out, KIND, settings, [row], {})
    show(KIND, row | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
    return summary


def _check_url(url: str) -> None:
    try:
        base = httpx.URL(url)
    except httpx.InvalidURL:
        base = httpx.URL()
    if base.scheme not in ("http", "https") or not base.host:
        raise UserError(f"--url {url} is not a URL; write http:// or https://, the host and the port")
    if base.userinfo:
        raise UserError(f"--url {url} contains a user name; write the host without it")


def _check_endpoint(url: str, requests: load.Requests) -> None:
    address = f"{url.rstrip('/')}{requests.path}"
    try:
        answer = httpx.post(address, content=requests.bodies[0], headers=requests.headers, timeout=_CHECK_S)
    except httpx.TransportError as error:
        raise UserError(f"{url} is unreachable: {error}; start it with `scalp serve`") from None
    if answer.status_code != 200:
        raise UserError(f"{url} answers {answer.status_code} to the first image: {answer.text[:300].strip()}")
