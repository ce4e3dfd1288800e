"""The mark `synthetic: true`, from `scalp synth` to metrics and responses of a model."""

import json
import shutil

import pytest

from jobs.evaluate.driver import _warnings as evaluation_warnings
from scalp_core import storage
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.curation.pseudonymize import strip_metadata
from scalp_core.datasets import manifest
from scalp_core.datasets.scan import SYNTHETIC_MARK
from scalp_core.reports import data, grading
from serving.schemas.grading import ModelResponse
from tests.support.small_grade import write_bundle, zipped
from tests.support.sources import PLANS, audited, audited_jpegs, picture, write_set


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder as `scalp synth` leaves it."""
    folder = tmp_path_factory.mktemp("drawn")
    write_set(folder, plans=PLANS[:24])
    return folder


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


@pytest.mark.medium
@pytest.mark.parametrize("made", [as_it_is, a_folder_in_it, a_copy_beside_others, a_zip, a_table])
def test_data_of_synth_say_so(drawn, tmp_path, made):
    found = audited(made(drawn, tmp_path), tmp_path / "data", method="random")
    spec = manifest.read_spec(found.data)
    assert spec.synthetic
    assert json.loads(storage.read(f"{found.data}/data.json"))["synthetic"] is True
    (warning, *_) = data.list_warnings(spec, found.summary)
    assert str(warning).startswith("SYNTHETIC IMAGES") and "not for clinical use" in str(warning)


def test_a_pseudonymized_copy_keeps_the_mark_and_other_data_have_none(tmp_path):
    copy, suffix = strip_metadata(picture(0))
    assert (suffix, SYNTHETIC_MARK in copy) == (".jpg", True)
    found = audited_jpegs(tmp_path, method="random")
    assert not manifest.read_spec(found.data).synthetic


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
    (line,) = grading.list_warnings(drawn, summary, calm)
    assert str(line) == f"the model was t{warning}"
    assert grading.list_warnings(spec, summary, calm) == []


def test_an_evaluation_of_such_a_model_or_on_such_data_says_so(drawn, tmp_path, bundle):
    spec = load_bundle(str(bundle)).spec
    synthetic = spec.model_copy(update={"training": spec.training.model_copy(update={"synthetic": True})})
    data = manifest.read_spec(audited(drawn, tmp_path / "data").data)
    real = data.model_copy(update={"synthetic": False})
    summary = {"not_finite": 0, "trained_on": {"warning": None}}
    (of_model,) = evaluation_warnings(summary, synthetic, real)
    assert str(of_model) == f"the model was {synthetic.warning}" and of_model.korean != of_model.english
    (of_data,) = evaluation_warnings(summary, spec, data)
    assert str(of_data) == data.warning and of_data.korean != of_data.english
    assert evaluation_warnings(summary, spec, real) == []
