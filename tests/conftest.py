"""What several tests share: photographs, a bundle, a real S3 server, a real local Ray, one whole run."""

from __future__ import annotations

import io
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from cluster.local import Cluster, connect
from cluster.testing.local_s3 import S3Server, s3_server
from jobs.common import provenance
from jobs.common.graphs import with_float_graph
from jobs.data.prepare import prepare
from jobs.data.synth import synth
from jobs.evaluate.driver import evaluate
from jobs.train.driver import RECIPES, train
from scalp_core.bundles.bundle import (
    WEIGHTS_FILE,
    Bundle,
    BundleSpec,
    Conformal,
    InitialWeights,
    Training,
    save_bundle,
    serialize_weights,
    sha256,
)
from scalp_core.images.preprocess import decode
from scalp_core.models.architecture import build_model, normalize, preprocess_for
from scalp_core.models.recipe import Recipe, load_recipe
from scalp_core.synthetic.plan import SynthOptions
from serving.http import connections
from tests.support import sockets
from tests.support.metrics import Sample, await_total, watched

SMALL = 64  # side of the model's input in tests, pixels
CONNECTION_SECONDS = 2.0  # that the endpoint waits for the head of a request


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` wait for a machine that has one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none"))


def jpeg(seed: int = 0, size: tuple[int, int] = (640, 480), **options: object) -> bytes:
    """A photograph-like JPEG: smooth colors, so that decoders and resizers behave as on real ones."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 220, (12, 16, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88, **options)
    return buffer.getvalue()


def _settle_statistics(model: torch.nn.Module) -> None:
    """Gives batch normalization the statistics of photographs; without them all answers are alike."""
    spec = preprocess_for(model, SMALL)
    images = torch.from_numpy(np.stack([decode(jpeg(seed), spec).pixels for seed in range(16)]))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average
    with torch.no_grad():
        model.train()(normalize(images, spec))


def _with_graph(bundle: Bundle) -> Bundle:
    images = np.stack([decode(jpeg(seed), bundle.spec.preprocess).pixels for seed in range(4)])
    return with_float_graph(bundle, iter([(images, np.arange(4))]))


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    """Writes an untrained bundle whose answers differ from photograph to photograph."""

    def make(folder: Path, seed: int = 7) -> Path:
        torch.manual_seed(seed)
        model = build_model("legacy_xception")
        torch.nn.init.normal_(model.get_classifier().weight, std=0.2)
        _settle_statistics(model)
        weights = serialize_weights(model.state_dict())
        spec = BundleSpec(
            name="untrained",
            created_at=datetime.now(UTC),
            architecture="legacy_xception",
            preprocess=preprocess_for(model, SMALL),
            temperature=1.5,
            conformal=Conformal(coverage=0.9, quantile=0.8),
            training=Training(
                recipe={"epochs": 1},
                initial_weights=InitialWeights(source="none"),
                workers=1,
                best_epoch=1,
                data_sha256="0" * 64,
                grade_counts=[1, 5, 7, 3],
            ),
            metrics={},
            versions=provenance.versions(),
            git_revision=None,
            weights_sha256=sha256(weights),
        )
        bundle = _with_graph(Bundle(spec, files={WEIGHTS_FILE: weights}))
        save_bundle(str(folder), bundle.spec, bundle.files)
        return folder

    return make


@pytest.fixture(scope="session")
def bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, named in the environment as a user would name it."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        os.environ.update(server.environment)
        yield server


@pytest.fixture(scope="session")
def cluster(s3: S3Server) -> Cluster:
    """A local Ray, started after the credentials are in the environment that its workers inherit."""
    os.environ[connections.VARIABLE] = str(CONNECTION_SECONDS)
    return connect()


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a verb run by a test puts into the environment ends with it; that of shared fixtures stays."""
    kept = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(kept)


@dataclass(frozen=True)
class WholeWay:
    """Folders and summaries of synth, prepare, train and evaluate, and the metrics of the training."""

    photographs: Path
    data: Path
    run: Path
    evaluation: Path
    recipe: Recipe
    prepared: dict[str, Any]
    trained: dict[str, Any]
    evaluated: dict[str, Any]
    metrics: list[Sample]
    listening: set[sockets.Listening]  # while `train` ran


@pytest.fixture(scope="session")
def way(cluster, tmp_path_factory) -> WholeWay:
    """One for all processes that test side by side; nobody writes into it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    made = root / "way.pickle"
    with FileLock(root / "way.lock"):
        if not made.exists():
            made.write_bytes(pickle.dumps(_whole_way(root / "way")))
    return pickle.loads(made.read_bytes())  # noqa: S301 (these tests wrote it)


def _whole_way(root: Path) -> WholeWay:
    recipe = load_recipe("smoke", RECIPES, [f"size={SMALL}", "epochs=4"])
    folders = [root / name for name in ("photographs", "data", "way-run", "evaluation")]
    photographs, data, run, evaluation = map(str, folders)
    synth(photographs, SynthOptions(images=160, seed=3))
    prepared = prepare(photographs, data)
    with watched() as metrics, sockets.watched() as listening:
        trained = train(data, run, recipe, workers=2, device="cpu")
        await_total("ray_scalp_train_checkpoints_total", len(trained["history"]), run=folders[2].name)
        evaluated = evaluate(run, data, evaluation)
    return WholeWay(*folders, recipe, prepared, trained, evaluated, metrics, listening)


@dataclass(frozen=True)
class Alone:
    """A run of one worker that nothing disturbed, of a model that any number of workers train alike."""

    recipe: Recipe
    settings: list[str]
    trained: dict[str, Any]


@pytest.fixture(scope="session")
def train_alone(way, tmp_path_factory) -> Callable[[int], Alone]:
    """Trains so many epochs."""

    def made(epochs: int) -> Alone:
        # Without batch normalization, whose statistics are of each worker's own photographs.
        settings = [f"size={SMALL}", f"epochs={epochs}", "architecture=convnext_atto", "learning_rate=1e-3"]
        settings.append("weight_decay=0.05")
        recipe = load_recipe("smoke", RECIPES, settings)
        run = str(tmp_path_factory.mktemp("alone"))
        return Alone(recipe, settings, train(str(way.data), run, recipe, workers=1, device="cpu"))

    return made


def free_port() -> int:
    """A port on loopback that nothing listens on."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """As many, no two alike."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
