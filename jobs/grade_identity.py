"""What all rows of one output of `scalp grade` have in common: `run.json`.

Compared is what changes answers: the weights, preprocessing, calibration and decision of the bundle, and the
precision. A graph that is added to a bundle, or another promoted version, does not lock an output.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from jobs.console import SUMMARY_FILE, read_json, write_json
from scalp_core import outputs, registry, storage
from scalp_core.bundle import BundleSpec
from scalp_core.errors import UserError
from scalp_core.predictor import Precision
from scalp_core.progress import IDENTITY_FILE

_SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Identity:
    """Of one output.

    Args:
        model_version: signs the rows.
        answers: fingerprint of what changes answers.
        precision: of the forward pass, resolved.
        sources: that are graded, sorted.
        bundle: uri, or `models://NAME@VERSION`, that is loaded again to resume.
        device: that the first session ran on.
        runtime: that the first session ran.
    """

    model_version: str
    answers: str
    precision: Precision
    sources: list[str]
    bundle: str
    device: str
    runtime: str


def read(out: str) -> Identity | None:
    """The identity of an output; None where no run has begun.

    Raises:
        UserError: another version of scalp wrote it, or it is something else.
    """
    content = read_json(storage.join(out, IDENTITY_FILE))
    if content is None:
        outputs.check_claim(out, "grade")
        if storage.exists(storage.join(out, SUMMARY_FILE)):
            raise UserError(f"{out} holds something else than results of scalp grade; choose another OUT")
        return None
    version = content.pop("schema_version", None)
    if version != _SCHEMA_VERSION:
        raise UserError(
            f"{out} was written by another version of scalp ({IDENTITY_FILE} has schema {version}, this one "
            f"reads {_SCHEMA_VERSION}); use that version, or choose another OUT"
        )
    outputs.check_claim(out, "grade")
    return Identity(**content)


def write(out: str, identity: Identity) -> None:
    """Bind an output to what it grades, and with what."""
    content: dict[str, Any] = {"schema_version": _SCHEMA_VERSION, **asdict(identity)}
    write_json(storage.join(out, IDENTITY_FILE), content)


def pinned(bundle: str, known: Identity | None) -> str:
    """The bundle by a name that stays the same: of `models://NAME` the version that is promoted now.

    A run that began with `models://NAME` resumes with the version it began with.

    Args:
        bundle: as the user named it.
        known: identity of the output.

    Raises:
        UserError: there is no such version.
    """
    if not bundle.startswith(registry.SCHEME):
        return storage.absolute(bundle)
    name, _, version = bundle.removeprefix(registry.SCHEME).partition("@")
    if known and version in ("", "latest") and known.bundle.startswith(f"{registry.SCHEME}{name}@"):
        return known.bundle
    found, number = registry.open_registry().find(bundle)
    return f"{registry.SCHEME}{found}@{number}"


def answers(spec: BundleSpec, precision: Precision) -> str:
    """Fingerprint of what in a bundle changes its answers."""
    names = {
        "weights_sha256", "architecture", "head", "grade_names", "preprocess", "temperature", "conformal",
        "referral", "gates",
    }  # fmt: skip
    content = spec.model_dump(mode="json", include=names)
    if precision == "int8" and (graph := spec.graphs.get("int8")):
        content["int8"] = graph.weights_sha256
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check(out: str, known: Identity, spec: BundleSpec, asked: Precision, named: list[str]) -> None:
    """Refuse to mix: one output belongs to one bundle, one precision and the same sources.

    Raises:
        UserError: it holds results of others.
    """
    if sorted(named) != known.sources:
        raise _other(out, "sources", ", ".join(known.sources), ", ".join(sorted(named)))
    if asked not in ("auto", known.precision):
        raise _other(out, "precision", known.precision, asked)
    if answers(spec, known.precision) != known.answers:
        names = f"{known.model_version} ({known.bundle})", spec.version_in(known.precision)
        raise _other(out, "bundle", *names)


def _other(out: str, name: str, held: str, asked: str) -> UserError:
    return UserError(f"{out} holds results of {name} {held}, not {asked}; choose another OUT")
