"""`scalp improve`: one round of the loop: new labels, next version, comparison, registry, promotion.

Each step is the function of a command, with an output below OUT: `data` (prepare), `train/NAME` (train) and
`evaluation` (evaluate). A stopped round resumes as these commands do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from jobs.common.console import SUMMARY_FILE, console, now, read_json, write_json
from jobs.common.executor import Executor
from jobs.common.inference import ModelOptions
from jobs.data.prepare import prepare
from jobs.evaluate.comparison import evaluate_models
from jobs.models.driver import add, promote
from jobs.train.driver import train
from scalp_core import storage
from scalp_core.bundles import signing
from scalp_core.bundles.contract import BundleSpec
from scalp_core.bundles.registry import SCHEME, Registry, open_registry, pin_version
from scalp_core.curation.audit import Options
from scalp_core.datasets import manifest, reviewed
from scalp_core.datasets.manifest import DataSpec
from scalp_core.errors import UserError
from scalp_core.evaluation.noninferiority import MAX_DROP
from scalp_core.evaluation.paired import METRICS
from scalp_core.inference.predictor import Device
from scalp_core.labels.decisions import Answers, Conflicts
from scalp_core.labels.log import is_label_log, read_labels
from scalp_core.models.recipe import recipe_of_bundle
from scalp_core.storage import outputs

KIND = "improve"

_IDENTITY_FILE = "run.json"
_BOUGHT = ("qwk", "referred", "wrong_among_answered")


@dataclass(frozen=True)
class RoundOptions:
    """Options of a round.

    Args:
        overrides: `key=value` settings that differ from the recipe of the promoted version.
        workers: As in `train`.
        device: Device of training and evaluation.
        blind_only: Leave out answers given while the reader saw the answer of the model.
        conflicts: Treatment of images on which readers differ, as in `prepare`.
        promote: Whether to promote the new version.
        max_drop: As in `models.driver.promote`.
        why: Reason of the promotion, for the history.
        key: File of the private key that signs the promotion.
    """

    overrides: tuple[str, ...] = ()
    workers: tuple[int, int] | None = None
    device: Device = "auto"
    blind_only: bool = False
    promote: bool = False
    max_drop: float = MAX_DROP
    why: str = ""
    conflicts: Conflicts = "adjudicate"
    key: str | None = None


def improve(
    model: str,
    labels: str,
    data: str,
    out: str,
    options: RoundOptions = RoundOptions(),
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Train the next version of a model on new labels, and compare it with the promoted one.

    Args:
        model: `models://NAME`, of which a version is promoted.
        labels: Label log of `scalp review`, local or `s3://`.
        data: Directory that `scalp prepare` wrote, usually that of the promoted version. Both versions are
            compared on its test split.
        out: Output directory of the round.
        options: Options of the round.
        executor: Runs preparation and evaluation; default: Ray.

    Returns:
        The summary, also written to `out/summary.json`: versions, labels, and the paired differences.

    Raises:
        UserError: An input is wrong, which is reported before a step starts; or as in the commands.
    """
    if not options.promote and (options.key or options.why):
        raise UserError("--key and --why are for the history of promotions; add --promote, or omit them")
    labels, data, out = (storage.absolute(place) for place in (labels, data, out))
    outputs.check_output(out, KIND, [labels, data])
    store = open_registry()
    known = read_json(storage.join(out, _IDENTITY_FILE))
    before = known["model"] if known else pin_version(model)
    if known and store.find(before)[0] != store.find(model)[0]:
        raise UserError(f"{out} holds a round of {before}, not of {model}; choose another OUT")
    name, version = store.find(before)
    recipe = recipe_of_bundle(before, list(options.overrides))
    spec = manifest.read_spec(data)
    identity = {
        "model": before,
        "labels": labels,
        "data_sha256": spec.sha256,
        "blind_only": options.blind_only,
        # None, so that rounds of earlier versions are recognized.
        "conflicts": None if options.conflicts == "adjudicate" else options.conflicts,
        "recipe": recipe.model_dump(mode="json"),
    }
    if known and (changed := [key for key in identity if known.get(key) != identity[key]]):
        raise UserError(f"{out} holds a round with another {', '.join(changed)}; choose another OUT")
    extended = storage.join(out, "data")
    if not known:
        _check_labels(labels, data, options)
    _check_policy(store, name, data, spec, options)
    note = _check_seen(store.spec(name, version), spec, before, data)
    with outputs.open_output(out, KIND, [labels, data]):
        write_json(storage.join(out, _IDENTITY_FILE), identity)
        if note:
            console.print(note)
        _step(f"labels of {labels}")
        prepare(
            labels,
            extended,
            Options(extend=data),
            blind_only=options.blind_only,
            conflicts=options.conflicts,
            executor=executor,
        )
        _step(f"training after {before}")
        run = storage.join(out, "train", name)
        train(extended, run, recipe, options.workers, options.device)
        _step(f"comparison with {before}")
        comparison = _compare([before, run], extended, storage.join(out, "evaluation"), options, executor)
        _step("registry")
        added = f"{name}@{add(run, name)}"
        summary = {
            "kind": KIND,
            "date": now(),
            "before": before,
            "after": f"{SCHEME}{added}",
            "reviews": [record.model_dump() for record in manifest.read_spec(extended).reviews],
            "comparison": comparison,
        }
        write_json(storage.join(out, SUMMARY_FILE), summary)
        _show(summary)
        if options.promote:
            why = options.why or f"scalp improve with the answers in {labels}"
            promote(
                added,
                data=data,
                max_drop=options.max_drop,
                why=why,
                key=options.key,
                device=options.device,
                executor=executor,
            )
        else:
            console.print(f"to promote it: scalp models promote {added} --data {data} --why …")
    return summary


