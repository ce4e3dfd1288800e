"""What all rows of one output of `scalp grade` have in common: `run.json`.

Compared is what changes answers: the weights, preprocessing, calibration, decision and graph of the bundle;
the device, precision and runtime, resolved once; and, before more is graded, the versions of scalp, of the
runtime's library and of the decoders. Another graph in the bundle, or another promotion, changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.common.console import SUMMARY_FILE, read_json, write_json
from jobs.common.inference import ModelOptions
from scalp_core import storage
from scalp_core.bundles import registry
from scalp_core.bundles.bundle import BundleSpec
from scalp_core.errors import UserError
from scalp_core.inference.predictor import (
    Hardware,
    Precision,
    Runtime,
    check_machine,
    computed_by,
    deciding_versions,
    needed_part,
)
from scalp_core.results.progress import IDENTITY_FILE
from scalp_core.storage import outputs

_SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Identity:
    """Of one output.

    Args:
        model_version: signs the rows.
        answers: fingerprints of the parts of the bundle that change answers.
        sources: that are graded, sorted.
        bundle: uri, or `models://NAME@VERSION`, that is loaded again to resume.
        device: that all models run on.
        precision: of all forward passes, resolved.
        runtime: of all models; `auto` on GPUs until the images are counted, before any is graded.
        versions: of the packages that decide answers.
    """

    model_version: str
    answers: dict[str, str]
    sources: list[str]
    bundle: str
    device: Hardware
    precision: Precision
    runtime: Runtime
    versions: dict[str, str]

    @classmethod
    def of(
        cls, spec: BundleSpec, bundle: str, named: list[str], device: Hardware, model: ModelOptions
    ) -> Identity:
        """That of a run which begins now.

        Args:
            spec: the bundle's contract.
            bundle: `pinned`.
            named: the sources.
            device: that was planned.
            model: resolved.
        """
        return cls(
            model_version=spec.version_in(model.precision),
            answers=answers(spec, device, model.precision, model.runtime),
            sources=sorted(named),
            bundle=bundle,
            device=device,
            precision=model.precision,
            runtime=model.runtime,
            versions=deciding_versions(model.runtime, device),
        )

    @property
    def computed_by(self) -> str:
        """Device, precision, runtime and versions that computed its rows, in one line."""
        return computed_by(self.device, self.precision, self.runtime, self.versions)


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


def answers(spec: BundleSpec, device: Hardware, precision: Precision, runtime: Runtime) -> dict[str, str]:
    """Fingerprints, by name, of the parts of a bundle that change its answers."""
    names = {
        "weights_sha256", "architecture", "head", "grade_names", "preprocess", "temperature", "conformal",
        "referral", "gates",
    }  # fmt: skip
    content = spec.model_dump(mode="json", include=names)
    part = needed_part(device, precision, runtime)
    if part != "weights" and (graph := spec.graphs.get(part)):
        content[f"{part} graph"] = [graph.xml_sha256, graph.weights_sha256]
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for name, value in content.items()
    }


def check(out: str, known: Identity, spec: BundleSpec, asked: ModelOptions, named: list[str]) -> None:
    """Refuse to mix: one output belongs to one bundle, device, precision, runtime, and the same sources.

    Raises:
        UserError: it holds results of others.
    """
    if sorted(named) != known.sources:
        raise _other(out, "sources", ", ".join(known.sources), ", ".join(sorted(named)))
    for name in ("device", "precision", "runtime"):
        held, wanted = getattr(known, name), getattr(asked, name)
        if "auto" not in (held, wanted) and wanted != held:
            raise _other(out, name, held, wanted)
    now = answers(spec, known.device, known.precision, known.runtime)
    differing = sorted(name for name in now | known.answers if now.get(name) != known.answers.get(name))
    if differing:
        held = f"{known.model_version} ({known.bundle})"
        version = spec.version_in(known.precision)
        raise _other(out, "bundle", held, f"{version}, which has another {', '.join(differing)}")


def resumed(out: str, known: Identity, asked: ModelOptions) -> ModelOptions:
    """How to grade more of an output: on the device, in the precision and by the runtime that it began with.

    Raises:
        UserError: the packages that decide answers are of other versions.
    """
    here = deciding_versions(known.runtime, known.device)
    if here != known.versions:
        held, found = (
            ", ".join(
                f"{name} {versions[name]}" for name in versions if here.get(name) != known.versions[name]
            )
            for versions in (known.versions, here)
        )
        raise UserError(
            f"{out} holds results of {held}, not {found}, whose answers may differ; install {held} to go on, "
            "or choose another OUT"
        )
    return replace(asked, device=known.device, precision=known.precision, runtime=known.runtime)


def make_checked(make_model: Callable[..., Any], identity: Identity, *arguments: Any) -> Any:
    """The model of an actor, on a machine that computes as the run does.

    Raises:
        UserError: this one would answer otherwise.
    """
    check_machine(identity.device, identity.precision, identity.versions)
    return make_model(*arguments)


def _other(out: str, name: str, held: str, asked: str) -> UserError:
    return UserError(f"{out} holds results of {name} {held}, not {asked}; choose another OUT")
