"""Every verb that runs the model, on a GPU: the grades are those of the same bundle on the CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from cluster.local import connect
from jobs.common.inference import ModelOptions
from jobs.data.prepare import prepare
from jobs.data.synth import synth
from jobs.evaluate.driver import evaluate
from jobs.evaluate.explain import explain
from jobs.grade.driver import GradeOptions, grade
from jobs.grade.planning import PoolOptions
from jobs.train.driver import RECIPES, train
from scalp_core.bundles.loading import load_bundle
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from scalp_core.models.recipe import load_recipe
from scalp_core.results.schema import RESULTS_FOLDER
from scalp_core.synthetic.plan import SynthOptions
from serving import app
from serving.settings import Settings
from tests.support.ports import free_port
from tests.support.result_rows import read_results
from tests.support.sizes import SMALL

pytestmark = pytest.mark.gpu

# Probabilities in fp32 on a GPU and on the CPU; `test_predictor` compares bf16.
PRECISION, CLOSE = "fp32", 0.01


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of photographs, data and run; what training said."""
    connect()
    root = tmp_path_factory.mktemp("gpu")
    photographs, data, run = (str(root / name) for name in ("photographs", "data", "run"))
    synth(photographs, SynthOptions(images=240, seed=3))
    prepare(photographs, data)
    recipe = load_recipe("smoke", RECIPES, [f"size={SMALL}", "epochs=4", "ema_decay=0.9"])
    return photographs, data, run, train(data, run, recipe, device="cuda")


@pytest.fixture(scope="module")
def on_cpu(bundle):
    return Predictor(load_bundle(str(bundle)), "cpu", PRECISION)


def files_below(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*.jpg")}


def probabilities(predictor: Predictor, data: bytes) -> list[float]:
    return predictor.grade(decode(data, predictor.spec.preprocess).pixels[None])[0].probabilities


def test_training_learns_and_has_one_worker_for_each_gpu(trained):
    history = trained[3]["history"]
    assert {epoch["workers"] for epoch in history} == {torch.cuda.device_count()}
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_the_bundle_says_the_same_of_the_test_part_on_both(trained, tmp_path):
    _, data, run, _ = trained
    gpu, cpu = (
        evaluate(run, data, str(tmp_path / device), options=ModelOptions(device=device))["metrics"]
        for device in ("cuda", "cpu")
    )
    assert gpu["n"] == cpu["n"]
    assert gpu["rps"] == pytest.approx(cpu["rps"], abs=0.02)


def test_bulk_and_online_say_what_the_cpu_says(trained, bundle, on_cpu, tmp_path):
    photographs = trained[0]
    out = str(tmp_path / "graded")
    options = GradeOptions(model=ModelOptions("cuda", PRECISION), pool=PoolOptions(models=(2, 2)))
    summary = grade(str(bundle), photographs, out, options)
    assert summary["rows_unaccounted"] == 0
    rows = read_results(f"{out}/{RESULTS_FOLDER}").to_pylist()
    bulk = {row["uri"]: row["probabilities"] for row in rows}
    files = files_below(photographs)
    assert len(bulk) == len(files)
    spread = np.ptp(list(bulk.values()), axis=0).max()
    assert spread > 20 * CLOSE  # or nobody would see that an answer is another photograph's

    port = free_port()
    app.start(str(bundle), "127.0.0.1", port, Settings(device="cuda", precision=PRECISION))
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

            def post(data: bytes) -> dict:
                return client.post("/v1/grade", files={"file": ("a.jpg", data, "image/jpeg")}).json()

            with ThreadPoolExecutor(16) as threads:
                online = dict(zip(files, threads.map(post, files.values()), strict=True))
            form = {"files": {"file": ("a.jpg", next(iter(files.values())), "image/jpeg")}}
            assert client.post("/v1/grade", data={"heatmap": "true"}, **form).json()["heatmap"]
    finally:
        app.stop()
    for uri, data in files.items():
        np.testing.assert_allclose(online[uri]["probabilities"], probabilities(on_cpu, data), atol=CLOSE)
        # In batches of other sizes.
        np.testing.assert_allclose(online[uri]["probabilities"], bulk[uri], atol=CLOSE)


def test_heatmaps_are_made_on_the_gpu(trained, tmp_path):
    photographs, _, run, _ = trained
    summary = explain(f"{run}/bundle", photographs, str(tmp_path / "explained"), limit=8, device="cuda")
    assert summary["explained"] == 8
