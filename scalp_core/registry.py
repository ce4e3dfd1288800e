"""Models under names, in a folder or an `s3://` prefix: numbered versions, and which of them is promoted.

    ROOT/NAME/versions/N/claim.json     whose number N is; written first, by one writer alone
    ROOT/NAME/versions/N/…              the bundle's files; bundle.json last: without it N is not there
    ROOT/NAME/history/000001.json, …    promotions and rollbacks; the last one says what is promoted

Nothing is ever changed or removed. Several may write at once: who takes a number, or the next place in the
history, creates a file that only one can create (`storage.create`). An `add` that was stopped leaves a
number that nobody takes again, since nobody can know that its writer is dead.
"""

from __future__ import annotations

import difflib
import getpass
import os
import re
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalp_core import storage
from scalp_core.bundle import SPEC_FILE, Bundle, BundleSpec, load_bundle, read_file, read_spec, save_bundle
from scalp_core.errors import UserError

ENVIRONMENT = "SCALP_MODELS"
SCHEME = "models://"
CLAIM_FILE = "claim.json"

_NAME = re.compile(r"\w[\w.-]*")
_ENTRY = re.compile(r"(\d+)\.json")


class Claim(BaseModel):
    """Who took a version's number, and for what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str = Field(description="of the bundle that is added")
    source: str = Field(description="where it was added from")
    who: str
    when: datetime


class Promotion(BaseModel):
    """One entry of a model's history."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal["promote", "rollback"]
    version: int = Field(description="promoted from then on")
    model_version: str
    who: str = Field(description="user@host")
    when: datetime
    why: str = Field("", description="as the person gave it")


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
        folder = storage.join(self.root, name, "history")
        entries = sorted(entry for entry in storage.names_in(folder) if _ENTRY.fullmatch(entry))
        return [_read(Promotion, storage.join(folder, entry)) for entry in entries]

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
        """Copies a bundle as the next version.

        Args:
            source: a bundle, or a run's directory that holds one, as `load_bundle` takes it.
            name: of the model.

        Returns:
            the version, and whether it is new: weights and contract that are there already are not
            added again.

        Raises:
            UserError: the name cannot be one, or a file of the bundle is missing or damaged.
        """
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} cannot name a model: use letters, digits and . _ - within")
        bundle = load_bundle(source)
        for version in self.versions(name):
            claim = _read(Claim, storage.join(self.uri(name, version), CLAIM_FILE))
            if claim.fingerprint == bundle.spec.fingerprint:
                return version, False
        version = self._claim(name, bundle)
        _copy(bundle, self.uri(name, version))
        return version, True

    def promote(
        self, name: str, version: int, why: str = "", leaky_too: bool = False
    ) -> tuple[Promotion, bool]:
        """Makes a version the one that `models://NAME` stands for.

        Returns:
            the entry that promotes it, and whether it is new.

        Raises:
            UserError: its figures flatter (a leaky split) and that was not allowed, or another promotion came
                between.
        """
        history = self.history(name)
        if history and history[-1].version == version:
            return history[-1], False
        spec = self.spec(name, version)
        if spec.leaky and not leaky_too:
            raise UserError(
                f"{name}@{version} was trained on a leaky split, so its figures flatter; promote another "
                "version, or add --leaky-too"
            )
        return self._enter(name, history, _promotion("promote", version, spec, why)), True

    def rollback(self, name: str, why: str = "") -> Promotion:
        """Makes the version promoted that was so before the present one; once more, the one before that.

        Raises:
            UserError: there is none before, or another promotion came between.
        """
        history = self.history(name)
        before = _stack(history)[:-1]
        if not before:
            current = f"{name}@{history[-1].version}" if history else "none"
            raise UserError(
                f"{name}: no version was promoted before the present one ({current}); choose one with "
                f"scalp models promote {name}@VERSION"
            )
        spec = self.spec(name, before[-1])
        return self._enter(name, history, _promotion("rollback", before[-1], spec, why))

    def _files(self, name: str) -> list[tuple[int, str]]:
        """Number and file name of all that lies in folders of versions."""
        folder = storage.join(self.root, name, "versions")
        if storage.is_empty(folder):
            return []
        parts = (uri[len(folder) + 1 :].split("/") for uri in storage.list_files(folder))
        return [(int(part[0]), part[1]) for part in parts if len(part) == 2 and part[0].isdecimal()]

    def _claim(self, name: str, bundle: Bundle) -> int:
        """Takes the next number, also after those whose `add` was stopped."""
        claim = Claim(
            fingerprint=bundle.spec.fingerprint, source=str(bundle.uri), who=_who(), when=datetime.now(UTC)
        )
        version = max((number for number, _ in self._files(name)), default=0) + 1
        while not storage.create(storage.join(self.uri(name, version), CLAIM_FILE), _json(claim)):
            version += 1
        return version

    def _enter(self, name: str, history: list[Promotion], entry: Promotion) -> Promotion:
        """Appends to the history, if it is still the one that the decision was made on."""
        place = storage.join(self.root, name, "history", f"{len(history) + 1:06d}.json")
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


def _copy(bundle: Bundle, to: str) -> None:
    """Every file of a bundle, one at a time in memory; what makes it visible last."""
    uri, hashes = str(bundle.uri), bundle.spec.file_hashes
    beside = storage.names_in(uri) - {SPEC_FILE, CLAIM_FILE}
    for name in sorted(hashes.keys() | beside):
        checked = name in hashes
        data = read_file(uri, name, hashes[name]) if checked else storage.read(storage.join(uri, name))
        storage.write(storage.join(to, name), data)
    save_bundle(to, bundle.spec, {})


def _stack(history: list[Promotion]) -> list[int]:
    """Versions promoted and not rolled back, the present one last."""
    stack: list[int] = []
    for entry in history:
        if entry.action == "promote":
            stack.append(entry.version)
        else:
            stack.pop()
    return stack


def _promotion(action: Literal["promote", "rollback"], version: int, spec: BundleSpec, why: str) -> Promotion:
    return Promotion(
        action=action,
        version=version,
        model_version=spec.model_version,
        who=_who(),
        when=datetime.now(UTC),
        why=why,
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
