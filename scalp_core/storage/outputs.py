"""Output directories: the command that made one, the run that may write to it, and its scratch folder.

A command writes only into a directory that was empty or that the same command made before. It removes only a
folder that carries scalp's marker.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.storage import lease
from scalp_core.storage.uris import check_disjoint

MARKER_FILE = "scalp.json"
SCRATCH_FOLDER = ".scalp-work"
SCRATCH_MARKER = ".scalp-scratch"
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Output:
    """An output directory that this run holds; workers check with `guard` that it still does."""

    uri: str
    guard: lease.Guard

    @property
    def scratch(self) -> str:
        """The scratch folder, created if it is missing."""
        return scratch(self.uri)

    def check(self) -> None:
        """Raise a `UserError` if another run took over."""
        self.guard.check()

    def remove_scratch(self) -> None:
        """Remove the scratch folder, unless another run took over."""
        self.check()
        remove_scratch(self.uri)


@contextmanager
def open_output(out: str, kind: str, inputs: Sequence[str] = ()) -> Iterator[Output]:
    """Claim an output directory and hold its lease while the block runs.

    Args:
        out: Directory, local or `s3://`; created if it is missing.
        kind: Command that makes it.
        inputs: Sources of the command (`check_places`).

    Raises:
        UserError: it holds other files, another run uses it, or it overlaps with a source.
    """
    out = storage.absolute(out)
    check_output(out, kind, inputs)
    claim_output(out, kind)
    with hold_output(out, kind) as output:
        yield output


@contextmanager
def hold_output(out: str, verb: str) -> Iterator[Output]:
    """Hold the lease of a directory while the block changes its files; any command may have made it.

    Raises:
        UserError: another run uses it.
    """
    with lease.hold(out, verb) as guard:
        for folder in (out, storage.join(out, lease.FOLDER)):
            storage.remove_temporary(folder)
        yield Output(out, guard)


def check_output(out: str, kind: str, inputs: Sequence[str] = ()) -> None:
    """Check, without writing, that `open_output` would succeed; a command that begins with it fails early.

    Raises:
        UserError: the directory holds other files, or overlaps with a source.
    """
    check_places(inputs, out)
    check_claim(out, kind)


def check_places(inputs: Sequence[str], out: str) -> None:
    """Refuse sources that overlap with each other or with the output directory, in either direction.

    Raises:
        UserError: two places overlap; the message names both.
    """
    out = storage.absolute(out)
    check_disjoint(inputs)
    for given in inputs:
        source = storage.absolute(given)
        if source == out:
            raise UserError(f"{given} is both a source and OUT; choose another output directory")
        if _is_inside(out, source):
            raise UserError(f"OUT {out} is in the source {given}; choose an output directory outside of it")
        if _is_inside(source, out):
            raise UserError(
                f"the source {given} is in OUT {out}; choose an output directory that does not hold it"
            )


def check_claim(out: str, kind: str) -> None:
    """Check, without writing, that `claim_output` would succeed.

    Raises:
        UserError: it is a file, not empty, or made by another command.
    """
    out = storage.absolute(out)
    if not storage.is_s3(out) and Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"OUT {out} is a file; choose another output directory")
    made_by = kind_of(out)
    if made_by is None and not storage.is_empty(out):
        made_by = kind_of(out)  # another run may have marked it meanwhile
        if made_by is None:
            raise UserError(
                f"OUT {out} is not empty (it holds {_example_names(out)}) and was not made by scalp {kind}; "
                "choose a new or an empty output directory"
            )
    if made_by not in (None, kind):
        raise UserError(f"OUT {out} holds results of scalp {made_by}, not {kind}; choose another directory")


def claim_output(out: str, kind: str) -> None:
    """Mark an output directory as made by a command; no change if it is already.

    Raises:
        UserError: as for `check_claim`.
    """
    out = storage.absolute(out)
    check_claim(out, kind)
    if kind_of(out) is None:
        marker = {
            "made_by": f"scalp {kind}",
            "kind": kind,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if not storage.create(storage.join(out, MARKER_FILE), json.dumps(marker, indent=2).encode()):
            check_claim(out, kind)  # another run made it at the same time


def kind_of(out: str) -> str | None:
    """Return the command that made a directory; None without a marker."""
    try:
        with storage.rename_errors(out):
            marker = storage.read_json(storage.join(storage.absolute(out), MARKER_FILE))
        return str(marker["kind"]) if marker else None
    except (ValueError, KeyError, TypeError):
        return None


def scratch(out: str) -> str:
    """Return the scratch folder of an output directory; create it with its marker if it is missing.

    Raises:
        UserError: a folder of this name exists without the marker.
    """
    folder = storage.join(storage.absolute(out), SCRATCH_FOLDER)
    marker = storage.join(folder, SCRATCH_MARKER)
    if not storage.exists(marker):
        if not storage.is_empty(folder):
            raise UserError(f"{folder} was not made by scalp: it has no {SCRATCH_MARKER}; move it away")
        storage.write(marker, b"A folder of scalp for its run in progress; removed at the end.\n")
    return folder


def has_scratch(out: str) -> bool:
    """Whether a run that did not end left its scratch folder."""
    return storage.exists(storage.join(storage.absolute(out), SCRATCH_FOLDER))


def remove_scratch(out: str) -> None:
    """Remove the scratch folder of an output directory if it has scalp's marker."""
    folder = storage.join(storage.absolute(out), SCRATCH_FOLDER)
    if storage.exists(storage.join(folder, SCRATCH_MARKER)):
        storage.remove_folder(folder, last=SCRATCH_MARKER)
    elif not storage.is_s3(folder) and Path(folder).is_dir() and storage.is_empty(folder):
        storage.remove_folder(folder)  # killed between the marker and the folder


def _is_inside(inner: str, outer: str) -> bool:
    return inner.startswith(f"{outer}/") or outer == "/"


def _example_names(out: str) -> str:
    names = (
        name
        for files, folders in storage.list_children(out)
        for name in (
            *(file.uri.rsplit("/", 1)[-1] for file in files),
            *(f"{folder.rsplit('/', 1)[-1]}/" for folder in folders),
        )
    )
    listed = list(islice(names, _NAMES_SHOWN + 1))
    return ", ".join(listed[:_NAMES_SHOWN]) + (", …" if len(listed) > _NAMES_SHOWN else "")
