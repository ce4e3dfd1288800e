"""Audit: kept and dropped images and findings, the same in all layouts; planted faults are counted."""

import io
import json
import shutil
import zipfile
from collections import Counter
from functools import cache
from hashlib import sha256
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from scalp_core.datasets import manifest, scan
from scalp_core.errors import UserError
from scalp_core.grades import SYMPTOMS
from scalp_core.reports.data import list_warnings
from tests.support.images import jpeg
from tests.support.layouts import LAYOUTS, REARRANGED, WRITTEN, rearrange
from tests.support.sources import PLANS, audited, audited_rows, examined, folder_of, picture, write_set

pytestmark = pytest.mark.medium

RATIO = "2:1:1"


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same photographs in every layout."""
    root = tmp_path_factory.mktemp("layouts")
    for layout in WRITTEN:
        write_set(root / layout, layout)
    for layout in REARRANGED:
        rearrange(root / "delivered", root / layout, layout)
    return root


@pytest.fixture(scope="module")
def audited_layout(layouts):
    """Audit a layout, which is listed and examined once for all options."""
    examine = cache(lambda layout: examined(layouts / layout))

    def audit(layout, out, **options):
        return audited_rows(examine(layout), out, str(layouts / layout), **options)

    return audit


@pytest.fixture(scope="module", params=["folder", "json"])
def expected(request, audited_layout, tmp_path_factory):
    out = tmp_path_factory.mktemp("delivered")
    return request.param, audited_layout("delivered", out, task=request.param, ratio=RATIO)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_manifest(layout, audited_layout, expected, tmp_path):
    task, delivered = expected
    found = audited_layout(layout, tmp_path, task=task, ratio=RATIO)
    assert found.table.num_rows == len(PLANS)
    where = ["uri", "member", "byte_offset", "byte_length", "compression"]
    assert found.table.drop_columns(where).equals(delivered.table.drop_columns(where))
    assert found.summary["spec"]["sha256"] == delivered.summary["spec"]["sha256"]
    for name in ("objects", "dropped", "findings", "parts"):
        assert found.summary[name] == delivered.summary[name]


def test_rows_say_what_is_known(expected):
    _, delivered = expected
    rows = {row["uri"].rsplit("/", 1)[-1]: row for row in delivered.table.to_pylist()}
    for plan in PLANS:
        row = rows[f"{plan.stem}.jpg"]
        assert row["label"] == plan.grade
        assert tuple(row["labels"]) == plan.symptoms
        assert (row["site"], row["device"]) == (plan.device.site, plan.device.serial)
        assert row["group"] == f"{plan.device.site}_{plan.device.serial}"
        assert (row["position"], row["source_note"]) == (plan.meta["location"], plan.part)
        assert row["sex"] == {"남": "male", "여": "female"}[plan.meta["gender"]]
        assert row["age"] == plan.meta["age"].replace("대", "s")
        assert (row["width"], row["height"]) == (640, 480)


# The symptom graded, which is in `labels` too, and another one; the others run in the night.
@pytest.mark.parametrize(
    "symptom",
    [*SYMPTOMS[:2], *(pytest.param(symptom, marks=pytest.mark.slow) for symptom in SYMPTOMS[2:])],
)
def test_any_symptom_in_both_tasks(symptom, audited_layout, tmp_path):
    number = SYMPTOMS.index(symptom)
    in_folders = [plan for plan in PLANS if plan.symptoms[number] or not any(plan.symptoms)]
    options = {"symptom": symptom, "ratio": "1:1:1"}
    folder = audited_layout("delivered", tmp_path / "folder", task="folder", **options)
    assert Counter(folder.table["label"].to_pylist()) == Counter(plan.symptoms[number] for plan in in_folders)
    values = audited_layout("delivered", tmp_path / "json", task="json", **options)
    assert Counter(values.table["label"].to_pylist()) == Counter(plan.symptoms[number] for plan in PLANS)


# --- faults ------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """Every photograph once, so that what is planted is all there is."""
    write_set(tmp_path / "set", every_symptom=False)
    return tmp_path / "set"


def photographs(source, grade, part="Training"):
    folder = sorted((source / part).glob(f"[[]원천]{SYMPTOMS[0]}_{grade}.*"))[0]
    return sorted(folder.glob("*.jpg"))


def label_of(photograph):
    folder = photograph.parent.name.replace("원천", "라벨")
    return photograph.parents[1] / folder / f"{photograph.stem}.json"


def copy_to(photograph, folder, stem=None):
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(photograph, folder / f"{stem or photograph.stem}.jpg"))


def test_a_sound_source_has_nothing_dropped_or_found(source, tmp_path):
    found = audited(source, tmp_path / "out", ratio=RATIO)
    assert found.summary["dropped"] == {}
    assert not any(found.summary["findings"].values())
    assert found.dropped == found.findings == []


def test_every_planted_fault_is_found_and_counted(source, tmp_path):
    mild = photographs(source, 1)
    hair_loss = [json.loads(label_of(mild[index]).read_text())["value_6"] for index in (0, 4)]
    training, validation = source / "Training", source / "Validation"
    # The same content: under another symptom; in both parts; under two grades.
    copy_to(mild[0], training / "[원천]탈모_1.경증")
    copy_to(mild[1], validation / mild[1].parent.name)
    copy_to(mild[2], training / "[원천]미세각질_2.중등도")
    # Pairs that miss a half.
    label_of(mild[3]).unlink()
    (training / "[라벨]미세각질_1.경증" / "lonely.json").write_bytes(label_of(mild[4]).read_bytes())
    next((source / "Meta").iterdir()).rename(source / "Meta" / "lonely_META.json")
    # Wrong values; a label that disagrees with the folder; label files that contradict each other.
    values = json.loads(label_of(mild[5]).read_text())
    label_of(mild[5]).write_text(json.dumps(values | {"value_4": "9"}))
    label_of(mild[6]).write_text(json.dumps(values | {"value_1": "3"}))
    other = training / "[라벨]비듬_1.경증"
    other.mkdir(exist_ok=True)
    (other / label_of(mild[7]).name).write_text(json.dumps(values | {"value_6": "3", "value_1": "2"}))
    # Files that are not images.
    (mild[0].parent / "text.jpg").write_bytes(b"a text")
    (mild[0].parent / "torn.jpg").write_bytes(mild[8].read_bytes()[:9000])
    # The same picture in other bytes, with another grade; another content under a name that is taken.
    Image.open(mild[9]).save(photographs(source, 2)[0].parent / "again.jpg", quality=60)
    copy_to(photographs(source, 2)[1], training / "[원천]탈모_2.중등도", mild[4].stem)
    # A zip with a corrupt member.
    with zipfile.ZipFile(training / "[원천]미세각질_3.중증.zip", "w") as archive:
        archive.writestr("whole.jpg", jpeg(1))
        archive.writestr("spoilt.jpg", jpeg(2))
    data = bytearray((training / "[원천]미세각질_3.중증.zip").read_bytes())
    data[data.rindex(b"spoilt.jpg", 0, len(data) - 200) + 300] ^= 0xFF
    (training / "[원천]미세각질_3.중증.zip").write_bytes(bytes(data))

    found = audited(source, tmp_path / "out", ratio="1:1:1")
    assert found.summary["dropped"] == {
        "other_symptom": 2,
        "conflicting_labels": 2,
        "duplicate_content": 1,
        "fetch_failed": 1,
        "not_an_image": 1,
        "truncated": 1,
    }
    assert {word: count for word, count in found.summary["findings"].items() if count} == {
        # without its label; the two that are not images; again; the zip's two
        "photograph_without_label": 6,
        "label_without_photograph": 1,
        "meta_without_photograph": 1,
        "bad_label_file": 1,
        "label_files_differ": 1,
        # the changed value, the copy in the folder of another grade, and the two copies under 탈모
        "folder_and_label_file_differ": 2 + (hair_loss[0] != "1") + (hair_loss[1] != "2"),
        "content_in_several_symptoms": 2,
        "content_in_both_parts": 1,
        "conflicting_contents": 1,
        "same_name_other_content": 1,
        "near_duplicate": 1,
        "near_duplicate_labels_differ": 1,
    }
    assert found.summary["objects"]["photograph"] == found.table.num_rows + len(found.dropped)
    reasons = {row["uri"].rsplit("/", 1)[-1]: row["reason"] for row in found.dropped}
    assert reasons["text.jpg"] == "not_an_image"
    assert reasons[mild[2].name] == "conflicting_labels"
    details = {row["finding"]: row["detail"] for row in found.findings}
    assert "value_4 is '9'" in details["bad_label_file"]
    assert details["near_duplicate_labels_differ"] == "labels 1 and 2"


def test_label_files_are_the_truth_of_the_json_task(source, tmp_path):
    mild = photographs(source, 1)
    label_of(mild[0]).unlink()
    label_of(mild[1]).write_text("{}")
    values = json.loads(label_of(mild[2]).read_text())
    label_of(mild[2]).write_text(json.dumps(values | {"value_1": "3"}))
    other = source / "Training" / "[라벨]비듬_1.경증"
    other.mkdir(exist_ok=True)
    (other / label_of(mild[3]).name).write_text(json.dumps(values | {"value_1": "0"}))
    found = audited(source, tmp_path / "out", task="json", ratio=RATIO)
    assert found.summary["dropped"] == {"bad_label": 1, "conflicting_labels": 1, "no_label": 1}
    rows = {row["uri"]: row["label"] for row in found.table.to_pylist()}
    assert rows[str(mild[2])] == 3


def test_copies_and_near_copies_tie_their_groups_together(source, tmp_path):
    one = next(plan for plan in PLANS if plan.grade == 1)
    others = [plan for plan in PLANS if plan.grade == 1 and plan.device.serial != one.device.serial]
    folder = source / folder_of(one)
    shot = f"{others[0].stem[:-4]}9_TH"  # another device's name on the same bytes
    (folder / f"{shot}.jpg").write_bytes(picture(one.index))
    Image.open(io.BytesIO(picture(one.index))).save(folder / f"{others[-1].stem[:-4]}9_TH.jpg", quality=50)
    found = audited(source, tmp_path / "out", ratio=RATIO)
    groups = group_of_each_picture(found)
    assert len({groups[plan.index] for plan in (one, others[0], others[-1])}) == 1
    apart = audited(source, tmp_path / "apart", ratio=RATIO, keys=("device",))
    groups = group_of_each_picture(apart)
    assert groups[one.index] == groups[others[0].index] != groups[others[-1].index]


def group_of_each_picture(found):
    groups = {row["sha256"]: row["group"] for row in found.table.to_pylist()}
    return [groups[sha256(picture(plan.index)).hexdigest()] for plan in PLANS]


def copy_to_microscopes(source, data, number):
    """Writes one image under the names of so many microscopes; their plans."""
    plans = {plan.device.serial: plan for plan in PLANS if plan.part == "Training"}
    chosen = list(plans.values())[:number]
    for plan in chosen:
        (source / folder_of(chosen[0]) / f"{plan.stem[:-4]}9_TH.jpg").write_bytes(data)
    return chosen


def test_an_image_of_many_microscopes_joins_none_and_is_reported(source, tmp_path):
    """A "no signal" frame on each microscope made one group of all, and the source was refused."""
    card = np.random.default_rng(1).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    for name, image, number in (("card", Image.fromarray(card), 5), ("black", Image.new("RGB", (16, 12)), 2)):
        buffer = io.BytesIO()
        image.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        copy_to_microscopes(source, buffer.getvalue(), number)
        found = audited(source, tmp_path / name, ratio=RATIO)
        groups = {row["device"]: row["group"] for row in found.table.to_pylist()}
        assert len(set(groups.values())) == len({plan.device.serial for plan in PLANS})
        assert found.summary["findings"]["joins_many_groups"] == 1
        joints = [row for row in found.findings if row["finding"] == "joins_many_groups"]
        assert joints[0]["detail"] == f"{number} images in {number} groups"
        assert any("join none" in line for line in warnings_of(found))
        for path in source.rglob("*9_TH.jpg"):
            path.unlink()


def test_too_few_groups_are_refused_with_the_way_out(tmp_path):
    lines = ["uri,label,group"]
    for index in range(16):
        (tmp_path / f"{index}.jpg").write_bytes(picture(0 if index % 8 == 0 else index))
        lines.append(f"{index}.jpg,{1 if index % 8 == 0 else index % 4},{'ab'[index // 8]}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match="1 group cannot be divided into 3; .*without near_duplicate"):
        audited(tmp_path / "t.csv", tmp_path / "out")


def warnings_of(found):
    return [str(line) for line in list_warnings(manifest.read_spec(found.data), found.summary)]


def test_shares_far_from_what_was_asked_and_splits_of_one_group_are_told(tmp_path):
    rows = [
        {"uri": f"/s/{index}.jpg", "kind": "photograph", "stem": str(index), "given_label": index % 4,
         "given_group": "busy" if index < 190 else f"g{index}", "sha256": f"{index:020x}" + 44 * "0",
         "width": 1, "height": 1}
        for index in range(194)
    ]  # fmt: skip
    examined = pa.Table.from_pylist(rows, schema=scan.EXAMINED)
    found = audited_rows(examined, tmp_path, "/s/t.csv")
    lines = warnings_of(found)
    assert any("the train split has 97.9% of the images instead of 70%" in line for line in lines)
    assert any("busy has 98% of the images" in line for line in lines)
    assert any("the train split has 1 group" in line for line in lines)
    assert found.summary["parts"]["test"]["groups"] >= 2


def test_of_two_copies_the_delivered_test_part_keeps_its_own(tmp_path):
    """Independent of names: the renamed copy in Training used to be kept, being first in the alphabet."""
    rows = [
        {"uri": f"/s/{index}.jpg", "kind": "photograph", "stem": f"m{index:04d}", "symptom": 0, "site": "1",
         "folder_grade": index % 4, "part": "Validation" if index % 5 == 0 else "Training",
         "device": f"D{index % 7}", "session": str(index), "sha256": f"{index:020x}" + 44 * "0",
         "width": 1, "height": 1}
        for index in range(200)
    ]  # fmt: skip
    renamed = {"uri": "/s/copy.jpg", "stem": "a-copy", "part": "Training", "device": None, "session": None}
    examined = pa.Table.from_pylist([*rows, rows[0] | renamed | {"site": None}], schema=scan.EXAMINED)
    found = audited_rows(examined, tmp_path, "/s", method="official")
    kept = [row for row in found.table.to_pylist() if row["sha256"] == 64 * "0"]
    assert [(row["uri"], row["split"]) for row in kept] == [("/s/0.jpg", "test")]
    assert [(row["uri"], row["reason"]) for row in found.dropped] == [("/s/copy.jpg", "duplicate_content")]


def test_a_name_with_two_grades_keeps_both_in_class_folders_and_is_reported(tmp_path):
    rows = [
        {"uri": f"/s/{index}.jpg", "kind": "photograph", "stem": "same" if index < 2 else str(index),
         "class_grade": index % 4, "sha256": f"{index:020x}" + 44 * "0", "width": 1, "height": 1}
        for index in range(40)
    ]  # fmt: skip
    found = audited_rows(pa.Table.from_pylist(rows, schema=scan.EXAMINED), tmp_path, "/s")
    assert found.table.num_rows == 40
    assert found.summary["findings"]["same_name_other_content"] == 1


# --- other sources -----------------------------------------------------------------------------------------


def test_class_folders_and_their_groups(tmp_path):
    for index in range(12):
        folder = tmp_path / "set" / ("0", "mild", "2.중등도", "중증")[index % 4]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"holiday{index}.jpg").write_bytes(jpeg(index))
    (tmp_path / "set" / "cats").mkdir()
    (tmp_path / "set" / "cats" / "tom.jpg").write_bytes(jpeg(99))
    found = audited(tmp_path / "set", tmp_path / "out", ratio="1:1:1")
    assert found.summary["spec"]["layout"] == "class_folders"
    assert found.summary["by_grade"] == {"good": 3, "mild": 3, "moderate": 3, "severe": 3}
    assert found.summary["dropped"] == {"not_in_a_grade_folder": 1}
    assert found.summary["grouped_by"] == {"photograph": 12}


def test_a_tables_groups_stay_together(tmp_path):
    lines = ["uri,label,group"]
    for index in range(24):
        (tmp_path / f"{index}.jpg").write_bytes(jpeg(index))
        lines.append(f"{index}.jpg,{index % 4},person{index // 4}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    found = audited(tmp_path / "t.csv", tmp_path / "out", ratio="1:1:1")
    assert (found.summary["spec"]["layout"], found.summary["spec"]["task"]) == ("table", "table")
    parts = {(row["group"], row["split"]) for row in found.table.to_pylist()}
    assert len(parts) == len({group for group, _ in parts}) == 6


def test_unlabelled_is_asked_for_and_never_fallen_back_to(tmp_path):
    (tmp_path / "set").mkdir()
    for index in range(3):
        (tmp_path / "set" / f"{index}.jpg").write_bytes(jpeg(index))
    with pytest.raises(UserError, match="3 images and no grade .* --label-source unlabelled"):
        audited(tmp_path / "set", tmp_path / "no")
    found = audited(tmp_path / "set", tmp_path / "out", task="unlabelled")
    assert found.table["label"].to_pylist() == found.table["split"].to_pylist() == [None] * 3
    assert found.summary["unlabelled"] == 3


def test_a_task_that_the_source_cannot_have_is_refused(tmp_path):
    (tmp_path / "set" / "1").mkdir(parents=True)
    (tmp_path / "set" / "1" / "a.jpg").write_bytes(jpeg())
    with pytest.raises(UserError, match="no label files of AI Hub; use --label-source folder"):
        audited(tmp_path / "set", tmp_path / "json", task="json")
    (tmp_path / "t.csv").write_text("uri,label\nset/1/a.jpg,1\n")
    for task in ("json", "folder"):
        with pytest.raises(UserError, match="has its own labels; omit --label-source"):
            audited(tmp_path / "t.csv", tmp_path / task, task=task)


def test_a_symptom_that_is_not_there_says_what_is(source, tmp_path):
    with pytest.raises(UserError, match="48 other_symptom"):
        audited(source, tmp_path / "out", symptom="탈모")


# --- what is written ---------------------------------------------------------------------------------------


def test_a_manifest_that_was_edited_is_refused(source, tmp_path):
    found = audited(source, tmp_path / "out", ratio=RATIO)
    table = found.table
    labels = table["label"].to_pylist()
    labels[0] = (labels[0] + 1) % 4
    changed = table.set_column(6, manifest.SCHEMA.field("label"), pa.array(labels, pa.int8()))
    manifest.write_manifest(found.data, changed)
    with pytest.raises(UserError, match="was changed since it was prepared"):
        manifest.read_manifest(found.data)


def test_other_programs_read_the_parts_as_partitions(source, tmp_path):
    found = audited(source, tmp_path / "out", ratio=RATIO)
    files = duckdb.read_parquet(f"{found.data}/manifest/*/*.parquet", hive_partitioning=True)
    rows = files.aggregate("split, count(*)").fetchall()
    assert dict(rows) == {name: part["photographs"] for name, part in found.summary["parts"].items()}
