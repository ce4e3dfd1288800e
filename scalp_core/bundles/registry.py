"""Models under names, in a folder or an `s3://` prefix: numbered versions, and which of them is promoted.

    ROOT/NAME/versions/N/claim.json     the bundle that number N is taken for; created first, by one writer
    ROOT/NAME/versions/N/…              the bundle's files; bundle.json last: without it N is not there
    ROOT/NAME/history/000001.json, …    promotions and rollbacks; the last one says what is promoted

Nothing is changed or removed. Several may write at once: a number, and the next place in the history, is
taken by creating a file that only one writer can create (`storage.create`). A number belongs to a bundle, not
to a writer. Each `add` of that bundle writes the same bytes to it, so concurrent ones share one version, and
a later one completes what a stopped one left.
"""

from __future__ import annotations

import difflib
import getpass
import itertools
import os
import re
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalp_core import storage
from scalp_core.bundles.bundle import (
    SPEC_FILE,
    Bundle,
    BundleSpec,
    open_bundle,
    read_file,
    read_spec,
    serialize_spec,
)
from scalp_core.errors import UserError
from scalp_core.evaluation.noninferiority import Comparison
from scalp_core.storage.listing import TEMPORARY

ENVIRONMENT = "SCALP_MODELS"
SCHEME = "models://"
CLAIM_FILE = "claim.json"

_NAME = re.compile(r"\w[\w.-]*")
_ENTRY = re.compile(r"(\d{6,})\.json")


class Claim(BaseModel):
    """The bundle that a version's number was taken for, and by whom."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str = Field(description="of the bundle that is added")
    source: str = Field(description="where it was added from")
    who: str
    when: datetime


class Evidence(BaseModel):
    """Comparison of a version with the promoted one, on the same labeled images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    against: int = Field(description="the version that was promoted")
    against_model: str = Field(description="its model_version")
    data: str = Field(description="directory of scalp prepare, whose test split was graded by both")
    data_sha256: str
    same_data: bool = Field(
        description="the data that the version was trained with; else it may have seen some"
    )
    comparison: Comparison


