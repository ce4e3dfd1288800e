"""Proxy of an S3 server that answers 503 SlowDown to a part of the requests, as S3 does to throttle."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
# Of one connection, not of the next one; the proxy sets its own.
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class SlowProxy(ThreadingHTTPServer):
    """Proxy that counts forwarded and refused requests."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, server: str, refused_share: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server = server.removeprefix("http://")
        self.refused_share = refused_share
        self.passed = self.refused = 0
        self._draw = random.Random(0)
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def refuses(self) -> bool:
        with self._lock:
            refused = self._draw.random() < self.refused_share
            self.refused += refused
            self.passed += not refused
        return refused


class _Handler(BaseHTTPRequestHandler):
    server: SlowProxy
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self._upstream = http.client.HTTPConnection(self.server.server, timeout=60)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def _handle(self) -> None:
        body = b"".join(self._body())
        if self.server.refuses():
            self._answer(503, {"Content-Type": "application/xml"}, _SLOW_DOWN)
            return
        # The host that was signed stays in the request.
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        chunked = "Transfer-Encoding" in self.headers
        self._upstream.request(
            self.command, self.path, iter([body]) if chunked else body, headers, encode_chunked=chunked
        )
        answer = self._upstream.getresponse()
        self._answer(answer.status, dict(answer.getheaders()), answer.read())

    def _body(self) -> Iterator[bytes]:
        if "Transfer-Encoding" not in self.headers:
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle  # noqa: N815


@contextmanager
def slow_proxy(server: str, refused_share: float) -> Iterator[SlowProxy]:
    """Run the proxy while the block runs.

    Args:
        server: address of the S3 server, `http://HOST:PORT`.
        refused_share: of the requests that are refused.
    """
    with SlowProxy(server, refused_share) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
