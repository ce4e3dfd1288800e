"""Signatures of promotions, by Ed25519 keys of OpenSSH (`ssh-keygen -t ed25519`)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from scalp_core import storage
from scalp_core.errors import UserError

if TYPE_CHECKING:
    # `cryptography` is imported where it is needed: few commands sign or check.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ENVIRONMENT = "SCALP_SIGNERS"

_FIELD = "signature"
# In the signed bytes, so that a signature of something else by the same key does not count.
_PURPOSE = "scalp promotion"


class Signature(BaseModel):
    """Signature of an entry of the history."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    signer: str = Field(description="fingerprint of the public key, as ssh-keygen -l prints it")
    value: str = Field(
        description="Ed25519 signature (RFC 8032) of `scalp promotion NAME NUMBER`, a line feed, and the "
        "entry without its signature as JSON with sorted keys and without spaces; base64"
    )


def load_key(path: str) -> Ed25519PrivateKey:
    """Load a private key of OpenSSH.

    Raises:
        UserError: The file cannot be read, has a passphrase, or is not such a key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(
            f"the key {path} cannot be read ({error.strerror}); make one with ssh-keygen -t ed25519 -f FILE"
        ) from None
    try:
        key = load_ssh_private_key(data, password=None)
    except TypeError:
        raise UserError(f"the key {path} has a passphrase; use a key for signing without one") from None
    except Exception:  # of several types, by the damage
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(
            f"{path} is not a private Ed25519 key of OpenSSH; make one with ssh-keygen -t ed25519 -f FILE"
        )
    return key


def sign(record: BaseModel, name: str, number: int, key: Ed25519PrivateKey) -> Signature:
    """Sign an entry of the history.

    Args:
        record: Entry without a signature.
        name: Model of the history.
        number: Number of the entry in the history.
        key: Private key of the signer.
    """
    value = key.sign(_signed_bytes(record.model_dump(mode="json"), name, number))
    return Signature(signer=fingerprint(key), value=base64.b64encode(value).decode())


def fingerprint(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """Fingerprint of a key's public part, as `ssh-keygen -l` prints it."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    blob = base64.b64decode(public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def signers_file() -> str | None:
    """Location of the public keys that `SCALP_SIGNERS` names; None if it is not set.

    Raises:
        UserError: The variable is empty. It would otherwise switch the check off, by a mistake in a template.
    """
    path = os.environ.get(ENVIRONMENT)
    if path == "":
        raise UserError(f"{ENVIRONMENT} is empty; name a file with public keys, or unset it")
    return path


def check_key(key: Ed25519PrivateKey | None) -> None:
    """Check before a promotion that its signature will count here.

    Raises:
        UserError: `SCALP_SIGNERS` is set, and the key is missing or not one of them.
    """
    path = signers_file()
    if path is None:
        return
    if key is None:
        raise UserError(
            f"{ENVIRONMENT} is set, so promotions are signed; add --key FILE with your private key"
        )
    if fingerprint(key) not in _load_signers(path):
        raise UserError(
            f"the key {fingerprint(key)} is not in {path}, so its signature would not count; "
            "add its public key to that file, or sign with another --key"
        )


def check_entry(data: bytes, uri: str, name: str, number: int, path: str) -> None:
    """Check the signature of an entry of the history.

    Args:
        data: Bytes of the entry's file.
        uri: Its address, for the message.
        name: Model of the history.
        number: Number of the entry in the history.
        path: File of public keys.

    Raises:
        UserError: The entry has no valid signature of a signer, or the file of signers cannot be read.
    """
    from cryptography.exceptions import InvalidSignature

    signers = _load_signers(path)
    entry = json.loads(data)
    signature = entry.get(_FIELD)
    if signature is None:
        raise UserError(
            f"{uri}, a promotion of version {entry['version']} by {entry['who']}, is not signed, and "
            f"{ENVIRONMENT} is set; if it is yours, promote it again with --key, or name a version as "
            "models://NAME@VERSION"
        )
    signer = signers.get(signature["signer"])
    if signer is None:
        raise UserError(
            f"{uri} is signed by {signature['signer']}, which is not in {path}; ask who promoted it, or add "
            "the public key"
        )
    try:
        value = base64.b64decode(signature["value"], validate=True)
        signer.verify(value, _signed_bytes(entry, name, number))
    except (InvalidSignature, ValueError):  # ValueError: not base64
        raise UserError(
            f"{uri} was changed or moved after {signature['signer']} signed it; restore it from a backup"
        ) from None


def _signed_bytes(entry: Mapping[str, Any], name: str, number: int) -> bytes:
    """Return what is signed: the entry with its place, so that a copy of it elsewhere is refused."""
    content = {field: value for field, value in entry.items() if field != _FIELD}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"{_PURPOSE} {name} {number}\n{text}".encode()


def _load_signers(path: str) -> dict[str, Ed25519PublicKey]:
    """Load public keys by fingerprint from a file, local or `s3://`, with a line of OpenSSH per key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    lines = storage.read(path).decode(errors="replace").splitlines()
    signers = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            key = load_ssh_public_key(line.encode())
        except Exception:  # of several types, by the damage
            key = None
        if not isinstance(key, Ed25519PublicKey):
            raise UserError(
                f"line {number} of {path} ({ENVIRONMENT}) is not a public Ed25519 key; copy the line of the "
                "file FILE.pub that ssh-keygen wrote"
            )
        signers[fingerprint(key)] = key
    return signers
