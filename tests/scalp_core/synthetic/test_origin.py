"""The mark `synthetic: true`, from `scalp synth` to metrics and responses of a model."""

import json
import shutil

import pytest

from jobs.evaluate.driver import _warnings as evaluation_warnings
from scalp_core import storage
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.curation import report
from scalp_core.datasets import manifest
from scalp_core.datasets.locations import Location
from scalp_core.results import report as results_report
from scalp_core.synthetic import dataset as synthetic
from scalp_core.synthetic.origin import MARKS, is_synthetic
from scalp_core.synthetic.plan import SynthOptions
from serving.schemas.grading import ModelResponse
from tests.support.small_grade import write_bundle, zipped
from tests.support.sources import PLANS, audited, write_set

MARK = synthetic._summarize(PLANS, SynthOptions(images=48, seed=5, devices=8)).model_dump_json().encode()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder as `scalp synth` leaves it."""
    folder = tmp_path_factory.mktemp("drawn")
    write_set(folder)
    (folder / "synth.json").write_bytes(MARK)
    return folder


def test_the_mark_is_what_synth_writes():
    assert {synthetic._SUMMARY, synthetic._MARKER} == set(MARKS)


def as_it_is(drawn, tmp_path):
    return drawn


def a_folder_in_it(drawn, tmp_path):
    return next(path for path in drawn.iterdir() if path.is_dir() and any(path.rglob("*.jpg")))


def a_copy_beside_others(drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "clinic" / "copied")
    return tmp_path / "clinic"


def a_zip(drawn, tmp_path):
    files = [(str(path.relative_to(drawn)), path.read_bytes()) for path in drawn.rglob("*") if path.is_file()]
    (tmp_path / "all.zip").write_bytes(zipped(files))
    return tmp_path / "all.zip"


def a_table(drawn, tmp_path):
    found = sorted(drawn.rglob("*.jpg"))
    lines = [f"{path},{index % 4},{index % 12}\n" for index, path in enumerate(found)]
    (tmp_path / "labels.csv").write_text("uri,label,group\n" + "".join(lines))
    return tmp_path / "labels.csv"


@pytest.mark.parametrize("made", [as_it_is, a_folder_in_it, a_copy_beside_others, a_zip, a_table])
def test_data_of_synth_say_so(drawn, tmp_path, made):
    found = audited(made(drawn, tmp_path), tmp_path / "data", method="random")
    spec = manifest.read_spec(found.data)
    assert spec.synthetic
    assert json.loads(storage.read(f"{found.data}/data.json"))["synthetic"] is True
    (warning, *_) = report.warnings(spec, found.summary)
    assert warning.startswith("SYNTHETIC IMAGES") and "not for clinical use" in warning


def test_other_data_do_not(drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "real")
    (tmp_path / "real" / "synth.json").write_text('{"synth": "a music file"}')
    found = audited(tmp_path / "real", tmp_path / "data", method="random")
    assert not manifest.read_spec(found.data).synthetic


def test_prepared_data_and_a_prefix_in_s3_are_known_as_well(s3, tmp_path):
    folder = f"s3://scalp/{tmp_path.name}"
    assert not is_synthetic([f"{folder}/photos/1.원천데이터"], [])
    storage.write(f"{folder}/photos/synth.json", MARK)
    assert is_synthetic([f"{folder}/photos/1.원천데이터"], [])
    assert is_synthetic([], [Location(f"{folder}/photos/synth.json")])
    storage.write(f"{folder}/data/data.json", b'{"synthetic": true}')
    assert is_synthetic([f"{folder}/data/manifest/split=test/part-0.parquet"], [])
    assert not is_synthetic([f"{folder}/nowhere", "s3://scalp"], [Location(f"{folder}/gone.json")])


def test_a_model_of_synthetic_images_says_so_wherever_it_answers(tmp_path, bundle):
    spec = load_bundle(str(bundle)).spec
    training = spec.training.model_copy(update={"synthetic": True})
    metrics = {"val": {"n": 1, "qwk": 0.5}}
    drawn = spec.model_copy(update={"training": training, "metrics": metrics})
    warning = "rained on synthetic images; not for clinical use"
    assert f"**T{warning}.**" in render_model_card(drawn)
    assert warning not in render_model_card(spec.model_copy(update={"metrics": metrics}))
    uri = write_bundle(str(tmp_path / "bundle"), training=training)
    assert load_bundle(uri).spec.warning == f"t{warning}"

    class Runs:
        model_version, device, precision, runtime = "m", "cpu", "fp32", "openvino"

    assert ModelResponse.of(drawn, Runs, None).synthetic and not ModelResponse.of(spec, Runs, None).synthetic
    summary = {"rows_unaccounted": 0, "rows": 1, "failed": 0, "by_reason": {}}
    calm = type("Drift", (), {"flag": False})
    assert results_report.list_warnings(drawn, summary, calm) == [f"the model was t{warning}"]
    assert results_report.list_warnings(spec, summary, calm) == []


def test_an_evaluation_of_such_a_model_or_on_such_data_says_so(drawn, tmp_path, bundle):
    spec = load_bundle(str(bundle)).spec
    synthetic = spec.model_copy(update={"training": spec.training.model_copy(update={"synthetic": True})})
    data = manifest.read_spec(audited(drawn, tmp_path / "data").data)
    real = data.model_copy(update={"synthetic": False})
    summary = {"not_finite": 0, "trained_on": {"warning": None}}
    assert evaluation_warnings(summary, synthetic, real) == [f"the model was {synthetic.warning}"]
    assert evaluation_warnings(summary, spec, data) == [data.warning]
    assert evaluation_warnings(summary, spec, real) == []
