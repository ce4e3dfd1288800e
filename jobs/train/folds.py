"""`scalp train --folds N`: cross-validation, and one bundle that learns from the models of all folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.local import connect
from jobs.common.console import SUMMARY_FILE, console, now, read_json, show, write_json
from jobs.common.executor import Executor
from jobs.common.inference import ModelOptions
from jobs.evaluate.comparison import show_differences
from jobs.evaluate.ensemble import STUDENT, compare_with_ensemble
from jobs.evaluate.out_of_fold import as_answers, load_answers
from jobs.train.driver import Shared, check_identity, fits_here, identify, train
from jobs.train.scaling import plan_side_by_side, wait_for_workers, worker_range
from jobs.train.student import make_student_bundle, train_student
from jobs.train.tracking import Tracking
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.contract import BundleSpec
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.datasets.manifest import DataSpec
from scalp_core.errors import UserError
from scalp_core.evaluation import bootstrap, metrics, paired
from scalp_core.evaluation.label_errors import OUT_OF_FOLD_FILE
from scalp_core.evaluation.targets import Target, parse_targets
from scalp_core.inference.out_of_fold import Promises, cross_validate, fit_decision_out_of_fold
from scalp_core.inference.predictor import Device
from scalp_core.models.recipe import Recipe
from scalp_core.storage import outputs, parquet

KIND = "train --folds"
_SHOWN = ("coverage", "referred", "wrong_among_answered")  # of the cross-validated decision

Workers = tuple[int, int] | int | None


def train_folds(
    data: str,
    run: str,
    recipe: Recipe,
    folds: int,
    workers: Workers = None,
    device: Device = "auto",
    tracking: Tracking = "tensorboard",
    executor: Executor | None = None,
    local: bool | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train a model per fold, and a student that learns from their out-of-fold answers.

    As many folds as the cluster holds train in parallel; in one process they train one after another. A
    stopped run resumes: finished folds stay. No model is trained on images of the split val, by which the
    student is calibrated.

    Args:
        data: Directory that `scalp prepare --folds` wrote.
        run: Output directory: `bundle`, the student with a decision that is fitted on all out-of-fold
            answers; the run directories `fold-0`, … and `student`; `out_of_fold.parquet` with the logits of
            each image from the bundle that was not trained on it, and its probabilities by the calibration of
            the other folds; `summary.json`.
        recipe: Training recipe.
        folds: Number of folds of the data.
        workers: Workers of each training, as in `train`; None: trainings divide the GPUs.
        device: As in `train`.
        tracking: As in `train`.
        executor: Runs the inference of the trained models; default: `default_executor`.
        local: As in `train`.
        progress: As in `train`.

    Returns:
        The summary: metrics of the out-of-fold answers with their intervals over groups; the decision that is
        fitted on all of them; the student; and its comparison with the ensemble on the test split.

    Raises:
        UserError: The data have another number of folds, folds failed (the others are kept), or as in
            `train`.
    """
    run, options = storage.absolute(run), ModelOptions(device)
    outputs.check_output(run, KIND, [data])
    data_spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    if data_spec.split.folds != folds:
        raise UserError(
            f"--folds {folds}: {data} was prepared with {data_spec.split.folds or 'no'} folds; run scalp "
            f"prepare SOURCE OUT --folds {folds}"
        )
    folders = [storage.join(run, f"fold-{fold}") for fold in range(folds)]
    for fold, folder in enumerate(folders):
        check_identity(folder, identify(recipe, data_spec, fold, hold_out_val=True))
    finished = read_json(storage.join(run, SUMMARY_FILE))
    if finished and "student" in finished:
        console.print(f"{run} is finished; its bundle is {storage.join(run, 'bundle')}")
        return finished
    with outputs.open_output(run, KIND, [data]) as output:
        here = fits_here(workers, device) if local is None else local
        kappas = _train_all(data, recipe, folders, workers, device, tracking, here, progress)
        bundles = [load_bundle(folder) for folder in folders]
        rows = pa.concat_tables(
            load_answers(folder, manifest.apply_fold(table, fold), options, executor)
            for fold, folder in enumerate(folders)
        )
        rows, decision, scores = _cross_validate(rows, bundles[0].spec, recipe)
        output.check()
        parquet.write(storage.join(run, OUT_OF_FOLD_FILE), rows)
        trained = train_student(data, run, recipe, bundles, rows, workers, device, tracking, here, progress)
        student, worse = make_student_bundle(run, table, rows, decision, options, executor)
        summary = {
            "kind": KIND,
            "date": now(),
            "data_sha256": data_spec.sha256,
            "folds": folds,
            "recipe": recipe.model_dump(),
            "synthetic": data_spec.synthetic,
            "symptom": student.spec.symptom,
            "leaky": data_spec.split.leaky,
            **scores,
            "by_fold": kappas,
            "decision": _describe(decision),
            "student": {
                "model_version": student.spec.model_version,
                "best_epoch": trained["best_epoch"],
                "validation": trained["validation"],
                "worse_than_folds": worse,
                **_describe(student.spec),
            },
            "test": _compare(student, bundles, decision, table, options, executor),
        }
        output.check()
        write_json(storage.join(run, SUMMARY_FILE), summary)
    _show(summary, run)
    _warn(summary, data_spec)
    return summary


