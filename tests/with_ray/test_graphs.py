"""int8 of a trained bundle: made, measured, used, refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray

from jobs.common.inference import ModelOptions
from jobs.grade.driver import GradeOptions, grade
from jobs.models import quantize as quantize_module
from jobs.models.quantize import quantize
from scalp_core.bundles.bundle import CARD_FILE, SPEC_FILE, Bundle
from scalp_core.bundles.contract import GRAPH_FILES
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from scalp_core.results.schema import RESULTS_FOLDER
from tests.support.result_rows import read_results


@pytest.fixture(scope="module")
def quantized(pipeline, tmp_path_factory):
    """A copy of the trained bundle with an int8 graph, and what `quantize` said of it.

    After two epochs on few photographs it stands near the edges between grades, so the limit is wider here.
    """
    copy = shutil.copytree(pipeline.run / "bundle", tmp_path_factory.mktemp("int8") / "bundle")
    return copy, quantize(str(copy), str(pipeline.data), max_drop=1)


@pytest.fixture(scope="module")
def photographs(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for index, uri in enumerate(manifest.read_manifest(str(pipeline.data))["uri"].to_pylist()[:40]):
        shutil.copy(uri, folder / f"{index}.jpg")
    return folder


def test_the_drop_is_measured_on_the_whole_validation_part_and_kept(pipeline, quantized):
    copy, summary = quantized
    val = manifest.select_split(manifest.read_manifest(str(pipeline.data)), "val")
    record = load_bundle(str(copy)).spec.graphs["int8"]
    assert record.photographs == val.num_rows == summary["photographs"]
    assert record.qwk_drop == summary["qwk_drop"] == record.comparison.qwk_drop
    assert record.comparison.groups == len(set(val["group"].to_pylist()))
    assert record.comparison.qwk_drop_bound >= record.qwk_drop
    assert summary["comparison"] == record.comparison.model_dump()
    assert record.max_logit_difference > 0
    assert record.grade_agreement > 0.8
    assert "int8 graph" in (copy / CARD_FILE).read_text()
    # A quarter of the size: the weights are stored in 8 bits.
    sizes = {kind: (copy / GRAPH_FILES[kind][1]).stat().st_size for kind in GRAPH_FILES}
    assert sizes["int8"] < 0.3 * sizes["float"]


def test_a_model_card_that_somebody_has_edited_is_kept(pipeline, quantized, tmp_path, capsys):
    copy, _ = quantized
    before, after = load_bundle(str(pipeline.run)).spec, load_bundle(str(copy)).spec
    card = tmp_path / CARD_FILE
    card.write_bytes((pipeline.run / "bundle" / CARD_FILE).read_bytes())
    assert "int8 graph" in quantize_module._card(str(tmp_path), before, after)[CARD_FILE].decode()
    card.write_text(card.read_text() + "\nIntended use: the clinic in Busan.\n")
    assert quantize_module._card(str(tmp_path), before, after) == {}
    assert "stays unchanged" in capsys.readouterr().out


def test_a_finished_quantization_ends_at_once(pipeline, quantized):
    copy, summary = quantized
    before = {file.name: file.stat().st_mtime_ns for file in copy.iterdir()}
    assert quantize(str(copy), str(pipeline.data)) == summary
    assert {file.name: file.stat().st_mtime_ns for file in copy.iterdir()} == before


def test_int8_grades_and_signs_its_answers(pipeline, quantized, photographs, tmp_path):
    copy, _ = quantized
    out = str(tmp_path / "out")
    summary = grade(str(copy), str(photographs), out, GradeOptions(ModelOptions("cpu", "int8"), heatmaps=0))
    assert (summary["graded"], summary["rows_unaccounted"]) == (40, 0)
    versions = set(read_results(str(tmp_path / "out" / RESULTS_FOLDER))["model_version"].to_pylist())
    assert versions == {summary["model_version"]}
    assert summary["model_version"] == f"{load_bundle(str(copy)).spec.model_version}-int8"
    # Never two models in one output.
    with pytest.raises(UserError, match="holds results of precision int8, not fp32"):
        grade(str(copy), str(photographs), out, GradeOptions(ModelOptions("cpu", "fp32"), heatmaps=0))


def test_int8_whose_loss_may_be_above_the_limit_is_not_added(pipeline, quantized, tmp_path, monkeypatch):
    """Of so few images chance alone can hide a loss of 0.01; both ranges are tried."""
    copy = shutil.copytree(pipeline.run / "bundle", tmp_path / "bundle")
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    tries = []

    def quick(graph, images, careful):
        tries.append(careful)
        return load_bundle(str(quantized[0])).graph("int8")

    monkeypatch.setattr("scalp_core.inference.openvino_runtime.quantize", quick)
    with pytest.raises(UserError, match=r"may be as large as .*97.5% confidence.*keeps only bf16 and fp32"):
        quantize(str(copy), str(pipeline.data))
    assert tries == [False, True]
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before


@pytest.mark.parametrize("change", [{"max_drop": -1}, {"qwk_drop_bound": None}, None])
def test_a_graph_without_a_comparison_that_it_passed_is_not_run(quantized, change):
    loaded = load_bundle(str(quantized[0]))
    record = loaded.spec.graphs["int8"]
    comparison = record.comparison.model_copy(update=change) if change else None
    graphs = {"int8": record.model_copy(update={"comparison": comparison})}
    changed = Bundle(loaded.spec.model_copy(update={"graphs": graphs}), loaded.uri)
    with pytest.raises(UserError, match="scalp quantize"):
        changed.fetch("int8")


def test_other_data_proves_nothing(quantized, bundle, pipeline):
    with pytest.raises(UserError, match="is not the data"):
        quantize(str(bundle), str(pipeline.data))


def test_a_changed_graph_is_refused(pipeline, tmp_path):
    copy = shutil.copytree(pipeline.run / "bundle", tmp_path / "bundle")
    assert json.loads((copy / SPEC_FILE).read_text())["graphs"]["float"]["grade_agreement"] == 1.0
    with (copy / "model.xml").open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match="model.xml does not match its sha256"):
        Predictor(load_bundle(str(copy)), "cpu")


@ray.remote(num_cpus=1)
class Replica:
    """As Ray starts one: OMP_NUM_THREADS follows its num_cpus, and it computes on a thread of its own."""

    def __init__(self, bundle, threads):
        self.predictor = Predictor(bundle, "cpu", "fp32", threads)
        self.thread = ThreadPoolExecutor(1)

    def threads(self):
        model = self.predictor.forward.requests[0].get_compiled_model()
        return int(model.get_property("INFERENCE_NUM_THREADS"))

    def logits(self, images):
        return self.thread.submit(self.predictor.logits, images).result()


def test_a_replica_computes_on_the_threads_it_was_given_and_answers_the_same(pipeline, photographs):
    bundle = load_bundle(str(pipeline.run)).fetch("float")
    images = np.stack(
        [
            decode((photographs / f"{index}.jpg").read_bytes(), bundle.spec.preprocess).pixels
            for index in range(11)
        ]
    )
    expected = Predictor(bundle, "cpu", "fp32").logits(images)
    for threads in (1, 2):
        replica = Replica.remote(bundle, threads)
        assert ray.get(replica.threads.remote()) == threads
        np.testing.assert_allclose(ray.get(replica.logits.remote(images)), expected, atol=1e-4)
        ray.kill(replica)
