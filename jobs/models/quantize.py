"""`scalp quantize`: adds an int8 graph to a bundle, if it grades nearly as well."""

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
from scalp_core.bundles.bundle import (
    CARD_FILE,
    GRAPH_FILES,
    WEIGHTS_FILE,
    Bundle,
    BundleSpec,
    Graph,
    GraphRecord,
    save_bundle,
)
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.evaluation import noninferiority, subgroups
from scalp_core.evaluation.noninferiority import MAX_DROP, Answers, Comparison
from scalp_core.inference import calibration, openvino_runtime
from scalp_core.inference.openvino_runtime import OpenVinoRuntime
from scalp_core.storage import lease, outputs
from scalp_core.storage.outputs import Output

KIND = "quantize"
# Photographs that set the ranges of int8; NNCF's own default.
_RANGES = 300
# Of each of two tries (quick ranges, careful ranges), so that together they keep the promised confidence.
_CONFIDENCE = 1 - (1 - noninferiority.CONFIDENCE) / 2


def quantize(bundle: str, data: str, seed: int = 0, max_drop: float = MAX_DROP) -> dict[str, Any]:
    """Makes the int8 graph with photographs of the training part and measures it on the validation part.

    int8 keeps temperature and quantile of the bundle, so coverage is measured with them.

    Args:
        bundle: directory of the bundle, local or `s3://`; the graph is written into it.
        data: directory that `scalp prepare` wrote; the one that the bundle was trained on.
        seed: chooses the training photographs.
        max_drop: largest acceptable upper bound of the loss of kappa and of coverage (95 % confidence).

    Returns:
        the summary that is also written to the bundle's `summary.json`; a bundle that has the graph already
        is left as it is.

    Raises:
        UserError: kappa or coverage may drop by more than `max_drop`, the data is not the bundle's, or the
            bundle is a version in a registry, is in use, or holds a `summary.json` of somebody else.
    """
    started = time.monotonic()
    loaded = load_bundle(bundle)
    registry.refuse_change(loaded)
    uri = str(loaded.uri)
    kept = _earlier_summary(uri)
    if loaded.spec.training.data_sha256 != manifest.read_spec(data).sha256:
        raise UserError(
            f"{data} is not the data that {loaded.spec.name} was trained on, so its validation part proves "
            "nothing; give that directory"
        )
    if loaded.spec.offers("int8") and kept:
        console.print(f"{uri} has its int8 graph already")
        _show(kept)
        return kept
    with _held(uri) as output:
        spec, images, record = _added(load_bundle(uri), data, seed, max_drop, output)
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
    """Hold the lease of a bundle."""
    output: Output | None = None
    try:
        with outputs.hold_output(_output_of(uri), KIND) as output:
            yield output
    finally:
        if output and output.uri == uri:  # a lease names this machine, and a bundle is handed on
            lease.remove(output.guard)


def _output_of(uri: str) -> str:
    """The directory whose lease guards a bundle: the run that `scalp train` made, or the bundle alone."""
    run = uri.rpartition("/")[0]
    return run if outputs.kind_of(run) == "train" else uri


