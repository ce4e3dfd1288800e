"""`scalp bench serve`: measure throughput and latency of a running endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from jobs.bench import inputs, load
from jobs.bench.measure import OwnProcess, write_result
from jobs.common.console import SUMMARY_FILE, console, show
from scalp_core import storage
from scalp_core.errors import UserError

KIND = "serve-url"
_WARM_UP_S = 1.0
_CHECK_S = 60.0


@dataclass(frozen=True)
class ServeOptions:
    """Options of `scalp bench serve`.

    Args:
        url: Base URL of the endpoint.
        photographs: Folder or prefix of JPEG files; None: synthetic images.
        clients: Clients of a closed loop.
        rate: Arrivals per second of an open loop; None: a closed loop.
        seconds: Measured seconds, after a warm-up.
    """

    url: str
    photographs: str | None = None
    clients: int = 8
    rate: float | None = None
    seconds: float = 30.0


def bench_serve(out: str, options: ServeOptions, key: str | None = None) -> dict[str, Any]:
    """Load an endpoint, and measure its answers.

    Args:
        out: Output directory, for `summary.json`.
        options: Options of the benchmark.
        key: API key.

    Returns:
        The summary.

    Raises:
        UserError: The URL or the images are invalid, or the endpoint does not grade the first image.
    """
    port = _check_url(options.url)
    files = inputs.read_images(options.photographs)
    _check_endpoint(options.url, files[0], key)
    client = OwnProcess(load.setup, files, key, options.url)
    try:
        with console.status(f"loading {options.url}"):
            if options.rate:
                result = client.call(load.open_loop, port, options.rate, _WARM_UP_S, options.seconds)
            else:
                result = client.call(load.closed, port, options.clients, _WARM_UP_S, options.seconds)
    finally:
        client.close()
    try:
        row = load.summarize([result]) | {"refused": len(result.refusals)}
    except ValueError as error:
        raise UserError(f"{options.url}: {error} in {options.seconds:g} s") from None
    summary = write_result(out, KIND, vars(options), [row], {})
    show(KIND, row | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
    return summary


def _check_url(url: str) -> int:
    """Port of the endpoint."""
    base = urlsplit(url)
    try:
        port = base.port or {"http": 80, "https": 443}[base.scheme]
    except (KeyError, ValueError):
        raise UserError(f"--url {url}: write http:// or https://, the host and the port") from None
    if not base.hostname or base.username:
        raise UserError(f"--url {url}: write the host without a user name")
    return port


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
