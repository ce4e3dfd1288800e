"""Find the listening sockets of this process and its descendants, and call them without Ray's token."""

from __future__ import annotations

import os
import pickle
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import grpc
from ray.serve.generated.serve_pb2 import ASGIRequest

from tests.support import processes

PROTECTION = Path(__file__).parents[2] / "docs" / "protection.md"
_LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
_EVERY_S, _TAKEOVER_S = 0.5, 30
_LISTEN = "0A"  # state in /proc/net/tcp
_SERVE_METHOD = "/ray.serve.ASGIService/HandleRequest"
# One harmless method of each server of Ray: GCS, raylet, worker, object manager, agent.
_METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.ReporterService/HealthCheck",
)


class Listening(NamedTuple):
    """Listening socket: the kind of its process, such as `ray::ServeReplica`, and its address."""

    process: str
    address: str
    port: int

    @property
    def is_beyond_loopback(self) -> bool:
        return self.address not in _LOOPBACK


def listening(root: int | None = None) -> set[Listening]:
    """List the TCP sockets, IPv4 and IPv6, that `root` (this process) and its descendants listen on now."""
    addresses, found = _listening_sockets(), set()
    for pid in processes.tree(root or os.getpid()):
        if own := addresses.keys() & set(_open_files(pid)):
            kind = re.match(r"(ray::\w+|[^:]*)", processes.name(pid)).group()
            found |= {Listening(kind, *addresses[link]) for link in own}
    return found


def _open_files(pid: int) -> Iterator[str]:
    """What the descriptors of a process refer to, such as `socket:[INODE]`."""
    with suppress(OSError):  # the process has ended
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # it is closed
                yield str(file.readlink())


def _listening_sockets() -> dict[str, tuple[str, int]]:
    """Address and port of each TCP socket of this machine that listens, by what descriptors refer to.

    psutil would read all sockets of the machine again for each process.
    """
    found = {}
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                address, port = fields[1].split(":")
                # In words of 32 bits, in the order of this machine.
                words = struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))
                packed = struct.pack(f"={len(words)}I", *words)
                found[f"socket:[{fields[9]}]"] = socket.inet_ntop(family, packed), int(port, 16)
    return found


def await_listener(port: int, root: int) -> str:
    """Kind of the descendant of `root` that listens on `port`.

    When the replicas change, Ray starts another HAProxy, which takes the socket over. A look at one process
    after the other can see the one too early and the other too late.
    """
    deadline = time.monotonic() + _TAKEOVER_S
    while not (found := {each.process for each in listening(root) if each.port == port}):
        assert time.monotonic() < deadline, f"no process of {root} listens on port {port}"
    (kind,) = found
    return kind


@contextmanager
def watched() -> Iterator[set[Listening]]:
    """Collect the sockets that listen at any time while the block runs."""
    found: set[Listening] = set()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            found.update(listening())
            over.wait(_EVERY_S)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def exposed(sockets: set[Listening]) -> set[str]:
    """Kinds of the processes that listen beyond loopback."""
    return {each.process for each in sockets if each.is_beyond_loopback}


def documented(command: str) -> set[str]:
    """Kinds of processes that listen beyond loopback for a command, according to docs/protection.md."""
    return set(re.findall(rf"^\| `scalp {command}` \| `([\w:]+)` \|", PROTECTION.read_text(), re.MULTILINE))


class _Touch:
    """Pickle that creates a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._file,)


def unauthenticated(sockets: set[Listening], file: Path) -> dict[Listening, set[str]]:
    """Call each socket by gRPC without a token; return the status codes of each gRPC server.

    Args:
        sockets: of Ray's processes.
        file: made where a replica of Ray Serve loads the pickle that it is sent.
    """
    poison = ASGIRequest(pickled_request_metadata=pickle.dumps(_Touch(file))).SerializeToString()
    codes = {each: {_call(each, method, b"") for method in _METHODS} for each in sockets}
    for each in sockets:
        codes[each].add(_call(each, _SERVE_METHOD, poison))
    silent = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN"}  # HTTP/1 or another protocol
    return {each: found for each, found in codes.items() if not found <= silent}


def _call(server: Listening, method: str, payload: bytes) -> str:
    host = "[::1]" if server.address in ("::", "::1") else "127.0.0.1"
    with grpc.insecure_channel(f"{host}:{server.port}") as channel:
        try:
            channel.unary_unary(method)(payload, timeout=2)
        except grpc.RpcError as error:
            return error.code().name
        return "OK"
