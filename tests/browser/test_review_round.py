"""The whole loop as people run it: grade, review by keyboard, decide, prepare, train, compare, promote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from scalp_core import storage
from scalp_core.bundles.registry import ENVIRONMENT
from scalp_core.datasets import manifest
from scalp_core.labels.log import read_labels
from scalp_core.results.query import ResultRows
from tests.browser.conftest import Open
from tests.browser.steps import is_photo_shown
from tests.support.command import run_scalp
from tests.support.reviewing import ids, open_review, read_grades, scalp_review

IMAGES = 30
SMALLEST = ("architecture=test_resnet", "size=32", "epochs=1")
# The few validation images cannot prove this target, so the version refers each image.
REFERS_ALL = "referral=wrong<=1%"
DIFFERENT = (2, 7, 11, 17, 23, 28)  # places of the images on which the second reader differs
DECIDED = 3  # of these; the others become soft labels


def succeed(*words: object) -> str:
    """Run a command that must succeed; return what it prints."""
    done = run_scalp(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answer(page: Page, images: list[str], grade_of: Callable[[int, str], int], count: int = IMAGES) -> None:
    """Answer the first `count` images by keyboard; each answer is saved when the next image is shown."""
    for place, image in enumerate(images[:count]):
        is_photo_shown(page, place + 1, len(images))
        page.keyboard.press(str(grade_of(place, image)))
    if count < len(images):
        is_photo_shown(page, count + 1, len(images))
    else:
        expect(page.locator("#done")).to_be_visible()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_reviewed_images_become_the_next_promoted_version(cluster, open_page: Open, tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "models"))
    known, clinic, data, more = (tmp_path / name for name in ("known", "clinic", "data", "more"))
    first, second = tmp_path / "first", tmp_path / "second"
    graded, labels = tmp_path / "graded", str(tmp_path / "labels")
    smallest = [word for setting in (*SMALLEST, REFERS_ALL) for word in ("--set", setting)]
    # The promoted version.
    succeed("synth", known, "--images", 160, "--seed", 3)
    succeed("prepare", known, data, "--local")
    succeed("train", data, first, "--recipe", "smoke", "--device", "cpu", *smallest)
    succeed("models", "add", first, "scalp")
    succeed("models", "promote", "scalp@1")
    # What it refers.
    succeed("synth", clinic, "--images", IMAGES, "--seed", 5)
    succeed("grade", "models://scalp", clinic, graded, "--local")
    with ResultRows(str(graded)) as rows:
        assert rows.rows("select count(*) as n from results where refer") == [{"n": IMAGES}]
    # Two readers by keyboard, and a third who decides.
    truth = read_grades(Path(clinic))
    images = ids(open_review(str(graded), labels))

    def differ(place: int, image: str) -> int:
        return (truth[image] + (place in DIFFERENT)) % 4

    with scalp_review(str(graded), labels, "--reader", "kim") as review:
        answer(open_page(review.url), images, lambda _, image: truth[image])
    with scalp_review(str(graded), labels, "--reader", "lee") as review:
        answer(open_page(review.url), images, differ)
    with scalp_review(str(graded), labels, "--reader", "park", "--adjudicate") as review:
        different = [images[place] for place in DIFFERENT]
        answer(open_page(review.url), different, lambda _, image: truth[image], DECIDED)
    answers = len(read_labels(labels))
    assert answers == 2 * IMAGES + DECIDED
    # The next version, on old and new labels.
    succeed("prepare", labels, more, "--extend", data, "--conflicts", "soft", "--local")
    before, after = (manifest.read_manifest(str(each)) for each in (data, more))
    new = [row for row in after.to_pylist() if row["sha256"] not in set(before["sha256"].to_pylist())]
    summary = storage.read_json(f"{more}/summary.json")
    assert new and len(new) + sum(summary["dropped"].values()) == IMAGES
    soft = {row["image_id"] for row in new if row["soft_label"]}
    assert soft and soft <= set(different[DECIDED:])
    assert {row["image_id"]: row["label"] for row in new if not row["soft_label"]}.items() <= truth.items()
    assert {row["split"] for row in new} == {"train"}
    succeed("train", more, second, "--init", "models://scalp", "--device", "cpu", "--set", "epochs=1")
    # Compared, and promoted by the comparison.
    compared = succeed(
        "evaluate", "models://scalp", second, more, tmp_path / "compared", "--no-probe", "--local"
    )
    assert "quadratic weighted kappa" in compared and "referred to a person" in compared
    succeed("models", "add", second, "scalp")
    promote = ("models", "promote", "scalp@2", "--data", more, "--max-drop", 1, "--why", "answers of readers")
    assert "compared with the promoted version" in succeed(*promote)
    entry = json.loads(storage.read(f"{tmp_path}/models/scalp/history/000002.json"))
    assert entry["version"] == 2 and entry["evidence"]["same_data"] is True
    (reviews,) = entry["reviews"]
    assert (reviews["answers"], reviews["images"]) == (answers, len(new))
    succeed("grade", "models://scalp", clinic, tmp_path / "again", "--local")
    with ResultRows(str(tmp_path / "again")) as rows:
        (version,) = rows.rows("select distinct model_version from results")
    assert version["model_version"].startswith("second-")