def _added(
    loaded: Bundle, data: str, seed: int, max_drop: float, output: Output
) -> tuple[BundleSpec, int, GraphRecord]:
    """Adds the graph; the spec with it, the number of images that set its ranges, and what it costs.

    Raises:
        UserError: it costs too much, or another run took over.
    """
    uri, before = str(loaded.uri), loaded.spec
    stored = {WEIGHTS_FILE, *(GRAPH_FILES["float"] if "float" in before.graphs else ())}
    table = manifest.read_manifest(data)
    if before.training.fold is not None:
        table = manifest.apply_fold(table, before.training.fold)
    val = manifest.select_split(table, "val")
    if "float" not in before.graphs:  # from before bundles held graphs
        loaded = with_float_graph(loaded.fetch("weights"), few_batches(val, before.preprocess))
    graph = openvino_runtime.load_graph(loaded, "float")
    images = _ranges(loaded, manifest.select_split(table, "train"), seed)
    reference = OpenVinoRuntime(graph, "fp32").logits
    for careful in (False, True):
        with console.status(f"finding int8 ranges on {len(images)} training photographs"):
            candidate = openvino_runtime.quantize(graph, images, careful=careful)
        record, failure = _measure(loaded, candidate, reference, val, max_drop)
        if failure is None:
            break
    else:
        raise UserError(
            f"int8 on the validation part: {failure}. {uri} keeps bf16 and fp32 alone; more validation "
            "images narrow the bound, and --max-drop accepts a larger loss"
        )
    changed = with_graph(loaded, "int8", candidate, record)
    made = {name: content for name, content in changed.files.items() if name not in stored}
    output.check()
    save_bundle(uri, changed.spec, made | _card(uri, before, changed.spec))
    return changed.spec, len(images), record


def _earlier_summary(uri: str) -> dict[str, Any] | None:
    """Of the same bundle, if it was quantized before.

    Raises:
        UserError: the bundle holds a file of this name that is not scalp's.
    """
    place = storage.join(uri, SUMMARY_FILE)
    try:
        kept = read_json(place)
    except ValueError:
        kept = {}
    if kept is not None and not (isinstance(kept, dict) and kept.get("kind") == KIND):
        raise UserError(f"{place} was not written by scalp quantize; move it to another place")
    return kept


def _card(uri: str, before: BundleSpec, after: BundleSpec) -> dict[str, bytes]:
    """The model card of the bundle with its int8 graph, unless somebody has edited the present one."""
    place = storage.join(uri, CARD_FILE)
    if storage.exists(place) and storage.read(place) != render_model_card(before).encode():
        console.print(
            f"{place} is not as scalp wrote it, and stays as it is: it does not name the int8 graph"
        )
        return {}
    return {CARD_FILE: render_model_card(after).encode()}


def _ranges(bundle: Bundle, train: pa.Table, seed: int) -> np.ndarray:
    count = min(_RANGES, train.num_rows)
    chosen = np.random.default_rng(seed).choice(train.num_rows, count, replace=False)
    batches = labeled_batches(train.take(np.sort(chosen)), bundle.spec.preprocess)
    return np.concatenate([images for images, _ in batches])


def _measure(
    bundle: Bundle, graph: Graph, reference: Any, val: pa.Table, max_drop: float
) -> tuple[GraphRecord, str | None]:
    """The record of a graph, and the reason to refuse it."""
    with progress_bar("measuring on validation", val.num_rows) as (progress, task):

        def counted() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for images, labels in labeled_batches(val, bundle.spec.preprocess):
                yield images, labels
                progress.update(task, advance=len(labels))

        labels, *logits = logits_of_both(OpenVinoRuntime(graph, "int8").logits, reference, counted())
    own, other = (_answers(of_model, labels, bundle.spec) for of_model in logits)
    comparison = noninferiority.compare(
        labels, other, own, val["group"].to_pylist(), bundle.spec.conformal.coverage, max_drop, _CONFIDENCE
    )
    return make_record(graph, labels, logits[0], logits[1], comparison), comparison.failure


def _answers(logits: np.ndarray, labels: np.ndarray, spec: BundleSpec) -> Answers:
    probs = calibration.probabilities(logits, spec.temperature)
    sets = [calibration.grade_set(row, spec.conformal.quantile) for row in probs]
    return Answers(probs.argmax(axis=1), subgroups.is_in_set(labels, sets))


def _show(summary: dict[str, Any]) -> None:
    show(
        "quantize",
        {
            "model": summary["model_version"],
            "validation photographs": summary["photographs"],
            **Comparison(**summary["comparison"]).losses,
            "same grade": f"{summary['grade_agreement']:.1%}",
            "largest difference of a logit": summary["max_logit_difference"],
            "seconds": summary["seconds"],
            "use it with": "--precision int8 --device cpu",
        },
    )
