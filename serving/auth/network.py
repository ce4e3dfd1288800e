"""Checks of network addresses, of the address to listen on, and of the TLS certificate."""

from __future__ import annotations

import errno
import functools
import ipaddress
import socket
import ssl
import stat
from pathlib import Path

from starlette.types import Scope

from scalp_core.errors import UserError
from serving.auth.keys import Keys


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def client_network(scope: Scope) -> str:
    """Network of a client; empty for this machine.

    uvicorn replaces the address by X-Forwarded-For of proxies at 127.0.0.1 and in FORWARDED_ALLOW_IPS.
    """
    client = scope.get("client")
    return _network(client[0]) if client else ""  # none on a Unix socket


@functools.lru_cache(maxsize=1024)
def _network(address: str) -> str:
    """The IPv4 address, or the IPv6 /64 network, which one client usually has to itself."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if parsed.is_loopback:
        return ""
    return address if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))


def host_name(host: str) -> str:
    """Name or address of a Host header, without port and brackets."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).removeprefix("[").removesuffix("]")


def check_address(host: str, keys: Keys, open_to_network: bool) -> None:
    """Refuse to listen on the network without keys.

    Raises:
        UserError: The address is open to the network, and there are no keys.
    """
    if is_loopback(host) or keys or open_to_network:
        return
    raise UserError(
        f"--host {host} is open to the network and there are no keys; make one with `scalp keys new ID` and "
        "give --keys FILE, or add --allow-anonymous"
    )


def check_port(host: str, port: int, option: str = "--port") -> None:
    """Raise a `UserError`, which names `option`, if the port cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = (
                "is in use" if error.errno == errno.EADDRINUSE else f"is not available ({error.strerror})"
            )
            raise UserError(f"port {port} of {host} {reason}; choose another one with {option}") from error


def check_certificate(file: str | None) -> None:
    """Check that HAProxy can use a PEM file, and that other users cannot read it.

    Raises:
        UserError: It is missing or unreadable, lacks the certificate or its key, or has open permissions.
    """
    if file is None:
        return
    try:
        mode = Path(file).stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"{file} holds a private key and other users can read it; run: chmod 600 {file}")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file, password="")  # without a prompt
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(
            f"{file} is not a certificate with its private key in PEM ({reason}); join them with: "
            "cat fullchain.pem privkey.pem"
        ) from error
