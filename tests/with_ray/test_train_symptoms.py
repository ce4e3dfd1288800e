"""A model of six symptoms, from labels to rows."""

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest

from jobs.common.local_executor import LocalExecutor
from jobs.evaluate.driver import evaluate
from jobs.grade.driver import grade
from jobs.train import ingest
from jobs.train.driver import train
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.datasets.other_symptoms import add_other_labels
from scalp_core.errors import UserError
from scalp_core.grades import SYMPTOM_IDS
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from scalp_core.storage import read

OTHERS = SYMPTOM_IDS[1:]


@pytest.fixture(scope="module")
def six(pipeline, tmp_path_factory):
    """Run directory of a training of one epoch, and its summary."""
    run = str(tmp_path_factory.mktemp("six") / "run")
    recipe = pipeline.recipe.model_copy(update={"symptoms": "all", "epochs": 1})
    return run, train(str(pipeline.data), run, recipe, workers=1, device="cpu")


def test_the_bundle_records_each_symptom_with_its_labels(pipeline, six):
    run, summary = six
    spec, rows = load_bundle(run).spec, manifest.read_manifest(str(pipeline.data))
    assert (spec.symptom, tuple(other.name for other in spec.other_symptoms)) == (SYMPTOM_IDS[0], OTHERS)
    train_rows = manifest.select_split(rows, "train")
    assert {other.images for other in spec.other_symptoms} == {train_rows.num_rows}
    graded = {other.name for other in spec.other_symptoms if other.temperature is not None}
    assert graded and set(spec.metrics["val"]["other_symptoms"]) == graded
    assert len(summary["history"][0]["val_qwk_of_others"]) == len(OTHERS)


def test_evaluation_and_rows_have_the_answers_of_the_predictor(pipeline, six, tmp_path):
    run, _ = six
    bundle, executor = load_bundle(run), LocalExecutor()
    graded = [other.name for other in bundle.spec.other_symptoms if other.temperature is not None]
    evaluated = evaluate(run, str(pipeline.data), str(tmp_path / "e"), executor=executor, probe=False)
    assert set(evaluated["other_symptoms"]) == set(graded)
    rows = manifest.select_split(manifest.read_manifest(str(pipeline.data)), "test")
    (tmp_path / "images").mkdir()
    for row in rows.to_pylist():
        (tmp_path / "images" / f"{row['image_id']}.jpg").write_bytes(read(row["uri"]))
    grade(run, str(tmp_path / "images"), str(tmp_path / "out"), executor=executor)
    results = pads.dataset(tmp_path / "out" / "results", format="parquet").to_table().to_pylist()
    answers = {row["image_id"]: row for row in results}
    predictor = Predictor(bundle, "cpu")
    images = np.stack([decode(read(row["uri"]), bundle.spec.preprocess).pixels for row in rows.to_pylist()])
    right = dict.fromkeys(graded, 0)
    for row, grading in zip(rows.to_pylist(), predictor.grade(images), strict=True):
        found = answers[row["image_id"]]
        assert found["grade"] == grading.grade
        assert {name: found["other_symptoms"][name] for name in graded} == grading.other_symptoms
        for name in graded:
            label = row["labels"][SYMPTOM_IDS.index(name)]
            right[name] += grading.other_symptoms[name]["grade"] == label
    for name, score in evaluated["other_symptoms"].items():
        assert score["top1"] == pytest.approx(right[name] / score["n"])


def test_images_without_labels_of_other_symptoms_are_refused(pipeline, tmp_path, monkeypatch):
    def without(table, symptom):
        column = table.schema.get_field_index("labels")
        empty = pa.nulls(table.num_rows, table.schema.field(column).type)
        return add_other_labels(table.set_column(column, "labels", empty), symptom)

    monkeypatch.setattr(ingest, "add_other_labels", without)
    recipe = pipeline.recipe.model_copy(update={"symptoms": "all"})
    with pytest.raises(UserError, match="has a label of another symptom; use --symptoms one"):
        train(str(pipeline.data), str(tmp_path / "run"), recipe, workers=1, device="cpu")
    assert not (tmp_path / "run").exists()
