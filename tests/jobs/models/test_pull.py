"""`scalp models pull`: a verified copy, which other programs can run; what is refused and kept."""

import io
import json
import sys

import numpy as np
import openvino
import pytest
from PIL import Image

from jobs.cli.main import main
from jobs.models import driver
from jobs.models.driver import pull
from scalp_core import storage
from scalp_core.bundles import registry
from scalp_core.bundles.bundle import CARD_FILE, SPEC_FILE, save_bundle
from scalp_core.bundles.contract import WEIGHTS_FILE
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import Registry
from scalp_core.errors import UserError
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from scalp_core.storage import lease, outputs
from tests.support.images import jpeg


def contents(uri):
    return {name: storage.read(storage.join(uri, name)) for name in storage.names_in(uri)}


@pytest.fixture(params=["local", "s3"])
def out(request, tmp_path, s3):
    return str(tmp_path / "pulled") if request.param == "local" else f"s3://scalp/pulled/{tmp_path.name}"


@pytest.mark.medium
def test_a_version_of_the_registry_is_copied_whole(bundle, tmp_path, out):
    root = str(tmp_path / "models")
    Registry(root).add(str(bundle), "scalp")
    pull("models://scalp@1", out, root)
    copied = contents(out)
    assert json.loads(copied.pop(outputs.MARKER_FILE))["kind"] == "models pull"
    assert copied == contents(str(bundle))
    assert storage.names_in(storage.join(out, lease.FOLDER)) == set()  # it named this machine
    assert Registry(root).add(out, "scalp") == (1, False)
    assert Registry(root).add(out, "other") == (1, True)
    assert outputs.MARKER_FILE not in storage.names_in(Registry(root).uri("other", 1))


def test_the_same_bundle_again_changes_nothing(bundle, out):
    pull(str(bundle), out)
    storage.write(storage.join(out, CARD_FILE), b"edited")
    pull(str(bundle), out)
    assert contents(out)[CARD_FILE] == b"edited"


def test_another_bundle_is_not_written_over_the_first(bundle, out, tmp_path):
    pull(str(bundle), out)
    before = contents(out)
    loaded = load_bundle(str(bundle)).fetch("weights").fetch("float")
    save_bundle(str(tmp_path / "other"), loaded.spec.model_copy(update={"name": "other"}), loaded.files)
    with pytest.raises(UserError, match="holds another bundle; choose a new or an empty directory"):
        pull(str(tmp_path / "other"), out)
    assert contents(out) == before


def test_an_interrupted_copy_is_no_bundle_until_it_is_resumed(bundle, out, monkeypatch):
    def interrupted(source, to):
        storage.write(storage.join(to, WEIGHTS_FILE), b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(driver, "copy_bundle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pull(str(bundle), out)
    with pytest.raises(UserError, match="is not a bundle"):
        load_bundle(out)
    pull(str(bundle), out)
    load_bundle(out).fetch("weights").fetch("float")


def test_a_damaged_bundle_is_not_copied(bundle, tmp_path, out):
    source = str(tmp_path / "source")
    loaded = load_bundle(str(bundle)).fetch("weights").fetch("float")
    save_bundle(source, loaded.spec, loaded.files | {WEIGHTS_FILE: b"damaged"})
    with pytest.raises(UserError, match=f"{WEIGHTS_FILE} does not match its sha256"):
        pull(source, out)
    assert SPEC_FILE not in storage.names_in(out)


def test_a_copy_inside_a_version_of_the_registry_is_refused(bundle, tmp_path):
    root = str(tmp_path / "models")
    Registry(root).add(str(bundle), "scalp")
    version = Registry(root).uri("scalp", 1)
    before = contents(version)
    with pytest.raises(UserError, match="is in the source"):
        pull("models://scalp@1", f"{version}/copy", root)
    assert contents(version) == before
    assert registry.CLAIM_FILE in before


def test_a_program_with_openvino_alone_answers_as_the_bundle_does(bundle, tmp_path):
    pull(str(bundle), str(tmp_path / "pulled"))
    contract = json.loads((tmp_path / "pulled" / SPEC_FILE).read_text())
    size = contract["preprocess"]["size"]
    pixels = np.asarray(Image.open(io.BytesIO(jpeg())).resize((size, size), Image.Resampling.BILINEAR))
    graph = tmp_path / "pulled" / "model.xml"
    model = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    logits = model([pixels[None]])[0][0] / contract["temperature"]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    loaded = load_bundle(str(bundle))
    (expected,) = Predictor(loaded, "cpu", "fp32").grade(decode(jpeg(), loaded.spec.preprocess).pixels[None])
    assert probabilities == pytest.approx(expected.probabilities, abs=0.05)  # Pillow decodes all pixels
    assert contract["grade_names"][int(np.argmax(probabilities))] == expected.grade_name


def test_the_former_export_names_its_successor(bundle, monkeypatch, capsys):
    words = ["export", "runs/first", "images/", "exported/", "--precision", "int8", "--format", "openvino"]
    monkeypatch.setattr(sys, "argv", ["scalp", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "use scalp models pull MODEL OUT" in capsys.readouterr().err