def _step(title: str) -> None:
    console.rule(Text(title, "bold"), align="left")


def _check_labels(labels: str, data: str, options: RoundOptions) -> None:
    """Check that the log labels an image that is not in the data.

    Raises:
        UserError: It does not, or is not a label log.
    """
    if not is_label_log(labels):
        raise UserError(f"{labels} is not a label log; give LABELS of scalp review GRADED LABELS")
    images = set(manifest.read_manifest(data)["sha256"].to_pylist())
    answers = Answers(read_labels(labels), options.blind_only, options.conflicts)
    rows = list(reviewed.read_rows(answers, images))
    if not any(row["code"] is None for row in rows):
        raise UserError(
            f"{labels} labels no image that is not in {data} ({len(rows)} images were reviewed); review more "
            "images, or decide between readers with scalp review --adjudicate"
        )


def _check_policy(store: Registry, name: str, data: str, spec: DataSpec, options: RoundOptions) -> None:
    """Check that the model's policy, if it has one, accepts the data, and that the key may promote."""
    policy = store.policy(name)
    if policy and options.promote:
        policy.check_data(data, spec.sha256)
    if options.promote:
        signing.check_key(signing.load_key(options.key) if options.key else None)


def _check_seen(before: BundleSpec, data: DataSpec, name: str, uri: str) -> str | None:
    """Note if the promoted version may have learned from images of the test split."""
    # Data that extends other data has its test split.
    if {before.training.data_sha256, *before.training.extends} & {data.sha256, *data.extends}:
        return None
    return (
        f"{name} was trained with other data than {uri}; if it learned from images of its test split, the "
        "comparison favors it"
    )


def _compare(
    bundles: list[str], data: str, out: str, options: RoundOptions, executor: Executor | None
) -> dict[str, Any]:
    """Compare the versions on the test split; a finished comparison is reused."""
    summary = read_json(storage.join(out, SUMMARY_FILE))
    if summary is None:
        summary = evaluate_models(
            bundles, data, out, "test", ModelOptions(options.device), executor, probe=False
        )
    comparison: dict[str, Any] = summary["comparison"]
    return comparison


def _show(summary: dict[str, Any]) -> None:
    """Print what the round bought: metrics before and after, with the interval of the difference."""
    comparison, (*_, reviews) = summary["comparison"], summary["reviews"]
    title = (
        f"before and after {reviews['answers']:,} answers, which label {reviews['images']:,} new images\n"
        f"{comparison['images']:,} test images, {comparison['groups']} groups"
    )
    table = Table(
        "", summary["before"], summary["after"], "difference", "95 %", title=title, title_justify="left"
    )
    for metric in _BOUGHT:
        value = comparison["differences"][0][metric]
        table.add_row(
            METRICS[metric],
            *("-" if value[key] is None else f"{value[key]:.3f}" for key in ("first", "second")),
            "-" if value["difference"] is None else f"{value['difference']:+.3f}",
            "-" if value["low"] is None else f"{value['low']:+.3f} to {value['high']:+.3f}",
        )
    console.print(table)
