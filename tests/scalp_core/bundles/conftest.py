"""Fixtures of a registry and of runs with bundles to add."""

import os
import shutil

import pytest

from scalp_core.bundles.bundle import CARD_FILE, save_bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import open_registry


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path, s3, monkeypatch):
    """An empty registry, set in the environment as by a user."""
    root = str(tmp_path / "models") if request.param == "local" else f"s3://scalp/models/{tmp_path.name}"
    monkeypatch.setenv("SCALP_MODELS", root)
    return open_registry()


@pytest.fixture
def run(bundle, tmp_path):
    """Make runs with different contracts: the nth has temperature n."""

    def make(number, **changes):
        folder = tmp_path / f"run-{number}"
        spec = load_bundle(str(bundle)).spec.model_copy(update={"temperature": float(number), **changes})
        shutil.copytree(bundle, folder / "bundle", copy_function=os.link)  # nothing writes into a file
        save_bundle(str(folder / "bundle"), spec, {CARD_FILE: b"card", "curves.png": b"picture"})
        return str(folder)

    return make
