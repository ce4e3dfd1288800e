"""`scalp bench serve`: measure throughput and latency of a running endpoint."""

from __future__ import annotations

from typing import Any

import httpx

from jobs.bench import inputs, load
from jobs.bench.measure import OwnProcess, write_result
from jobs.common.console import SUMMARY_FILE, console, show
from scalp_core import storage
from scalp_core.errors import UserError

KIND = "serve-url"
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
) -> dict[str, Any]:
    """Load an endpoint, and measure its answers; the arguments are the options of `scalp bench serve`.

    Returns:
        The summary, which is also written to `out`.

    Raises:
        UserError: The URL or the images are invalid, or the endpoint does not grade the first image.
    """
    _check_url(url)
    files = inputs.read_images(photographs)
    _check_endpoint(url, files[0], key)
    client = OwnProcess(load.setup, files, key)
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


def _check_endpoint(url: str, image: bytes, key: str | None) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.post(
            f"{url.rstrip('/')}{load.PATH}", files={"file": image}, headers=headers, timeout=_CHECK_S
        )
    except httpx.TransportError as error:
        raise UserError(f"{url} is unreachable: {error}; start it with `scalp serve`") from None
    if answer.status_code != 200:
        raise UserError(f"{url} answers {answer.status_code} to the first image: {answer.text[:300].strip()}")
