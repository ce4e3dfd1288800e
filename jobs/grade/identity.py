"""Identity of one output of `scalp grade`, in `run.json`: properties that all of its rows share.

The identity covers all that affects answers: weights, preprocessing, calibration, decision and graph of the
bundle; device, precision and runtime, resolved once; versions of scalp, of the runtime's library and of the
decoders. Other graphs in the bundle, and a later promotion, do not affect it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.common.console import SUMMARY_FILE, read_json, write_json
from jobs.common.inference import Computation, ModelOptions
from scalp_core import storage
from scalp_core.bundles import registry
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.contract import BundleSpec
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.grades import SYMPTOM_IDS
from scalp_core.inference.predictor import (
    Hardware,
    Precision,
    Runtime,
    check_machine,
    deciding_versions,
    needed_part,
)
from scalp_core.results.progress import IDENTITY_FILE
from scalp_core.storage import outputs

_SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Identity(Computation):
    """Identity of one output. On GPUs the runtime is `auto` until the images are counted, before any row.

    Args:
        answers: Fingerprints of the parts of the bundle that affect answers.
        sources: URIs of the graded sources, sorted.
        bundle: URI, or `models://NAME@VERSION`, that a resumed run loads.
        symptom: Symptom of the grades, one of `grades.SYMPTOM_IDS`.
    """

    model_version: str
    answers: dict[str, str]
    sources: list[str]
    bundle: str
    symptom: str = SYMPTOM_IDS[0]  # run.json of older versions lacks it

    @classmethod
    def of(
        cls, spec: BundleSpec, bundle: str, named: list[str], device: Hardware, model: ModelOptions
    ) -> Identity:
        """Make the identity of a new run, from a pinned bundle and resolved options."""
        return cls(
            model_version=spec.version_in(model.precision),
            answers=fingerprint_answers(spec, device, model.precision, model.runtime),
            sources=sorted(named),
            bundle=bundle,
            symptom=spec.symptom,
            device=device,
            precision=model.precision,
            runtime=model.runtime,
            versions=deciding_versions(model.runtime, device),
        )


def read(out: str) -> Identity | None:
    """Read the identity of an output; None if no run has started.

    Raises:
        UserError: Another version or command of scalp wrote the output.
    """
    content = read_json(storage.join(out, IDENTITY_FILE))
    if content and (version := content.pop("schema_version", None)) != _SCHEMA_VERSION:
        raise UserError(
            f"{out} was written by another version of scalp ({IDENTITY_FILE} has schema {version}, this one "
            f"reads {_SCHEMA_VERSION}); use that version, or choose another OUT"
        )
    outputs.check_claim(out, "grade")
    if not content and storage.exists(storage.join(out, SUMMARY_FILE)):
        raise UserError(f"{out} holds a summary.json that scalp grade did not write; choose another OUT")
    return Identity(**content) if content else None


def open_run(
    bundle: str, named: list[str], out: str, requested: ModelOptions
) -> tuple[Identity | None, str, Bundle]:
    """Check, without writing, that a run of these options may begin or resume in an output.

    Args:
        bundle: Bundle as the user gave it.
        named: Absolute sources.
        out: Absolute output directory.
        requested: Options of inference.

    Returns:
        The identity of the run in `out`, or None; the pinned address of the bundle; the bundle.

    Raises:
        UserError: Places overlap, the bundle does not exist, or `out` holds rows of another run.
    """
    outputs.check_places(named, out)
    known = read(out)
    pinned = pin_bundle(bundle, known)
    loaded = load_bundle(pinned)
    if known:
        check(out, known, loaded.spec, requested, named)
    return known, pinned, loaded


def write(out: str, identity: Identity) -> None:
    """Atomically write the identity of an output."""
    content: dict[str, Any] = {"schema_version": _SCHEMA_VERSION, **asdict(identity)}
    write_json(storage.join(out, IDENTITY_FILE), content)


def pin_bundle(bundle: str, known: Identity | None) -> str:
    """Pin the bundle: resolve `models://NAME` to the version that is promoted now.

    A run that started with `models://NAME` resumes with the version it started with, in `known`.

    Raises:
        UserError: The version does not exist.
    """
    if not bundle.startswith(registry.SCHEME):
        return storage.absolute(bundle)
    name, _, version = bundle.removeprefix(registry.SCHEME).partition("@")
    if known and version in ("", "latest") and known.bundle.startswith(f"{registry.SCHEME}{name}@"):
        return known.bundle
    name, number = registry.open_registry().find(bundle)
    return f"{registry.SCHEME}{name}@{number}"


def fingerprint_answers(
    spec: BundleSpec, device: Hardware, precision: Precision, runtime: Runtime
) -> dict[str, str]:
    """Fingerprints, by name, of the parts of a bundle that affect its answers."""
    names = {
        "weights_sha256", "architecture", "head", "grade_names", "preprocess", "temperature", "bias",
        "conformal", "referral", "gates",
    }  # fmt: skip
    # Without None, so that fields that a run's version did not have do not change the fingerprints.
    content = {"gates": None} | spec.model_dump(mode="json", include=names, exclude_none=True)
    part = needed_part(device, precision, runtime)
    if part != "weights" and (graph := spec.graphs.get(part)):
        content[f"{part} graph"] = [graph.xml_sha256, graph.weights_sha256]
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
        for name, value in content.items()
    }


def check(out: str, known: Identity, spec: BundleSpec, requested: ModelOptions, named: list[str]) -> None:
    """Refuse an output that holds rows of another bundle, device, precision, runtime, or other sources.

    Raises:
        UserError: It holds rows of another.
    """
    if sorted(named) != known.sources:
        raise _other(out, "sources", ", ".join(known.sources), ", ".join(sorted(named)))
    for name in ("device", "precision", "runtime"):
        held, wanted = getattr(known, name), getattr(requested, name)
        if "auto" not in (held, wanted) and wanted != held:
            raise _other(out, name, held, wanted)
    now = fingerprint_answers(spec, known.device, known.precision, known.runtime)
    differing = sorted(name for name in now | known.answers if now.get(name) != known.answers.get(name))
    if differing:
        held = f"{known.model_version} ({known.bundle})"
        version = spec.version_in(known.precision)
        raise _other(out, "bundle", held, f"{version}, which has another {', '.join(differing)}")


def resume_options(out: str, known: Identity, requested: ModelOptions) -> ModelOptions:
    """Options to resume a run: device, precision and runtime as in its identity.

    Raises:
        UserError: Packages that affect answers have other versions.
    """
    here = deciding_versions(known.runtime, known.device)
    if differing := [name for name, version in known.versions.items() if here.get(name) != version]:
        held = ", ".join(f"{name} {known.versions[name]}" for name in differing)
        present = ", ".join(f"{name} {here.get(name)}" for name in differing)
        raise UserError(
            f"{out} holds results of {held}, not {present}, whose answers may differ; install {held} to "
            "resume, or choose another OUT"
        )
    return replace(requested, device=known.device, precision=known.precision, runtime=known.runtime)


def make_checked(make_model: Callable[..., Any], identity: Identity, *arguments: Any) -> Any:
    """Make the model of an actor, on a machine that computes as the identity says.

    Raises:
        UserError: Precision or versions of this machine differ.
    """
    check_machine(identity.device, identity.precision, identity.versions)
    return make_model(*arguments)


def _other(out: str, name: str, held: str, requested: str) -> UserError:
    return UserError(f"{out} holds results of {name} {held}, not {requested}; choose another OUT")
