"""`report.html`: complete, correct, self-contained, and safe with untrusted file names."""

import io
import json
import re
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from jobs.grade import report as verb
from jobs.grade.report import QUEUE, write_report
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets.manifest import SplitSpec
from scalp_core.errors import IMAGE_CODES, UserError
from scalp_core.images import gates as image_gates
from scalp_core.inference import overlay
from scalp_core.results.drift import count_statistics
from tests.scalp_core.results.test_drift import LUMA, draw
from tests.support.images import jpeg
from tests.support.korean_view import untranslated
from tests.support.report_page import Page
from tests.support.result_rows import failed, referred, row, write

DEVICE = "0013_A2LEBJJDE00060O_160257830377{}_3_TH.jpg"
ODD = "<script>alert(1)</script> \" onload='x' {{ 7 * 7 }} &lt;.jpg"


def summary_of(rows, **changes):
    def counted(name):
        return dict(Counter(each[name] for each in rows if each.get(name)).most_common())

    reasons = Counter(chain.from_iterable(each.get("refer_reasons") or () for each in rows))
    failures = sum(each["status"] == "failed" for each in rows)
    return {
        "date": "2026-11-25T20:00:00+00:00",
        "model_version": "made-1",
        "sources": ["/data/clinic"],
        "rows": len(rows),
        "graded": len(rows) - failures,
        "failed": failures,
        "rows_unaccounted": 0,
        "by_grade": counted("grade_name"),
        "by_error": counted("error_code"),
        "by_reason": dict(reasons.most_common()),
        "referred": sum(bool(each.get("refer")) for each in rows),
    } | changes


@pytest.fixture(scope="module")
def ungated(bundle):
    return load_bundle(str(bundle))


@pytest.fixture(scope="module")
def gated(ungated):
    """The bundle with gates, and equally many training images per grade."""
    gates = image_gates.fit_gates(draw(4000, 0), draw(1000, 1))
    training = ungated.spec.training.model_copy(update={"grade_counts": [1000] * 4})
    return Bundle(ungated.spec.model_copy(update={"gates": gates, "training": training}), ungated.uri)


@pytest.fixture
def report(tmp_path, ungated):
    """Write the report of rows, and parse it."""

    def make(rows, bundle=ungated, heatmaps=0, **changes):
        out = str(tmp_path / "out")
        write(f"{out}/results", rows, files=1)
        storage.write(f"{out}/summary.json", b"{}")
        write_report(out, summary_of(rows, **changes), bundle, heatmaps)
        return Page(storage.read(f"{out}/report.html").decode())

    return make


