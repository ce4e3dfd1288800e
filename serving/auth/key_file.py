"""Revoke keys in the key file of `scalp serve --keys`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from scalp_core.errors import UserError
from serving.auth.keys import Key, parse_line, read_file


def revoke(path: str, id_: str, hash_prefix: str | None = None) -> list[Key]:
    """Atomically remove the lines of an id; comments, mode and owner of the file stay as they are.

    Args:
        path: Path of the key file; a link is followed.
        id_: Id whose keys are removed.
        hash_prefix: First hexadecimal digits of the hash, to choose one of several keys.

    Returns:
        The removed keys.

    Raises:
        UserError: There is no such key, the prefix is ambiguous, or the file is not writable.
    """
    lines = read_file(path)
    keys = [parse_line(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]
    removed = {
        number: key
        for number, key in enumerate(keys)
        if key and key.id == id_ and key.digest.hex().startswith((hash_prefix or "").lower())
    }
    named = f"{id_} with a hash that begins with {hash_prefix}" if hash_prefix else id_
    if not removed:
        raise UserError(f"{path} has no key of {named}; `scalp keys list {path}` shows all")
    if hash_prefix and len({key.digest for key in removed.values()}) > 1:
        raise UserError(f"{path} has several keys of {named}; give more digits of the hash")
    _replace(path, "".join(f"{line}\n" for number, line in enumerate(lines) if number not in removed))
    return list(removed.values())


def _replace(path: str, text: str) -> None:
    """Atomically and durably replace the file: a reader sees the old file or the new one."""
    target = Path(path).resolve()
    try:
        status = target.stat()
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)  # mode 600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), status.st_mode & 0o777)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; the keys are as they were") from error