def _train_all(
    data: str,
    recipe: Recipe,
    folders: Sequence[str],
    workers: Workers,
    device: Device,
    tracking: Tracking,
    here: bool,
    progress: Callable[[], None],
) -> list[float]:
    """Train the folds that are not finished, and return the validation kappa of each fold.

    Raises:
        UserError: Folds failed; the message names the first one.
    """
    shared = Shared()
    if not all(storage.exists(storage.join(folder, SUMMARY_FILE)) for folder in folders):
        shared = _plan(recipe, folders, workers, device, here)

    def train_fold(fold: int) -> float | UserError:
        try:
            summary = train(
                data,
                folders[fold],
                recipe,
                workers,
                device,
                fold,
                tracking,
                hold_out_val=True,
                shared=shared,
                local=here,
                progress=progress,
            )
        except UserError as error:
            return error
        return float(summary["validation"]["qwk"])

    return check_outcomes(run_in_threads(train_fold, len(folders), shared.at_once))


def run_in_threads(function: Callable[[int], Any], count: int, at_once: int) -> list[Any]:
    """Call a function with 0 to `count` - 1, in `at_once` threads; with one, in this thread."""
    if at_once == 1:
        return list(map(function, range(count)))
    with ThreadPool(at_once) as pool:  # of daemons: an interrupt does not wait for their trainings
        return pool.map(function, range(count), chunksize=1)


def check_outcomes(outcomes: Sequence[float | UserError]) -> list[float]:
    """Return the outcomes of all folds.

    Raises:
        UserError: Folds failed. The message names them, unless all failed in the same way.
    """
    failed = {fold: outcome for fold, outcome in enumerate(outcomes) if isinstance(outcome, UserError)}
    if not failed:
        return [outcome for outcome in outcomes if not isinstance(outcome, UserError)]
    messages = {str(error) for error in failed.values()}
    if len(failed) == len(outcomes) and len(messages) == 1:
        raise next(iter(failed.values()))
    names = " and ".join(map(str, failed))
    first = next(iter(failed))
    raise UserError(
        f"fold {names} of {len(outcomes)} failed, and the others are kept: fold {first}: {failed[first]}; "
        "the same command trains only what is missing"
    )


def _plan(recipe: Recipe, folders: Sequence[str], workers: Workers, device: Device, here: bool) -> Shared:
    """Make the initial state of all folds once, and plan their workers."""
    from jobs.train.initial_state import load_initial_state, make_initial_state  # imports PyTorch

    saved = (load_initial_state(folder) for folder in folders)
    start = next((state for state in saved if state), None) or make_initial_state(recipe)
    if here:
        console.print(f"training {len(folders)} folds, one after another in this process")
        return Shared(start)
    requested = (workers, workers) if isinstance(workers, int) else workers
    cluster = wait_for_workers(connect(), requested, device)
    scaling, at_once = plan_side_by_side(cluster, requested, device, len(folders))
    console.print(
        f"training {len(folders)} folds, {at_once} at a time, each with {worker_range(scaling)[1]} workers"
    )
    return Shared(start, cluster, scaling, at_once)


