"""The whole loop as a clinic runs it: grade, review on the endpoint, a kill, decide, improve, promote."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from scalp_core import storage
from scalp_core.bundles.registry import ENVIRONMENT
from scalp_core.datasets import manifest
from scalp_core.labels.log import read_labels
from scalp_core.results.query import ResultRows
from serving.auth.keys import KeySettings
from serving.schemas.review import ReviewSettings
from serving.settings import Settings
from tests.browser.conftest import Open
from tests.browser.steps import enter_key, is_photo_shown
from tests.support.command import run_scalp
from tests.support.ports import free_port
from tests.support.reviewing import ids, open_review, read_grades, write_keys
from tests.support.served import PRECISION, scalp_serve

IMAGES = 30
BEFORE = 15  # answers of the first reader before the kill, and one less of the second
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


def answer(page: Page, grades: list[int], shown: int = 0) -> None:
    """Answer all open images by keyboard, of which the page has shown and answered `shown` before."""
    for place, grade in enumerate(grades, shown + 1):
        is_photo_shown(page, place, len(grades) + shown)
        page.keyboard.press(str(grade))
    expect(page.locator("#done")).to_be_visible()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_images_that_two_readers_review_become_the_next_promoted_version(
    cluster, open_page: Open, tmp_path, monkeypatch
):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "models"))
    known, clinic, data, first = (tmp_path / name for name in ("known", "clinic", "data", "first"))
    graded, labels, out = tmp_path / "graded", str(tmp_path / "labels"), tmp_path / "round"
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
    images, truth = ids(open_review(str(graded), labels)), read_grades(Path(clinic))
    given = {
        "kim": [truth[image] for image in images],
        "lee": [(truth[image] + (place in DIFFERENT)) % 4 for place, image in enumerate(images)],
    }
    different = [images[place] for place in DIFFERENT]
    # Two readers by keyboard, a kill of all processes of the endpoint, and a third reader who decides.
    keys = write_keys(tmp_path / "keys", kim="review", lee="review", park="adjudicate")
    settings = Settings(
        device="cpu",
        precision=PRECISION,
        keys=KeySettings(file=str(tmp_path / "keys")),
        review=ReviewSettings(graded=str(graded), labels=labels),
    )
    port = free_port()
    with scalp_serve(first, settings, tmp_path, port, killed=True) as endpoint:
        kim, lee = (open_page(f"{endpoint.origin}/review") for _ in range(2))
        for name, page in (("kim", kim), ("lee", lee)):
            enter_key(page, keys[name])
            expect(page.locator("#reader")).to_have_text(f"Reader: {name}")
        for place in range(BEFORE):
            for name, page in (("kim", kim), ("lee", lee)):
                is_photo_shown(page, place + 1, IMAGES)
                assert page.locator('[aria-pressed="true"].answer').count() == 0  # blind
                if (name, place) != ("lee", BEFORE - 1):
                    page.keyboard.press(str(given[name][place]))
        is_photo_shown(kim, BEFORE + 1, IMAGES)
        endpoint.kill()
        kim.keyboard.press(str(given["kim"][BEFORE]))
        expect(kim.locator("#problem")).to_contain_text("Not saved.")
    assert Counter(label.reader for label in read_labels(labels)) == {"kim": BEFORE, "lee": BEFORE - 1}
    with scalp_serve(first, settings, tmp_path, port, killed=True):
        # The first page goes on, the second is opened again: neither shows an answered image.
        kim.keyboard.press(str(given["kim"][BEFORE]))
        answer(kim, given["kim"][BEFORE + 1 :], shown=1)
        lee.reload()
        answer(lee, given["lee"][BEFORE - 1 :])
        lee.get_by_role("button", name="Change reader").click()
        enter_key(lee, keys["park"])
        expect(lee.locator("#reader")).to_have_text("Deciding between readers: park")
        for place, image in enumerate(different[:DECIDED], 1):
            is_photo_shown(lee, place, len(different))
            expect(lee.locator("#others-list li")).to_have_count(2)
            lee.keyboard.press(str(truth[image]))
        is_photo_shown(lee, DECIDED + 1, len(different))
    # Nothing is lost, and nothing is there twice.
    saved = [(label.reader, label.image_id, label.grade) for label in read_labels(labels)]
    expected = [
        (name, image, grade) for name in given for image, grade in zip(images, given[name], strict=True)
    ]
    expected += [("park", image, truth[image]) for image in different[:DECIDED]]
    assert Counter(saved) == Counter(expected)
    # The next version, on old and new labels, compared and promoted by the comparison.
    improved = succeed(
        "improve", "models://scalp", labels, data, out, "--conflicts", "soft", "--device", "cpu",
        "--promote", "--max-drop", 1, "--why", "answers of readers",
    )  # fmt: skip
    assert "quadratic weighted kappa" in improved and "referred to a person" in improved
    assert "compared with the promoted version" in improved
    before, after = (manifest.read_manifest(str(each)) for each in (data, out / "data"))
    new = [row for row in after.to_pylist() if row["sha256"] not in set(before["sha256"].to_pylist())]
    summary = storage.read_json(f"{out}/data/summary.json")
    assert new and len(new) + sum(summary["dropped"].values()) == IMAGES
    soft = {row["image_id"] for row in new if row["soft_label"]}
    assert soft and soft <= set(different[DECIDED:])
    assert {row["image_id"]: row["label"] for row in new if not row["soft_label"]}.items() <= truth.items()
    assert {row["split"] for row in new} == {"train"}
    entry = json.loads(storage.read(f"{tmp_path}/models/scalp/history/000002.json"))
    assert entry["version"] == 2 and entry["evidence"]["same_data"] is True
    (reviews,) = entry["reviews"]
    assert (reviews["answers"], reviews["images"]) == (len(expected), len(new))
    succeed("grade", "models://scalp", clinic, tmp_path / "again", "--local")
    with ResultRows(str(tmp_path / "again")) as rows:
        (version,) = rows.rows("select distinct model_version from results")
    assert version["model_version"].startswith("scalp-")
