import json
import shutil

import pytest

from scalp_core.bundles.bundle import SPEC_FILE
from scalp_core.bundles.contract import GRAPH_FILES, WEIGHTS_FILE, hash_contract
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.errors import UserError


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "bundle")


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def test_load_bundle_returns_the_saved_files(bundle):
    loaded = load_bundle(str(bundle))
    assert loaded.spec.temperature == 1.5
    assert loaded.spec.majority_grade == 2
    assert loaded.spec.model_version == f"untrained-{loaded.spec.weights_sha256[:12]}"
    assert loaded.state["fc.weight"].shape == (4, 96)


def test_load_bundle_accepts_a_run_directory(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "run" / "bundle")
    assert load_bundle(str(tmp_path / "run")).spec == load_bundle(str(bundle)).spec


@pytest.mark.parametrize(
    ("file", "part"),
    [(SPEC_FILE, "weights"), (WEIGHTS_FILE, "weights"), *((file, "float") for file in GRAPH_FILES["float"])],
)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_flipped_byte_is_refused(copy, file, part, share):
    flip_byte(copy / file, int((copy / file).stat().st_size * share))
    with pytest.raises(UserError, match=f"{file} .*copy the bundle again"):
        load_bundle(str(copy)).fetch(part)


def test_a_changed_value_is_refused_although_the_json_is_sound(copy):
    content = json.loads((copy / SPEC_FILE).read_text())
    content["temperature"] = 0.1
    (copy / SPEC_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not match its sha256"):
        load_bundle(str(copy))


def test_a_directory_without_a_bundle_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a bundle"):
        load_bundle(str(tmp_path))
    with pytest.raises(UserError, match="is not a bundle"):
        load_bundle(str(tmp_path / "missing"))


def test_model_card_has_metrics_and_intended_use(bundle):
    spec = load_bundle(str(bundle)).spec
    reached = {"n": 80, "qwk": 0.876, "top1": 0.75, "macro_f1": 0.7, "mae": 0.3}
    card = render_model_card(spec.model_copy(update={"metrics": {"val": reached}}))
    assert "Not a diagnosis" in card
    assert "| quadratic weighted kappa | 0.876 |" in card
    assert spec.weights_sha256 in card


def test_model_card_of_a_bundle_without_metrics_says_so(bundle):
    card = render_model_card(load_bundle(str(bundle)).spec)
    assert "No metrics of the validation split are recorded." in card
    assert "| metric |" not in card


def test_a_bundle_of_version_1_grades_one_symptom(copy):
    content = json.loads((copy / SPEC_FILE).read_text())
    del content["spec_sha256"], content["symptom"], content["other_symptoms"]
    content["schema_version"] = 1
    content["spec_sha256"] = hash_contract(content)
    (copy / SPEC_FILE).write_text(json.dumps(content))
    spec = load_bundle(str(copy)).spec
    assert (spec.symptom, spec.symptoms) == ("micro_keratin", 1)


def test_a_bundle_of_a_later_version_is_refused(copy):
    content = json.loads((copy / SPEC_FILE).read_text()) | {"schema_version": 3}
    del content["spec_sha256"]
    (copy / SPEC_FILE).write_text(json.dumps(content | {"spec_sha256": hash_contract(content)}))
    with pytest.raises(UserError, match="has bundle schema 3, this scalp reads 1 and 2"):
        load_bundle(str(copy))


@pytest.mark.medium
def test_the_model_card_lists_other_symptoms(make_bundle, tmp_path):
    spec = load_bundle(str(make_bundle(tmp_path / "six", symptoms=6))).spec
    score = {"n": 80, "qwk": 0.512, "intervals": {"qwk": {"low": 0.4, "high": 0.6, "undefined": 0}}}
    reached = {"n": 90, "qwk": 0.876, "other_symptoms": {"dandruff": score}}
    card = render_model_card(spec.model_copy(update={"metrics": {"val": reached}}))
    assert "| dandruff (비듬) | 9 | 80 | 0.512 | 0.400 to 0.600 |" in card
    assert "| hair loss (탈모) | 9 | too few labels: not graded |" in card
