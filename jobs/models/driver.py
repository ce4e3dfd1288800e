"""`scalp models`: list, add, promote, roll back and pull versions of the model registry."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.table import Table

from jobs.common.console import console, show
from scalp_core import storage
from scalp_core.bundles import signing
from scalp_core.bundles.bundle import SPEC_FILE, open_bundle, read_spec
from scalp_core.bundles.ml_bom import make_ml_bom
from scalp_core.bundles.registry import (
    SCHEME,
    Registry,
    copy_bundle,
    open_registry,
    resolve,
)
from scalp_core.bundles.registry_records import Evidence, Promotion
from scalp_core.errors import UserError
from scalp_core.evaluation.noninferiority import MAX_DROP
from scalp_core.evaluation.promotion_policy import PolicyResult
from scalp_core.storage import lease, outputs

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from jobs.common.executor import Executor
    from scalp_core.inference.predictor import Device  # imports OpenVINO

PULL = "models pull"


def list_models(name: str | None = None, registry: str | None = None) -> list[dict[str, Any]]:
    """Print one row per version of one model, or of all.

    Returns:
        The rows; without an entry: null, or an empty list.

    Raises:
        UserError: The model does not exist, or no registry is set.
    """
    store = open_registry(registry)
    names = [store.find_name(name)] if name else store.names()
    if not names:
        console.print(f"{store.root} holds no models; add one with scalp models add RUN NAME")
        return []
    return _show(store, {model: store.versions(model) for model in names})


def add(run: str, name: str, registry: str | None = None) -> int:
    """Copy the bundle of a run into the registry, and return its version.

    Raises:
        UserError: As in `Registry.add`.
    """
    store = open_registry(registry)
    version, new = store.add(run, name)
    if not new:
        console.print(f"{run} is already {name}@{version}: the same weights and contract; nothing was added")
    _show(store, {name: [version]})
    return version


def promote(
    model: str,
    *,
    data: str | None = None,
    max_drop: float = MAX_DROP,
    untested: bool = False,
    why: str = "",
    leaky_too: bool = False,
    key: str | None = None,
    device: Device = "auto",
    registry: str | None = None,
    executor: Executor | None = None,
) -> Promotion:
    """Promote `NAME@VERSION`, to which `models://NAME` then resolves, unless it may be inferior.

    It is compared with the promoted version, if there is one.

    Args:
        model: `NAME@VERSION`, with or without `models://`.
        data: Directory that `scalp prepare` wrote, whose test split both versions grade.
        max_drop: Largest acceptable upper bound of the loss of kappa and of coverage.
        untested: Whether to promote without a comparison; requires `why`.
        leaky_too: Whether a version trained on a leaky split is accepted.
        key: File of the private key that signs the entry; None: it is not signed.
        device: Device of both models.
        executor: Runs both models; default: Ray.

    Raises:
        UserError: No version in `model`, no data for the comparison with the promoted version or for the
            model's policy, a rule of the policy fails, or as in `Registry.find` and `Registry.promote`.
    """
    if untested and not why:
        raise UserError("--untested needs --why; the history records the reason")
    private_key = _load_key(key)
    store = open_registry(registry)
    if "@" not in model:
        raise UserError(f"{model} has no version; write {model.removeprefix(SCHEME)}@VERSION or @latest")
    name, version = store.find(model)
    current = store.current(name)
    evidence, decision = None, None
    if not (current and current.version == version):
        evidence, decision = _assess(
            store, name, version, current, data, max_drop, untested, device, executor
        )
    entry, new = store.promote(name, version, why, leaky_too, evidence, untested, decision, private_key)
    if not new:
        console.print(
            f"{name}@{version} is already promoted, since {entry.when:%Y-%m-%d %H:%M}; nothing changed"
        )
    if new and evidence:
        _show_evidence(evidence)
    if new and decision:
        show("promotion.yaml", {f"line {result.line}": str(result) for result in decision.results})
    _show(store, {name: [version]})
    return entry


def _assess(
    store: Registry,
    name: str,
    version: int,
    current: Promotion | None,
    data: str | None,
    max_drop: float,
    untested: bool,
    device: Device,
    executor: Executor | None,
) -> tuple[Evidence | None, PolicyResult | None]:
    """Assess a version as `assess_version` does, if there is something to compare it with, or a policy."""
    policy = store.policy(name)
    if policy:
        if untested or data is None:
            raise UserError(
                f"{policy.uri} must decide about {name}@{version}; add --data DIRECTORY with data that it "
                f"lists{', without --untested' * untested}"
            )
    elif current is None or untested:
        return None, None
    elif data is None:
        raise UserError(
            f"{name}@{current.version} is promoted, and {name}@{version} was not compared with it; "
            "add --data DIRECTORY with labeled images (of scalp prepare), or --untested"
        )
    from jobs.common.inference import ModelOptions  # imports OpenVINO
    from jobs.models.promotion import assess_version

    promoted = current.version if current else None
    return assess_version(
        store, name, version, promoted, data, max_drop, policy, ModelOptions(device), executor
    )


def _show_evidence(evidence: Evidence) -> None:
    comparison = evidence.comparison
    show(
        "compared with the promoted version",
        {
            "promoted": f"{evidence.against} ({evidence.against_model})",
            "images": f"{comparison.images:,} in {comparison.groups} groups, test split of {evidence.data}",
            **comparison.losses,
        },
    )
    if not evidence.same_data:
        console.print(
            "the version was trained with other data; hashes do not show whether those contained these images"
        )


def _load_key(path: str | None) -> Ed25519PrivateKey | None:
    """Load the key that signs, and check that it counts, before the models are compared."""
    key = signing.load_key(path) if path else None
    signing.check_key(key)
    return key


def rollback(name: str, why: str = "", registry: str | None = None, key: str | None = None) -> Promotion:
    """Promote the previously promoted version again; `key` as in `promote`.

    Raises:
        UserError: As in `Registry.find` and `Registry.rollback`.
    """
    store = open_registry(registry)
    name = store.find_name(name)
    entry = store.rollback(name, why, _load_key(key))
    _show(store, {name: [entry.version]})
    return entry


def make_bom(model: str, registry: str | None = None) -> dict[str, Any]:
    """Make the bill of materials of a bundle, from its contract.

    Args:
        model: Bundle, local or `s3://`, or `models://NAME[@VERSION]`.

    Raises:
        UserError: As in `open_bundle`.
    """
    return make_ml_bom(open_bundle(resolve(model, registry)).spec)


def pull(model: str, out: str, registry: str | None = None) -> None:
    """Copy a bundle to another place, verified by its hashes; the same again changes nothing.

    Args:
        model: Bundle, local or `s3://`, or `models://NAME[@VERSION]`.

    Raises:
        UserError: A file of the bundle is missing or damaged, or `out` holds other files or another bundle,
            overlaps with the bundle, or is in use.
    """
    out = storage.absolute(out)
    outputs.check_output(out, PULL, [] if model.startswith(SCHEME) else [model])
    bundle = open_bundle(resolve(model, registry))
    with outputs.open_output(out, PULL, [str(bundle.uri)]) as output:
        is_whole = storage.exists(storage.join(out, SPEC_FILE))
        if is_whole and read_spec(out).fingerprint != bundle.spec.fingerprint:
            raise UserError(f"OUT {out} holds another bundle; choose a new or an empty directory")
        if not is_whole:
            with console.status(f"copying {bundle.uri}"):
                copy_bundle(bundle, out)
    lease.remove(output.guard)  # it names this machine, and a bundle is handed on
    show("models pull", {"model": bundle.spec.model_version, "from": bundle.uri, "folder": out})


def _show(store: Registry, versions: dict[str, list[int]]) -> list[dict[str, Any]]:
    """Print and return one row per version, by model."""
    rows = []
    for name, numbers in versions.items():
        current = store.current(name)
        for version in numbers:
            promoted = None
            if current and current.version == version:
                promoted = {
                    "at": current.when.isoformat(timespec="seconds"),
                    "by": current.who,
                    "signer": current.signature and current.signature.signer,
                }
            rows.append(
                {"model": f"{name}@{version}"} | _facts(store, name, version) | {"promoted": promoted}
            )
    table = Table(title=store.root, title_justify="left")
    for heading in ("model", "model version", "created", "val QWK", "warnings", "promoted"):
        # Nothing is cut on a narrow terminal.
        table.add_column(heading, overflow="fold", no_wrap=heading.startswith("model"))
    for row in rows:
        kappa, promoted = row["validation_kappa"], row["promoted"]
        table.add_row(
            row["model"],
            row["error"] or row["model_version"],
            _minutes(row["created"]),
            "" if kappa is None else f"{kappa:.3f}",
            ", ".join(row["warnings"]),
            f"{_minutes(promoted['at'])} by {promoted['by']}" if promoted else "",
        )
    console.print(table)
    return rows


def _minutes(time: str | None) -> str:
    return f"{datetime.fromisoformat(time):%Y-%m-%d %H:%M}" if time else ""


def _facts(store: Registry, name: str, version: int) -> dict[str, Any]:
    """Model version, creation time, validation kappa, warnings and graphs of a version; or its error."""
    facts: dict[str, Any] = {
        "model_version": None, "created": None, "validation_kappa": None, "warnings": [], "graphs": [],
        "error": None,
    }  # fmt: skip
    try:
        spec = store.spec(name, version)
    except UserError as error:
        if storage.is_transient(error):
            raise
        return facts | {"error": str(error)}  # an unreadable version must not hide the others
    warnings = {"LEAKY": spec.leaky, "SYNTHETIC": spec.training.synthetic}
    return facts | {
        "model_version": spec.model_version,
        "created": spec.created_at.isoformat(timespec="seconds"),
        "validation_kappa": spec.metrics.get("val", {}).get("qwk"),
        "warnings": [warning for warning, applies in warnings.items() if applies],
        "graphs": sorted(spec.graphs),
    }