def _cross_validate(
    rows: pa.Table, spec: BundleSpec, recipe: Recipe
) -> tuple[pa.Table, BundleSpec, dict[str, Any]]:
    """Return the answers with their probabilities, the decision fitted on all of them, and their metrics."""
    answers = as_answers(rows)
    promises = Promises(recipe.coverage, parse_targets(recipe.referral), recipe.moves_prior)
    probs, decided = cross_validate(spec, answers, promises)
    scores = {
        "metrics": metrics.score(answers.labels, decided.grades)
        | metrics.score_probabilities(answers.labels, probs),
        "intervals": bootstrap.bootstrap_metrics(answers.labels, probs, answers.groups),
        "cross_validated": paired.measure_answers(answers.labels, decided, answers.groups),
    }
    rows = rows.append_column("probabilities", pa.array(probs.tolist()))
    return rows, fit_decision_out_of_fold(spec, answers, promises), scores


def _describe(spec: BundleSpec) -> dict[str, Any]:
    """Describe the decision of a contract."""
    return {
        "temperature": spec.temperature,
        "bias": list(spec.bias or ()),
        "conformal": spec.conformal.model_dump(mode="json"),
        "referral": spec.referral.model_dump(mode="json"),
    }


def _compare(
    student: Bundle,
    bundles: Sequence[Bundle],
    decision: BundleSpec,
    table: pa.Table,
    options: ModelOptions,
    executor: Executor | None,
) -> dict[str, Any] | None:
    """Compare the student with the ensemble on the test split; None if it has no labeled image."""
    rows = table.filter((pc.field("split") == "test") & pc.field("label").is_valid())
    if not rows.num_rows:
        return None
    return compare_with_ensemble(student, bundles, decision, rows, options, executor)


def _show(summary: dict[str, Any], run: str) -> None:
    scores, bounds = summary["metrics"], summary["intervals"]
    rows = {"images, each out-of-fold": f"{scores['n']:,} in {bounds['groups']} groups"}
    for name, label in (("qwk", "QWK"), ("top1", "top-1"), ("log_loss", "log loss")):
        rows[label] = _with_interval(scores[name], bounds[name])
    for name in _SHOWN:
        rows[paired.METRICS[name]] = _show_value(summary["cross_validated"][name])
    rows["QWK per fold"] = ", ".join(f"{value:.3f}" for value in summary["by_fold"])
    rows["answers"] = storage.join(run, OUT_OF_FOLD_FILE)
    show("cross-validation", rows)
    if test := summary["test"]:
        console.print(f"test split: {test['images']:,} images")
        for name, differences in test["differences"].items():
            show_differences(name, STUDENT, test["groups"], differences)
    show("student", {"model": summary["student"]["model_version"], "bundle": storage.join(run, "bundle")})


def _warn(summary: dict[str, Any], data_spec: DataSpec) -> None:
    for target in summary["student"]["referral"]["targets"] or ():
        console.print(str(Target(**target)))
    if worse := [paired.METRICS[name] for name in summary["student"]["worse_than_folds"]]:
        console.print(
            f"on the validation split the student is worse than the folds in {', '.join(worse)}, so its "
            "grade sets and referral rule are fitted on that split alone"
        )
    for warning in filter(None, (data_spec.split.warning, data_spec.warning)):
        console.print(warning)


def _show_value(measured: dict[str, Any]) -> str:
    return _with_interval(measured["value"], measured)


def _with_interval(value: float | None, bound: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    if bound is None or bound["low"] is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({bound['low']:.3f} to {bound['high']:.3f})"
