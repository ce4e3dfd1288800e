"""A run directory belongs to one recipe and to one set of labels."""

from datetime import UTC, datetime

import pytest

from jobs.common.console import write_json
from jobs.train.driver import IDENTITY_FILE, check_identity, identify
from scalp_core.datasets.manifest import DataSpec, SplitSpec
from scalp_core.errors import UserError
from scalp_core.models.recipe import Recipe

SPLIT = SplitSpec(method="group", ratio="7:2:1", seed=0, keys=("content",))


def data(labels: str) -> DataSpec:
    return DataSpec(
        created_at=datetime(2026, 11, 30, tzinfo=UTC), source="images", layout="aihub", task="json",
        symptom="미세각질", split=SPLIT, photographs=9, sha256="1" * 64, labels_sha256=labels * 64,
    )  # fmt: skip


def test_other_labels_of_other_symptoms_are_another_training(tmp_path):
    one, six = Recipe(), Recipe(symptoms="all")
    for name, recipe in (("one", one), ("six", six)):
        write_json(str(tmp_path / name / IDENTITY_FILE), identify(recipe, data("2"), None))
    check_identity(str(tmp_path / "one"), identify(one, data("3"), None))
    check_identity(str(tmp_path / "six"), identify(six, data("2"), None))
    with pytest.raises(UserError, match="holds a run with another labels_sha256; choose another RUN"):
        check_identity(str(tmp_path / "six"), identify(six, data("3"), None))


def test_a_run_that_began_before_a_setting_existed_resumes(tmp_path):
    stored = identify(Recipe(), data("2"), None)
    del stored["recipe"]["symptoms"]
    write_json(str(tmp_path / IDENTITY_FILE), stored)
    check_identity(str(tmp_path), identify(Recipe(), data("2"), None))
    with pytest.raises(UserError, match=r"symptoms one \(now all\)"):
        check_identity(str(tmp_path), identify(Recipe(symptoms="all"), data("2"), None))