def photographs(folder, number, **options):
    """Referred rows of existing images, the least sure first."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(number):
        path = folder / DEVICE.format(index)
        path.write_bytes(jpeg(index, **options))
        rows.append(referred(str(path), "ambiguous_grade", sure=0.3 + index / 100, grade=index % 4))
    return rows


# --- what one must see at once ------------------------------------------------------------------------------


def test_report_begins_with_counts(report):
    rows = [
        *(row(f"/data/clinic/{index}.jpg", grade=index % 4) for index in range(94)),
        referred("/data/clinic/r.jpg", "low_confidence", "ambiguous_grade"),
        *(failed(f"/data/clinic/e{index}.jpg", "empty") for index in range(2)),
        *(failed(f"/data/clinic/c{code}.jpg", code) for code in ("corrupt", "truncated", "not_an_image")),
    ]
    text = report(rows).text
    assert "100 images /data/clinic graded by made-1, 2026-11-25 20:00:00 UTC" in text
    assert "✓ all accounted for 100 images, exactly one row each: 95 graded, 5 failed" in text
    assert "5 failed 5.0 %: empty file 2, damaged 1, incomplete file 1 and 1 more" in text
    assert "1 to look at 1.1 % of the graded: low confidence 1, more than one grade is plausible 1" in text


def test_other_symptoms_are_counted_by_grade(report, make_bundle, tmp_path):
    six = load_bundle(str(make_bundle(tmp_path / "six", symptoms=6)))

    def others(dandruff):
        return {"dandruff": {"grade": dandruff, "grade_name": "", "probabilities": [0.25] * 4}}

    rows = [row(f"/data/{index}.jpg", other_symptoms=others(min(index, 3))) for index in range(9)]
    page = report([*rows, failed("/data/broken.jpg", "empty")], bundle=six)
    assert "dandruff 9 1 1 1 6" in page.text and "hair loss" not in page.text  # which has no temperature
    assert "Four grades of micro-keratin, excess sebum, erythema between follicles" in page.text
    assert not untranslated(page.raw)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"rows_unaccounted": 3}, "3 of 40 images are not accounted for exactly once; run"),
        ({"failed": 10, "by_error": {"empty": 4, "not_found": 6}},
         "25% of the images failed, most of them (6) because the file was listed but no longer exists"),
    ],
)  # fmt: skip
def test_warnings_are_at_the_top(report, changes, warning):
    rows = [row(f"/data/clinic/{index}.jpg", grade=index % 4) for index in range(40)]
    assert warning in report(rows, **changes).text
    assert ("class", "warn") not in {each[1:] for each in report(rows).attributes}


def test_leaky_model_has_a_warning(report, ungated):
    split = SplitSpec(method="random", ratio="7:2:1", seed=0, keys=("content",), leaking_pairs={"device": 9})
    training = ungated.spec.training.model_copy(update={"split": split})
    leaky = Bundle(ungated.spec.model_copy(update={"training": training}), ungated.uri)
    assert f"the model was trained on a {split.warning}" in report([row("/a/b.jpg")], leaky).text


@pytest.mark.medium
def test_each_text_has_a_korean_one(report, gated, tmp_path, monkeypatch):
    dark = draw(2000, 2)
    dark[:, LUMA] *= 0.7
    rows = photographs(tmp_path / "clinic", 9)
    rows[0] |= {"unlikeness": 3.5, "refer_reasons": ["unlike_training", "too_dark"]}
    rows += [referred("/gone/a.jpg", "low_confidence"), *even(2000)]
    rows += [failed(f"/data/{code}.jpg", code) for code in IMAGE_CODES for _ in range(20)]
    changes = {
        "inputs": counted(dark, gated),
        "rows_unaccounted": 2,
        "settings": {"device": "cpu", "models": [2, 2], "tta": False},
        "sessions": [{"started_at": "2026-11-25T19:00:00+00:00", "seconds": 9.0, "photographs": 5}] * 2,
        "photographs_per_second": 5.0,
        "computed_by": "cpu bf16",
    }
    split = SplitSpec(method="random", ratio="7:2:1", seed=0, keys=("content",), leaking_pairs={"device": 9})
    training = gated.spec.training.model_copy(update={"split": split, "synthetic": True})
    leaky = Bundle(gated.spec.model_copy(update={"training": training}), gated.uri)
    assert untranslated(report(rows, leaky, 2, **changes).raw) == []
    monkeypatch.setattr("jobs.grade.report.make_explainer", None)
    assert untranslated(report(rows, heatmaps=2).raw) == []
    assert untranslated(report([row("/data/a.jpg")], gated).raw) == []


# --- unlike the training split ------------------------------------------------------------------------------


def even(number=2000):
    return [row(f"/data/{index}.jpg", grade=index % 4) for index in range(number)]


def counted(statistics, bundle):
    return json.loads(count_statistics(statistics, bundle.spec.gates).model_dump_json())


def classes(page):
    return [value for _, name, value in page.attributes if name == "class"]


def test_images_like_training_raise_no_flag(report, gated):
    page = report(even(), gated, inputs=counted(draw(2000, 2), gated))
    assert "✓ no drift against the training split: the grade mix and 19 image statistics" in page.text
    assert "no drift: all compared values are like the training split" in page.text
    assert not {"warn", "tile bad", "level strong", "level some"} & set(classes(page))
    assert classes(page).count("level none") == 20


def test_darker_images_raise_the_flag(report, gated):
    dark = draw(2000, 2)
    dark[:, LUMA] *= 0.7
    page = report(even(), gated, inputs=counted(dark, gated))
    assert "DRIFT: a strong difference from the training split in brightness; look at some" in page.text
    assert "▲▲ STRONG drift" in page.text
    assert {"warn", "tile bad"} <= set(classes(page))
    assert classes(page).count("level strong") == 1


def test_other_grade_mix_raises_the_flag_without_gates_too(report, ungated, gated):
    rows = [row(f"/data/{index}.jpg", grade=0) for index in range(2000)]
    assert "DRIFT: a strong difference from the training split in the grade mix" in report(rows, gated).text
    training = ungated.spec.training.model_copy(update={"grade_counts": [10, 500, 700, 300]})
    plain = Bundle(ungated.spec.model_copy(update={"training": training}), ungated.uri)
    text = report(rows, plain).text
    assert "the grade mix alone" in text
    assert "(only the grade mix was compared: the bundle has no gates)" in text


def test_few_images_raise_no_flag(report, gated):
    page = report([row("/data/a.jpg")], gated, inputs=counted(draw(1, 2), gated))
    assert "too few to detect drift" in page.text
    assert "tile bad" not in classes(page)


# --- what a person should look at ---------------------------------------------------------------------------


def test_review_queue_shows_images_and_heatmaps_in_order(report, tmp_path):
    rows = photographs(tmp_path / "clinic", 8)
    page = report([*rows[::-1], row("/data/sure.jpg")], heatmaps=3)
    assert page.shown("as-seen") == 8
    assert page.shown("with-heat") == 3
    assert len(page.pictures()) == 11
    assert len(page.pictures("png")) == 1  # the scale
    assert "The second picture shows " + overlay.MEANING in page.text
    places = [page.text.index(each["uri"]) for each in rows]
    assert places == sorted(places)
    assert "2 more" in page.text  # six are open
    assert "sure.jpg" not in page.text
    first = np.asarray(Image.open(io.BytesIO(page.pictures()[0])))
    assert first.shape == (64, 64, 3)


def test_out_of_distribution_images_have_a_separate_queue(report, tmp_path):
    rows = photographs(tmp_path / "clinic", 3)
    rows[0] |= {"unlikeness": 3.5, "refer_reasons": ["unlike_training"]}
    text = report(rows).text
    least_like = text.index("Least like the training split")
    assert text.count(rows[0]["uri"]) == 1
    assert text.index(rows[0]["uri"]) > least_like > text.index(rows[2]["uri"])
    assert "unlikeness 3.50" in text


def test_review_queue_is_limited(report, tmp_path):
    page = report(photographs(tmp_path / "clinic", QUEUE + 5, size=(64, 48)))
    assert page.tags["article"] == QUEUE
    assert f"{QUEUE + 5} images are referred." in page.text


def test_report_without_heatmaps_loads_no_model(report, tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.grade.report.make_explainer", None)
    page = report(photographs(tmp_path / "clinic", 2), heatmaps=0)
    assert "Heatmaps were turned off." in page.text
    assert page.shown("as-seen") == 2
    assert not page.pictures("png")


def test_report_of_a_model_without_heatmaps(report, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise UserError("vit_tiny has no convolutional map of the picture\nmore")

    monkeypatch.setattr("jobs.grade.report.make_explainer", refuse)
    page = report(photographs(tmp_path / "clinic", 2), heatmaps=2)
    assert "Heatmaps are missing: vit_tiny has no convolutional map of the picture ." in page.text
    assert page.shown("as-seen") == 2


def test_unreadable_images_of_the_queue_are_reported(report, tmp_path):
    rows = photographs(tmp_path / "clinic", 3)
    (tmp_path / "clinic" / DEVICE.format(0)).unlink()
    (tmp_path / "clinic" / DEVICE.format(1)).write_bytes(b"now a text")
    page = report([*rows, referred("/gone/a.zip", "low_confidence", member="b.jpg")], heatmaps=4)
    assert "3 of them cannot be read any more." in page.text
    assert page.text.count("it cannot be read any more:") == 3
    assert page.shown("as-seen") == page.shown("with-heat") == 1


def test_embedded_images_have_no_metadata(report, tmp_path):
    exif = Image.Exif()
    exif[0x013B], exif[0x8825] = "Kim Minji", {1: "N", 2: (37.0, 33.0, 0.0)}
    page = report(photographs(tmp_path / "clinic", 2, exif=exif, comment=b"Kim Minji"), heatmaps=2)
    assert len(page.pictures()) == 4
    for data in [*page.pictures(), *page.pictures("png")]:
        found = Image.open(io.BytesIO(data))
        assert not found.getexif()
        assert set(found.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert b"Kim" not in data


# --- what failed, where, how fast ---------------------------------------------------------------------------


def test_failures_by_code_with_examples(report):
    rows = [
        *(failed(f"/data/{index}.jpg", "empty", "the file has no bytes") for index in range(5)),
        failed("/data/a.zip", "truncated", "the JPEG ends before the picture does", "b/c.jpg"),
        row("/data/fine.jpg"),
    ]
    text = report(rows).text
    assert text.count("the file has no bytes") == 2  # the warning and the code; the examples say no other
    assert len(re.findall(r"/data/\d\.jpg", text)) == verb._EXAMPLES
    assert "/data/a.zip!b/c.jpg: the JPEG ends before the picture does" in text
    assert "Every image could be graded." in report([row("/data/fine.jpg")]).text


def test_folders_and_microscopes(report):
    rows = [
        *(row(f"/data/clinic/north/{DEVICE.format(index)}", grade=3) for index in range(3)),
        failed("/data/clinic/south/x.jpg", "empty"),
        row("/data/clinic/2024.zip", "a.jpg"),
        row("/data/clinic/loose.jpg"),
    ]
    text = report(rows).text
    assert "Folders and archives in /data/clinic/" in text
    places = text[text.index("Folders and archives") :]
    for line in ("north 3 0 0 2.40", "south 1 1 (100.0 %) 0", "2024.zip 1 0 0 1.20", "(directly in it) 1 0 0",
                 "A2LEBJJDE00060O 3 0 0", "(no such name) 3 1 (33.3 %) 0"):  # fmt: skip
        assert line in places, line
    assert "Microscopes" not in report([row("/data/a.jpg")]).text
    many = report([row(f"/data/{index:03d}/a.jpg") for index in range(verb._GROUPS + 7)]).text
    assert "And 7 more; scalp results OUT --by folder shows all." in many


def test_throughput(report):
    rows = [row("/data/a.jpg")]
    sessions = [
        {"started_at": "2026-11-25T19:00:00+00:00", "seconds": 10.0, "photographs": 500},
        {"started_at": "2026-11-25T19:30:00+00:00", "seconds": 20.0, "photographs": 3000},
    ]
    throughput = {
        "photographs_per_second": 116.7,
        "machine_hours": 0.008,
    }
    page = report(rows, sessions=sessions, **throughput)
    assert "116.7 images per second, 0.008 machine hours." in page.text
    assert "2026-11-25 19:30:00 UTC 20.0 3,000 150.0" in page.text
    assert (
        "19:00:00 UTC" not in report(rows, sessions=sessions[:1], **throughput).text
    )  # it says nothing more
    assert "It was not recorded." in report(rows).text


def test_report_of_a_run_with_only_failures(report, gated):
    rows = [failed(f"/data/{index}.jpg", "empty") for index in range(400)]
    page = report(rows, gated, heatmaps=3, inputs=counted(draw(0, 2), gated))
    assert "400 failed 100.0 %: empty file 400" in page.text
    assert "too few to detect drift" in page.text
    assert "No image is referred." in page.text
    assert "mean expected severity" not in page.text


# --- by itself, and safe ------------------------------------------------------------------------------------


def test_report_has_no_scripts_and_no_requests(report, tmp_path):
    page = report(photographs(tmp_path / "clinic", 8), heatmaps=8)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name != "style", tag  # its policy forbids them
        if name in ("src", "href", "srcset", "data", "action", "poster"):
            assert value.startswith(("data:image/", "#")), (tag, name, value)
    assert not re.search(r"https?://|@import|url\(", page.raw)
    (policy,) = [
        value for tag, name, value in page.attributes if name == "content" and "default-src" in value
    ]
    assert "default-src 'none'" in policy


def test_file_names_are_escaped(report):
    rows = [
        referred(f"/data/{ODD}", "low_confidence"),
        failed(f"/data/x{ODD}", "empty", f"<b>{ODD}"),
        row(f"/data/<i>{ODD}/a.jpg"),
    ]
    page = report(rows, sources=[f"/src/{ODD}"])
    assert not {"script", "b>", "i"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for shown in (f"/data/{ODD}", f"/data/x{ODD}: <b>{ODD}", f"<i>{ODD.split('/')[0]}", f"/src/{ODD}"):
        assert shown in page.text