class Promotion(BaseModel):
    """One entry of a model's history."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal["promote", "rollback"]
    version: int = Field(description="promoted from then on")
    model_version: str
    who: str = Field(description="user@host")
    when: datetime
    why: str = Field("", description="as the person gave it")
    evidence: Evidence | None = Field(
        None, description="None of a first version, an untested one, a rollback"
    )


Record = TypeVar("Record", Claim, Promotion)


@dataclass(frozen=True)
class Registry:
    """All models below one root.

    Args:
        root: folder or `s3://` prefix; made by the first `add`.
    """

    root: str

    def names(self) -> list[str]:
        """Of all models that have a version."""
        return sorted(name for name in storage.folders_in(self.root) if self.versions(name))

    def versions(self, name: str) -> list[int]:
        """Numbers of the versions that are whole, ascending."""
        return sorted(number for number, file in self._files(name) if file == SPEC_FILE)

    def uri(self, name: str, version: int) -> str:
        """Where a version's bundle is."""
        return storage.join(self.root, name, "versions", str(version))

    def spec(self, name: str, version: int) -> BundleSpec:
        """The contract of a version's bundle."""
        return read_spec(self.uri(name, version))

    def history(self, name: str) -> list[Promotion]:
        """Promotions and rollbacks, oldest first."""
        return list(self._entries(name).values())

    def current(self, name: str) -> Promotion | None:
        """What made the promoted version so; None while none is."""
        return next(reversed(self.history(name)), None)

    def find(self, reference: str) -> tuple[str, int]:
        """The name and number that `[models://]NAME[@VERSION]` stands for.

        Raises:
            UserError: there is none such; it names the nearest and all.
        """
        name, at, wanted = reference.removeprefix(SCHEME).partition("@")
        if not _NAME.fullmatch(name) or (at and not wanted):
            raise UserError(f"{reference}: write {SCHEME}NAME, {SCHEME}NAME@VERSION or {SCHEME}NAME@latest")
        versions = self.versions(name)
        if not versions:
            raise self._unknown_name(reference, name)
        if not at:
            if promoted := self.current(name):
                return name, promoted.version
            raise UserError(
                f"{reference}: no version of {name} is promoted; run scalp models promote "
                f"{name}@{versions[-1]}, or write {SCHEME}{name}@latest"
            )
        if wanted == "latest":
            return name, versions[-1]
        if wanted in map(str, versions):
            return name, int(wanted)
        known = ", ".join(map(str, versions))
        near = versions[-1]
        if wanted.isdecimal():
            near = min(versions, key=lambda version: abs(version - int(wanted)))
        raise UserError(
            f"{reference}: {self.root} has no such version of {name}; did you mean {name}@{near}? "
            f"All versions: {known}"
        )

    def add(self, source: str, name: str) -> tuple[int, bool]:
        """Copies a bundle as the next version; the same weights and contract share one version.

        Args:
            source: a bundle, or a run's directory that holds one, as `loading.load_bundle` takes it.
            name: of the model.

        Returns:
            the version, and whether this call made it visible; of concurrent calls for one bundle, one did.

        Raises:
            UserError: the name cannot be one, or a file of the bundle is missing or damaged.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} cannot name a model: use letters, digits and . _ - within")
        bundle = open_bundle(resolve(source))
        version = self._claim(name, bundle)
        uri = self.uri(name, version)
        is_whole = storage.exists(storage.join(uri, SPEC_FILE))
        return version, not is_whole and _copy(bundle, uri)

    def promote(
        self,
        name: str,
        version: int,
        why: str = "",
        leaky_too: bool = False,
        evidence: Evidence | None = None,
        untested: bool = False,
    ) -> tuple[Promotion, bool]:
        """Makes a version the one that `models://NAME` stands for.

        Args:
            name: of the model.
            version: to promote.
            why: for the history.
            leaky_too: also one whose figures flatter.
            evidence: that it is not inferior to the promoted version, if there is one; kept in the history.
            untested: promote without evidence.

        Returns:
            the entry that promotes it, and whether it is new.

        Raises:
            UserError: its figures flatter (a leaky split) and that was not allowed, the evidence is against
                it or of another version, or another promotion came between.
        """
        entries = self._entries(name)
        last = next(reversed(entries.values()), None)
        if last and last.version == version:
            return last, False
        spec = self.spec(name, version)
        if spec.leaky and not leaky_too:
            raise UserError(
                f"{name}@{version} was trained on a leaky split, so its figures flatter; promote another "
                "version, or add --leaky-too"
            )
        if evidence and (failure := evidence.comparison.failure):
            raise UserError(
                f"{name}@{version} against {name}@{evidence.against} on the test split of {evidence.data}: "
                f"{failure}. Compare them on more images, or accept a larger loss with --max-drop"
            )
        if last and not evidence and not untested:
            raise UserError(
                f"{name}@{last.version} is promoted (by {last.who}); {name}@{version} was not compared with "
                "it; run scalp models promote with --data DIRECTORY, or --untested"
            )
        if evidence and last and evidence.against != last.version:
            raise UserError(
                f"{name}@{version} was compared with {name}@{evidence.against}, but meanwhile {last.who} "
                f"promoted {name}@{last.version}; run it again if it is still wanted"
            )
        return self._enter(name, entries, _promotion("promote", version, spec, why, evidence)), True

    def rollback(self, name: str, why: str = "") -> Promotion:
        """Makes the version promoted that was so before the present one; once more, the one before that.

        Raises:
            UserError: there is none before, or another promotion came between.
        """
        entries = self._entries(name)
        stack = _stack(entries.values())
        if len(stack) < 2:
            current = f"{name}@{stack[0]}" if stack else "none"
            raise UserError(
                f"{name}: no version was promoted before the present one ({current}); choose one with "
                f"scalp models promote {name}@VERSION"
            )
        spec = self.spec(name, stack[-2])
        return self._enter(name, entries, _promotion("rollback", stack[-2], spec, why))

    def _files(self, name: str) -> list[tuple[int, str]]:
        """Number and file name of every file in the folders of versions, without temporary ones."""
        folder = storage.join(self.root, name, "versions")
        if storage.is_empty(folder):
            return []
        parts = (uri[len(folder) + 1 :].split("/") for uri in storage.list_files(folder))
        return [
            (int(part[0]), part[1])
            for part in parts
            if len(part) == 2 and part[0].isdecimal() and not TEMPORARY.match(part[1])
        ]

    def _claim(self, name: str, bundle: Bundle) -> int:
        """The number that is taken for a bundle; takes the next one if there is none."""
        claim = Claim(
            fingerprint=bundle.spec.fingerprint, source=str(bundle.uri), who=_who(), when=datetime.now(UTC)
        )
        numbers = _numbers(lambda: (number for number, _ in self._files(name)))
        last = max(numbers, default=0)
        for version in itertools.chain(numbers, itertools.count(last + 1)):
            uri = storage.join(self.uri(name, version), CLAIM_FILE)
            if version > last and storage.create(uri, _json(claim)):
                return version
            if storage.exists(uri) and _read(Claim, uri).fingerprint == claim.fingerprint:
                return version
        raise AssertionError("numbers do not end")

    def _entries(self, name: str) -> dict[int, Promotion]:
        """The history by number, oldest first; a copy may have lost some."""
        folder = storage.join(self.root, name, "history")

        def listed() -> Iterable[int]:
            found = map(_ENTRY.fullmatch, storage.names_in(folder))
            return (int(entry[1]) for entry in found if entry)

        return {number: _read(Promotion, _entry(folder, number)) for number in _numbers(listed)}

    def _enter(self, name: str, entries: dict[int, Promotion], entry: Promotion) -> Promotion:
        """Appends to the history, if it is still the one that the decision was made on."""
        place = _entry(storage.join(self.root, name, "history"), max(entries, default=0) + 1)
        if not storage.create(place, _json(entry)):
            other = _read(Promotion, place)
            raise UserError(
                f"{name}: meanwhile {other.who} promoted version {other.version} ({other.action}); look at "
                f"scalp models list {name}, and run it again if it is still wanted"
            )
        return entry

    def _unknown_name(self, reference: str, name: str) -> UserError:
        known = self.names()
        if not known:
            return UserError(
                f"{reference}: {self.root} holds no models; add one with scalp models add RUN {name}"
            )
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        return UserError(
            f"{reference}: {self.root} has no model {name!r}; did you mean {near!r}? "
            f"All models: {', '.join(known)}"
        )


def open_registry(root: str | None = None) -> Registry:
    """The registry at `root`, or where `SCALP_MODELS` says.

    Raises:
        UserError: neither names one.
    """
    named = root or os.environ.get(ENVIRONMENT)
    if not named:
        raise UserError(
            f"no model registry is named: set {ENVIRONMENT} to a folder or s3://BUCKET/PREFIX "
            "(scalp models also takes --registry)"
        )
    return Registry(storage.absolute(named))


def resolve(uri: str) -> str:
    """Where the bundle is that `models://…` stands for; any other uri as it is.

    Raises:
        UserError: as `open_registry` and `Registry.find`.
    """
    if not uri.startswith(SCHEME):
        return uri
    registry = open_registry()
    return registry.uri(*registry.find(uri))


def refuse_change(bundle: Bundle) -> None:
    """Keeps the versions of a registry as they were added.

    Raises:
        UserError: the bundle is one.
    """
    if bundle.uri and storage.exists(storage.join(bundle.uri, CLAIM_FILE)):
        raise UserError(
            f"{bundle.uri} is a version in a registry, and those do not change; run this on the run's "
            "directory, then scalp models add RUN NAME for a new version"
        )


def _copy(bundle: Bundle, to: str) -> bool:
    """Copy every file of a bundle, one at a time in memory; the file that makes it visible is the last.

    Returns:
        whether this call made it visible, and not another one that copied the same bundle.
    """
    uri, hashes = str(bundle.uri), bundle.spec.file_hashes
    others = storage.names_in(uri) - {SPEC_FILE, CLAIM_FILE}
    for name in sorted(hashes.keys() | others):
        if name in hashes:
            storage.write(storage.join(to, name), read_file(uri, name, hashes[name]))
        else:  # the contract has no hash of it, so the first copy stays
            storage.create(storage.join(to, name), storage.read(storage.join(uri, name)))
    return storage.create(storage.join(to, SPEC_FILE), serialize_spec(bundle.spec))


def _numbers(listing: Callable[[], Iterable[int]]) -> list[int]:
    """Numbers that are taken, ascending. Each is taken after all lower ones; a number missing here is lost.

    One listing may show a number and miss a lower one that was taken while it ran. All numbers up to the
    highest one were taken before a second listing begins.
    """
    last = max(listing(), default=0)
    return sorted(number for number in set(listing()) if number <= last)


def _entry(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.json")


def _stack(history: Iterable[Promotion]) -> list[int]:
    """Versions promoted and not rolled back, the present one last and no version twice in a row.

    Where entries are lost, each rollback that is there still ends at the version that it names.
    """
    stack: list[int] = []
    for entry in history:
        if entry.action == "rollback":
            del stack[-1:]
            while entry.version in stack and stack[-1] != entry.version:
                stack.pop()
        if stack[-1:] != [entry.version]:
            stack.append(entry.version)
    return stack


def _promotion(
    action: Literal["promote", "rollback"],
    version: int,
    spec: BundleSpec,
    why: str,
    evidence: Evidence | None = None,
) -> Promotion:
    return Promotion(
        action=action,
        version=version,
        model_version=spec.model_version,
        who=_who(),
        when=datetime.now(UTC),
        why=why,
        evidence=evidence,
    )


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def _json(record: BaseModel) -> bytes:
    return (record.model_dump_json(indent=2) + "\n").encode()


def _read(kind: type[Record], uri: str) -> Record:
    try:
        return kind.model_validate_json(storage.read(uri))
    except ValidationError:
        raise UserError(f"{uri} cannot be read; it was changed by hand: restore it from a backup") from None
