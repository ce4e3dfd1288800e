"""The model registry: named models with numbered versions and a promoted version each.

A folder or an `s3://` prefix:

    ROOT/NAME/versions/N/claim.json     the bundle that owns number N; created first, by one writer
    ROOT/NAME/versions/N/…              the bundle's files; version N exists once bundle.json does, the last
    ROOT/NAME/history/000001.json, …    promotions and rollbacks; the last one names the promoted version
    ROOT/NAME/promotion.yaml            policy that promotions obey, if the owner put one there

Files are never changed or removed. Concurrent writers are safe: a writer takes a number, or the next place in
the history, by creating a file that only one writer can create (`storage.create`). A number belongs to a
bundle, not to a writer. Each `add` of that bundle writes the same bytes, so concurrent ones share one
version, and a later one completes an interrupted one. An entry of the history has the hash of the one before,
so a changed entry is detected by its successor. If `SCALP_SIGNERS` names public keys, `NAME` stands for the
promoted version only if one of them signed its promotion.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from scalp_core import storage
from scalp_core.bundles import signing
from scalp_core.bundles.bundle import (
    BOM_FILE,
    SPEC_FILE,
    Bundle,
    open_bundle,
    read_file,
    read_fingerprint,
    read_spec,
    serialize_bom,
    serialize_spec,
)
from scalp_core.bundles.contract import BundleSpec
from scalp_core.bundles.promotion_history import History, taken_numbers
from scalp_core.bundles.registry_records import (
    Claim,
    Evidence,
    Promotion,
    current_user,
    read_record,
    stack_promoted,
    to_json,
)
from scalp_core.errors import UserError, suggest
from scalp_core.evaluation.promotion_policy import POLICY_FILE, PolicyFile, PolicyResult, load_policy
from scalp_core.storage.listing import TEMPORARY
from scalp_core.storage.outputs import MARKER_FILE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ENVIRONMENT = "SCALP_MODELS"
SCHEME = "models://"
CLAIM_FILE = "claim.json"

_NAME = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True)
class Registry:
    """A model registry: all models below `root`, a folder or `s3://` prefix that the first `add` creates."""

    root: str

    def names(self) -> list[str]:
        """List the models that have a version."""
        return sorted(name for name in storage.folders_in(self.root) if self.versions(name))

    def versions(self, name: str) -> list[int]:
        """Numbers of the complete versions, ascending."""
        return sorted(number for number, file in self._files(name) if file == SPEC_FILE)

    def uri(self, name: str, version: int) -> str:
        """URI of a version's bundle."""
        return storage.join(self.root, name, "versions", str(version))

    def spec(self, name: str, version: int) -> BundleSpec:
        """Read the contract of a version's bundle."""
        return read_spec(self.uri(name, version))

    def history(self, name: str) -> list[Promotion]:
        """Read the promotions and rollbacks, oldest first."""
        return list(self._history(name).entries().values())

    def current(self, name: str) -> Promotion | None:
        """The history entry of the promoted version; None if no version is promoted."""
        return next(reversed(self.history(name)), None)

    def policy(self, name: str) -> PolicyFile | None:
        """Read the policy that promotions of a model obey; None if it has none.

        Raises:
            UserError: The file is invalid.
        """
        uri = storage.join(self.root, name, POLICY_FILE)
        return load_policy(uri) if storage.exists(uri) else None

    def find_name(self, reference: str) -> str:
        """Check that a model exists, and return its name, without `models://`.

        Raises:
            UserError: No such model; the message names the nearest one.
        """
        name = reference.removeprefix(SCHEME)
        if not _NAME.fullmatch(name):
            raise UserError(f"{reference} names no model; write the name alone, without a version")
        if not self.versions(name):
            raise self._unknown_name(reference, name)
        return name

    def find(self, reference: str) -> tuple[str, int]:
        """Resolve `[models://]NAME[@VERSION]` to a name and a version number.

        Raises:
            UserError: No such model or version; the message names the nearest one and all others. Or the
                promotion is not signed by one of `SCALP_SIGNERS`, or the bundle has changed since.
        """
        name, at, wanted = reference.removeprefix(SCHEME).partition("@")
        if not _NAME.fullmatch(name) or (at and not wanted):
            raise UserError(
                f"{reference} names no model; write {SCHEME}NAME, {SCHEME}NAME@VERSION or {SCHEME}NAME@latest"
            )
        versions = self.versions(name)
        if not versions:
            raise self._unknown_name(reference, name)
        if not at:
            history = self._history(name)
            files = history.files()
            if entries := history.parse(files):
                number, promoted = entries.popitem()
                self._check_promotion(history, number, files[number], promoted)
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
        """Copy a bundle, or that of a run, as the next version; equal weights and contract share one version.

        Returns:
            The version, and whether this call made it visible. Of concurrent calls for one bundle, one did.

        Raises:
            UserError: The name is invalid, or a file of the bundle is missing or damaged.
        """
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{name!r} is not a valid name of a model; use letters, digits, and . _ - after the first"
            )
        bundle = open_bundle(resolve(source))
        version = self._claim(name, bundle)
        uri = self.uri(name, version)
        is_whole = storage.exists(storage.join(uri, SPEC_FILE))
        return version, not is_whole and copy_bundle(bundle, uri)

    def promote(
        self,
        name: str,
        version: int,
        why: str = "",
        leaky_too: bool = False,
        evidence: Evidence | None = None,
        untested: bool = False,
        decision: PolicyResult | None = None,
        key: Ed25519PrivateKey | None = None,
    ) -> tuple[Promotion, bool]:
        """Promote a version: `models://NAME` then resolves to it.

        Args:
            why: Reason, for the history.
            leaky_too: Whether a version trained on a leaky split is accepted.
            evidence: Comparison with the promoted version, for the history.
            untested: Whether to promote without evidence.
            decision: Decision of the model's policy, which is needed if it has one.
            key: Private key that signs the entry; None: it is not signed.

        Returns:
            The entry that promotes it, and whether the entry is new.

        Raises:
            UserError: The version was trained on a leaky split, the evidence is missing, negative or about
                another version, the policy's decision is missing, or another promotion came in between.
        """
        signing.check_key(key)
        entries = self._history(name).entries()
        last = next(reversed(entries.values()), None)
        spec = self.spec(name, version)
        if last and last.version == version:
            if key is None or (last.signature and last.signature.signer == signing.fingerprint(key)):
                return last, False
            if last.fingerprint not in (None, read_fingerprint(self.uri(name, version))):
                raise UserError(
                    f"{self.uri(name, version)} was changed after its promotion, so the evidence is of "
                    "another bundle; restore it from a backup"
                )
            return self._enter(
                name, entries, "promote", spec, version, why, last.evidence, last.policy, key
            ), True
        if spec.leaky and not leaky_too:
            raise UserError(
                f"{name}@{version} was trained on a leaky split, so its metrics are too optimistic; "
                "promote another version, or add --allow-leaky"
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
        policy = self.policy(name)
        if policy and (decision is None or decision.policy_sha256 != policy.sha256):
            raise UserError(
                f"{policy.uri} has not decided about {name}@{version}; run scalp models promote "
                f"{name}@{version} --data DIRECTORY"
            )
        return self._enter(name, entries, "promote", spec, version, why, evidence, decision, key), True

    def rollback(self, name: str, why: str = "", key: Ed25519PrivateKey | None = None) -> Promotion:
        """Promote the previously promoted version again; a second rollback goes one further back.

        Args:
            why: Reason, for the history.
            key: Private key that signs the entry; None: it is not signed.

        Raises:
            UserError: No version was promoted before, its promotion is not signed by one of `SCALP_SIGNERS`,
                or another promotion came in between.
        """
        signing.check_key(key)
        history = self._history(name)
        files = history.files()
        entries = history.parse(files)
        stack = stack_promoted(entries.values())
        if len(stack) < 2:
            current = f"{name}@{stack[0]}" if stack else "none"
            raise UserError(
                f"{name}: no version was promoted before the current one ({current}); choose one with "
                f"scalp models promote {name}@VERSION"
            )
        # Otherwise the key would sign a promotion of somebody else, or a bundle that has changed since.
        number = max(number for number, entry in entries.items() if entry.version == stack[-2])
        self._check_promotion(history, number, files[number], entries[number])
        spec = self.spec(name, stack[-2])
        return self._enter(name, entries, "rollback", spec, stack[-2], why, key=key)

    def _files(self, name: str) -> list[tuple[int, str]]:
        """List the number and file name of each file in the version folders, without temporary ones."""
        folder = storage.join(self.root, name, "versions")
        if storage.is_empty(folder):
            return []
        paths = (uri[len(folder) + 1 :].split("/") for uri in storage.list_files(folder))
        return [
            (int(path[0]), path[1])
            for path in paths
            if len(path) == 2 and path[0].isdecimal() and not TEMPORARY.match(path[1])
        ]

    def _claim(self, name: str, bundle: Bundle) -> int:
        """Return the version number of a bundle; claim the next number if it has none."""
        claim = Claim(
            fingerprint=bundle.spec.fingerprint,
            source=str(bundle.uri),
            who=current_user(),
            when=datetime.now(UTC),
        )
        numbers = taken_numbers(lambda: (number for number, _ in self._files(name)))
        last = max(numbers, default=0)
        for version in itertools.chain(numbers, itertools.count(last + 1)):
            uri = storage.join(self.uri(name, version), CLAIM_FILE)
            if version > last and storage.create(uri, to_json(claim)):
                return version
            if storage.exists(uri) and read_record(Claim, uri).fingerprint == claim.fingerprint:
                return version
        raise AssertionError("numbers do not end")

    def _history(self, name: str) -> History:
        return History(name, storage.join(self.root, name, "history"))

    def _check_promotion(self, history: History, number: int, data: bytes, promoted: Promotion) -> None:
        """Check the signature of an entry and its bundle, if `SCALP_SIGNERS` is set.

        Args:
            number: Number of the entry.
            data: Bytes that `promoted` was read from; a second read could see another entry.
        """
        uri = self.uri(history.name, promoted.version)
        if history.check_signature(number, data) and read_fingerprint(uri) != promoted.fingerprint:
            raise UserError(f"{uri} was changed after its promotion was signed; restore it from a backup")

    def _enter(
        self,
        name: str,
        entries: dict[int, Promotion],
        action: Literal["promote", "rollback"],
        spec: BundleSpec,
        version: int,
        why: str,
        evidence: Evidence | None = None,
        decision: PolicyResult | None = None,
        key: Ed25519PrivateKey | None = None,
    ) -> Promotion:
        """Append to the history, unless it has changed since `entries` were read."""
        entry = Promotion(
            action=action,
            version=version,
            model_version=spec.model_version,
            who=current_user(),
            when=datetime.now(UTC),
            why=why,
            evidence=evidence,
            policy=decision,
            reviews=spec.training.reviews,
            fingerprint=read_fingerprint(self.uri(name, version)),
        )
        return self._history(name).append(entry, max(entries, default=0), key)

    def _unknown_name(self, reference: str, name: str) -> UserError:
        known = self.names()
        if not known:
            return UserError(
                f"{reference}: {self.root} holds no models; add one with scalp models add RUN {name}"
            )
        fix = suggest(name, known, f"scalp models list --registry {self.root} prints all")
        return UserError(f"{reference}: {self.root} has no model {name!r}; {fix}")


def open_registry(root: str | None = None) -> Registry:
    """Open the registry at `root`, or at `SCALP_MODELS`.

    Raises:
        UserError: Neither is set.
    """
    location = root or os.environ.get(ENVIRONMENT)
    if not location:
        raise UserError(
            f"no model registry is named; set {ENVIRONMENT} to a folder or s3://BUCKET/PREFIX "
            "(scalp models also takes --registry)"
        )
    return Registry(storage.absolute(location))


def resolve(uri: str, root: str | None = None) -> str:
    """Resolve `models://…` to the URI of a bundle, in the registry at `root` or `SCALP_MODELS`.

    Any other URI is returned unchanged.

    Raises:
        UserError: As in `open_registry` and `Registry.find`.
    """
    if not uri.startswith(SCHEME):
        return uri
    registry = open_registry(root)
    return registry.uri(*registry.find(uri))


def pin_version(address: str, root: str | None = None) -> str:
    """Replace `models://NAME` by `models://NAME@VERSION` with the number that it now stands for.

    Raises:
        UserError: As in `resolve`.
    """
    name, version = open_registry(root).find(address)
    return f"{SCHEME}{name}@{version}"


def refuse_change(bundle: Bundle) -> None:
    """Reject a change to a version in a registry: versions are immutable.

    Raises:
        UserError: The bundle is a version in a registry.
    """
    if bundle.uri and storage.exists(storage.join(bundle.uri, CLAIM_FILE)):
        raise UserError(
            f"{bundle.uri} is a version in a registry, and those do not change; run this on the run's "
            "directory, then scalp models add RUN NAME for a new version"
        )


def copy_bundle(bundle: Bundle, to: str) -> bool:
    """Copy all files of a bundle, verified and one at a time in memory; the last one makes the copy visible.

    Returns:
        Whether this call made it visible, and not a concurrent one for the same bundle.

    Raises:
        UserError: A file is missing, damaged or changed.
    """
    uri, hashes = str(bundle.uri), bundle.spec.file_hashes
    others = storage.names_in(uri) - {SPEC_FILE, BOM_FILE, CLAIM_FILE, MARKER_FILE}
    for name in sorted(hashes.keys() | others):
        if name in hashes:
            storage.write(storage.join(to, name), read_file(uri, name, hashes[name]))
        else:  # the contract has no hash of this file, so the first copy stays
            storage.create(storage.join(to, name), storage.read(storage.join(uri, name)))
    # Made, not copied: older bundles have none, and a stopped `scalp quantize` may have left a later one.
    storage.create(storage.join(to, BOM_FILE), serialize_bom(bundle.spec))
    return storage.create(storage.join(to, SPEC_FILE), serialize_spec(bundle.spec))
