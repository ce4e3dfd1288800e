"""The promotion history of a model: numbered files, each with the hash of the one before, never changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scalp_core import storage
from scalp_core.bundles import signing
from scalp_core.bundles.registry_records import Promotion, hash_record, parse_record, read_record, to_json
from scalp_core.errors import UserError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_ENTRY = re.compile(r"(\d{6,})\.json")


@dataclass(frozen=True)
class History:
    """Promotions and rollbacks of the model `name`, in `folder`; a copied registry may lack entries."""

    name: str
    folder: str

    def entries(self) -> dict[int, Promotion]:
        """Read the entries by number, oldest first.

        Raises:
            UserError: An entry is invalid, or was changed.
        """
        return self.parse(self.files())

    def files(self) -> dict[int, bytes]:
        """Read the files of the entries by number, oldest first."""

        def listed() -> Iterable[int]:
            matches = map(_ENTRY.fullmatch, storage.names_in(self.folder))
            return (int(match[1]) for match in matches if match)

        return {number: storage.read(self._uri(number)) for number in taken_numbers(listed)}

    def parse(self, files: dict[int, bytes]) -> dict[int, Promotion]:
        """Parse `files`, and check the hashes between them.

        Raises:
            UserError: An entry is invalid, or was changed.
        """
        entries = {number: parse_record(Promotion, data, self._uri(number)) for number, data in files.items()}
        for number, entry in entries.items():
            before = files.get(number - 1)
            if before and entry.previous_sha256 and entry.previous_sha256 != hash_record(before):
                raise UserError(
                    f"{self._uri(number - 1)} was changed after entry {number} recorded its hash; "
                    "restore it from a backup"
                )
        return entries

    def check_signature(self, number: int, data: bytes) -> bool:
        """Check the signature of an entry's bytes, if `SCALP_SIGNERS` is set; return whether it is.

        Raises:
            UserError: It is not signed by one of the signers.
        """
        signers = signing.signers_file()
        if signers is None:
            return False
        signing.check_entry(data, self._uri(number), self.name, number, signers)
        return True

    def append(self, entry: Promotion, last: int, key: Ed25519PrivateKey | None) -> Promotion:
        """Append an entry after the entry `last` (0: none), with its hash and the signature by `key`.

        Raises:
            UserError: Somebody else has appended after `last`.
        """
        previous = hash_record(storage.read(self._uri(last))) if last else None
        entry = entry.model_copy(update={"previous_sha256": previous})
        if key:
            entry = entry.model_copy(update={"signature": signing.sign(entry, self.name, last + 1, key)})
        uri = self._uri(last + 1)
        if not storage.create(uri, to_json(entry)):
            other = read_record(Promotion, uri)
            raise UserError(
                f"{self.name}: meanwhile {other.who} promoted version {other.version} ({other.action}); look "
                f"at scalp models list {self.name}, and run it again if it is still wanted"
            )
        return entry

    def _uri(self, number: int) -> str:
        return storage.join(self.folder, f"{number:06d}.json")


def taken_numbers(listing: Callable[[], Iterable[int]]) -> list[int]:
    """List the taken numbers, ascending. Numbers are taken in order, so a gap is a lost file.

    One listing may contain a number and miss a lower one that was taken during the listing. A second listing
    contains all numbers up to the highest one of the first.
    """
    last = max(listing(), default=0)
    return sorted(number for number in set(listing()) if number <= last)
