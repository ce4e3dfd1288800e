"""Ports for servers that tests start."""

from __future__ import annotations

import random
import socket

# Below the range that Linux gives to outgoing connections and to servers that ask for any port.
_PORTS = range(20_000, 32_000)
_held: list[socket.socket] = []


def free_port() -> int:
    """Reserve a port on loopback that nothing listens on, until this process ends."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Reserve `count` different ports.

    A bound UDP socket reserves the number among all test processes; TCP stays free for the server.
    """
    ports: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(ports) == count:
            return ports
        reservation = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            reservation.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        _held.append(reservation)
        ports.append(port)
    raise RuntimeError(f"fewer than {count} ports from {_PORTS.start} to {_PORTS.stop} are free")
