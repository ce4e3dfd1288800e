"""Who reaches an address, and whether to listen there."""

from __future__ import annotations

import functools
import ipaddress

from scalp_core.errors import UserError
from serving.keys import Keys


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
