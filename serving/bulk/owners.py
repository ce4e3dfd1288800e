"""Owners of bulk runs: the keys that started one, stored below the output prefix of the endpoint.

OUT/owners/key-ID/WORK.json    one file per key and bulk run, written before its job is submitted

A run has several owners when several keys start it. Revoking a key removes nothing: the key file decides who
has access, and a later key with the same id owns the runs of the earlier one.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime

from scalp_core import storage
from serving.auth.scopes import Caller

_FOLDER = "owners"
_SUFFIX = ".json"


class Owners:
    """Read and add owners. All methods block.

    Raises:
        UserError: The storage refused access.
    """

    def __init__(self, out: str) -> None:
        self._out = out

    def add(self, caller: Caller, work: str, source: str) -> None:
        """Atomically make the caller an owner; a caller without a key is not stored."""
        if caller.key is None or self._source(caller.key, work) == source:
            return
        at = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"key": caller.key, "work": work, "source": source, "started_at": at}
        storage.write(self._uri(caller.key, work), json.dumps(content, ensure_ascii=False).encode())

    def may_see(self, caller: Caller, work: str) -> bool:
        """Whether the caller may see a run: an owner whose scopes still cover its source, or an admin."""
        if caller.rights.admin:
            return True
        source = self._source(caller.key, work) if caller.key else None
        return source is not None and caller.rights.covers(source)

    def works(self, key: str) -> set[str]:
        """Ids of the runs that a key started."""
        names = storage.names_in(storage.join(self._out, _FOLDER, _folder(key)))
        return {name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)}

    def _source(self, key: str, work: str) -> str | None:
        content = storage.read_json(self._uri(key, work))
        return str(content["source"]) if content else None

    def _uri(self, key: str, work: str) -> str:
        return storage.join(self._out, _FOLDER, _folder(key), f"{work}{_SUFFIX}")


def _folder(key: str) -> str:
    return f"key-{key}"  # an id may be .. or .
