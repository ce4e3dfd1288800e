"""`scalp quantize`: add an int8 graph to a bundle, if it is not inferior to the weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.common.console import SUMMARY_FILE, console, now, progress_bar, read_json, show, write_json
from jobs.common.graphs import (
    few_batches,
    labeled_batches,
    logits_of_both,
    make_record,
    with_float_graph,
    with_graph,
)
from scalp_core import storage
from scalp_core.bundles import registry
from scalp_core.bundles.bundle import CARD_FILE, Bundle, Graph, save_bundle
from scalp_core.bundles.contract import GRAPH_FILES, WEIGHTS_FILE, BundleSpec, GraphRecord
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.evaluation import noninferiority, subgroups
from scalp_core.evaluation.noninferiority import MAX_DROP, Comparison
from scalp_core.evaluation.paired import Answers
from scalp_core.grades import NUM_GRADES
from scalp_core.inference import calibration, conformal, openvino_runtime
from scalp_core.inference.openvino_runtime import OpenVinoRuntime
from scalp_core.storage import lease, outputs
from scalp_core.storage.outputs import Output

KIND = "quantize"
# Images that set the ranges of int8: the default of NNCF.
_RANGES = 300
# Confidence of each of two attempts (quick and careful ranges), so that both together keep the promised one.
_CONFIDENCE = 1 - (1 - noninferiority.CONFIDENCE) / 2


def quantize(bundle: str, data: str, seed: int = 0, max_drop: float = MAX_DROP) -> dict[str, Any]:
    """Quantize a bundle to int8 with images of the training split, and measure it on the validation split.

    int8 uses calibration and grade sets of the bundle, so coverage is measured with them.

    Args:
        bundle: Directory of the bundle; the graph is written into it.
        data: Directory of `scalp prepare` on which the bundle was trained.
        seed: Random seed that selects the training images.
        max_drop: Largest acceptable upper bound of the loss of kappa and of coverage (95 % confidence).

    Returns:
        The summary, which is also written to the bundle's `summary.json`. A bundle with an int8 graph stays
        unchanged.

    Raises:
        UserError: Kappa or coverage may drop by more than `max_drop`, the data are not those of the bundle,
            or the bundle is a version in a registry, is in use, or holds another `summary.json`.
    """
    started = time.monotonic()
    loaded = load_bundle(bundle)
    registry.refuse_change(loaded)
    uri = str(loaded.uri)
    earlier = _earlier_summary(uri)
    if loaded.spec.training.data_sha256 != manifest.read_spec(data).sha256:
        raise UserError(
            f"{data} is not the data that {loaded.spec.name} was trained on, so its validation split proves "
            "nothing; give the directory of the training"
        )
    if loaded.spec.offers("int8") and earlier:
        console.print(f"{uri} already has an int8 graph")
        _show(earlier)
        return earlier
    with _held(uri) as output:
        spec, images, record = _add_graph(load_bundle(uri), data, seed, max_drop, output)
        summary = {
            "kind": KIND,
            "date": now(),
            "model_version": spec.version_in("int8"),
            "ranges_from": images,
            **record.model_dump(),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(storage.join(uri, SUMMARY_FILE), summary)
    _show(summary)
    return summary


@contextmanager
def _held(uri: str) -> Iterator[Output]:
    """Hold the lease of a bundle during the block."""
    output: Output | None = None
    try:
        with outputs.hold_output(_output_of(uri), KIND) as output:
            yield output
    finally:
        if output and output.uri == uri:  # a lease names this machine, and a bundle is handed on
            lease.remove(output.guard)


def _output_of(uri: str) -> str:
    """Return the directory whose lease guards a bundle: its run directory, or the bundle itself."""
    run = uri.rpartition("/")[0]
    return run if outputs.kind_of(run) == "train" else uri


def _add_graph(
    loaded: Bundle, data: str, seed: int, max_drop: float, output: Output
) -> tuple[BundleSpec, int, GraphRecord]:
    """Add the graph; return the new contract, the number of images that set the ranges, and the record.

    Raises:
        UserError: The graph loses too much, or another run took over.
    """
    uri, before = str(loaded.uri), loaded.spec
    stored = {WEIGHTS_FILE, *(GRAPH_FILES["float"] if "float" in before.graphs else ())}
    table = manifest.read_manifest(data)
    if before.training.fold is not None:
        table = manifest.apply_fold(table, before.training.fold)
    val = manifest.select_split(table, "val")
    if "float" not in before.graphs:  # older than graphs in bundles
        loaded = with_float_graph(loaded.fetch("weights"), few_batches(val, before.preprocess))
    graph = openvino_runtime.load_graph(loaded, "float")
    images = _calibration_images(loaded, manifest.select_split(table, "train"), seed)
    reference = OpenVinoRuntime(graph, "fp32").logits
    for careful in (False, True):
        with console.status(f"finding int8 ranges on {len(images)} training images"):
            candidate = openvino_runtime.quantize(graph, images, careful=careful)
        record, failure = _measure(loaded, candidate, reference, val, max_drop)
        if failure is None:
            break
    else:
        raise UserError(
            f"int8 on the validation split: {failure}. {uri} keeps only bf16 and fp32; more validation "
            "images narrow the bound, and --max-drop accepts a larger loss"
        )
    changed = with_graph(loaded, "int8", candidate, record)
    new_files = {name: content for name, content in changed.files.items() if name not in stored}
    output.check()
    save_bundle(uri, changed.spec, new_files | _card(uri, before, changed.spec))
    return changed.spec, len(images), record


def _earlier_summary(uri: str) -> dict[str, Any] | None:
    """Read the summary of an earlier quantization of the bundle.

    Raises:
        UserError: The bundle holds a file of this name that another program wrote.
    """
    place = storage.join(uri, SUMMARY_FILE)
    try:
        earlier = read_json(place)
    except ValueError:
        earlier = {}
    if earlier is not None and not (isinstance(earlier, dict) and earlier.get("kind") == KIND):
        raise UserError(f"{place} was not written by scalp quantize; move it to another place")
    return earlier


def _card(uri: str, before: BundleSpec, after: BundleSpec) -> dict[str, bytes]:
    """Render the model card with the int8 graph, unless a user has edited the current one."""
    place = storage.join(uri, CARD_FILE)
    if storage.exists(place) and storage.read(place) != render_model_card(before).encode():
        console.print(f"{place} was edited, so it stays unchanged and does not name the int8 graph")
        return {}
    return {CARD_FILE: render_model_card(after).encode()}


def _calibration_images(bundle: Bundle, train: pa.Table, seed: int) -> np.ndarray:
    count = min(_RANGES, train.num_rows)
    chosen = np.random.default_rng(seed).choice(train.num_rows, count, replace=False)
    batches = labeled_batches(train.take(np.sort(chosen)), bundle.spec.preprocess)
    return np.concatenate([images for images, _ in batches])


def _measure(
    bundle: Bundle, graph: Graph, reference: Any, val: pa.Table, max_drop: float
) -> tuple[GraphRecord, str | None]:
    """Measure a graph; return its record, and the reason to reject it or None."""
    with progress_bar("measuring on validation", val.num_rows) as (progress, task):

        def counted() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for images, labels in labeled_batches(val, bundle.spec.preprocess):
                yield images, labels
                progress.update(task, advance=len(labels))

        labels, *logits = logits_of_both(OpenVinoRuntime(graph, "int8").logits, reference, counted())
    candidate, other = (_answers(of_model, labels, bundle.spec) for of_model in logits)
    comparison = noninferiority.compare(
        labels,
        other,
        candidate,
        val["group"].to_pylist(),
        bundle.spec.conformal.coverage,
        max_drop,
        _CONFIDENCE,
    )
    return make_record(graph, labels, logits[0], logits[1], comparison), comparison.failure


def _answers(logits: np.ndarray, labels: np.ndarray, spec: BundleSpec) -> Answers:
    probs = calibration.calibrated(logits[:, :NUM_GRADES], spec)
    sets = conformal.grade_sets(probs, spec.conformal)
    no_referrals = np.zeros(len(labels), bool)  # referral is not compared
    return Answers(probs.argmax(axis=1), subgroups.is_in_set(labels, sets), no_referrals)


def _show(summary: dict[str, Any]) -> None:
    show(
        "quantize",
        {
            "model": summary["model_version"],
            "validation images": summary["photographs"],
            **Comparison(**summary["comparison"]).losses,
            "same grade": f"{summary['grade_agreement']:.1%}",
            "largest difference of a logit": summary["max_logit_difference"],
            "seconds": summary["seconds"],
            "use it with": "--precision int8 --device cpu",
        },
    )
