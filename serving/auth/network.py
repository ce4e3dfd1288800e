"""Who reaches an address, whether to listen there, and with what certificate."""

from __future__ import annotations

import functools
import ipaddress
import ssl
import stat
from pathlib import Path

from scalp_core.errors import UserError
from serving.auth.keys import Keys


@functools.lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@functools.lru_cache(maxsize=1024)
def client_network(address: str) -> str:
    """The address, or of IPv6 the network of it that one client has to itself."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    return address if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))


def host_name(host: str) -> str:
    """The name or address in a Host header, without its port and brackets."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).removeprefix("[").removesuffix("]")


def is_here(address: str) -> bool:
    """Whether a client's address is of this machine; it has none on a Unix socket."""
    return not address or is_loopback(address)


def check_address(host: str, keys: Keys, open_to_network: bool) -> None:
    """Refuses to listen where others could ask without a key, unless that is wanted.

    Args:
        host: to listen on.
        keys: that there are.
        open_to_network: it is wanted.

    Raises:
        UserError: with the ways out.
    """
    if is_loopback(host) or keys or open_to_network:
        return
    raise UserError(
        f"--host {host} is open to the network and there are no keys: make one with `scalp keys new ID` and "
        "give --keys FILE, or say --open-to-network-without-keys"
    )


def check_certificate(file: str | None) -> None:
    """Refuses a PEM file that HAProxy could not use, or that others can read.

    Raises:
        UserError: it is missing or unreadable, holds no certificate with its key, or has open permissions.
    """
    if file is None:
        return
    try:
        mode = Path(file).stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UserError(f"{file} holds a private key and others may read it; run: chmod 600 {file}")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(file, password=_no_password)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(
            f"{file} is not a certificate with its private key in PEM ({reason}); join them with: "
            "cat fullchain.pem privkey.pem"
        ) from error


def _no_password() -> str:
    raise ValueError("the key has a password")
