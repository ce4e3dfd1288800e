"""One tiny run of the whole way, shared by the tests that look at its parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.evaluate import evaluate
from jobs.prepare import prepare
from jobs.synth import synth
from jobs.train import RECIPES, train
from scalp_core.recipe import Recipe, load_recipe
from scalp_core.synthetic import SynthOptions
from tests.conftest import SMALL


@dataclass(frozen=True)
class WholeWay:
    """Folders and summaries of synth, prepare, train and evaluate."""

    photographs: Path
    data: Path
    run: Path
    evaluation: Path
    recipe: Recipe
    prepared: dict[str, Any]
    trained: dict[str, Any]
    evaluated: dict[str, Any]


@pytest.fixture(scope="session")
def way(cluster, tmp_path_factory) -> WholeWay:
    root = tmp_path_factory.mktemp("way")
    recipe = load_recipe("smoke", RECIPES, [f"size={SMALL}", "epochs=2"])
    folders = [root / name for name in ("photographs", "data", "run", "evaluation")]
    photographs, data, run, evaluation = map(str, folders)
    synth(photographs, SynthOptions(images=160, seed=3))
    prepared = prepare(photographs, data)
    trained = train(data, run, recipe, workers=2, device="cpu")
    return WholeWay(*folders, recipe, prepared, trained, evaluate(run, data, evaluation))
