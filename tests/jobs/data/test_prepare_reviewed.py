"""`scalp prepare` of a label log: which labels count, the reasons for the others, and agreement."""

from functools import partial
from hashlib import sha256

import pytest

from jobs.common.local_executor import LocalExecutor
from jobs.data import prepare as module
from scalp_core import storage
from scalp_core.curation.audit import Options
from scalp_core.curation.queries import DROPPED_FILE
from scalp_core.datasets import manifest
from scalp_core.errors import SourceError, UserError
from scalp_core.storage import parquet
from tests.support.command import run_scalp
from tests.support.labels import columns, write_log
from tests.support.preparing import picture

IMAGES = 24
prepare = partial(module.prepare, executor=LocalExecutor())
OPTIONS = Options(ratio="1:1:1")


@pytest.fixture
def reviewed(tmp_path):
    """A log of two readers who agree on all images but some of the first eight."""

    def answer(index, reader, grade, **changes):
        uri, data = f"{tmp_path}/set/{index}.jpg", picture(index)
        storage.write(uri, data)
        digest = sha256(data).hexdigest()
        places = {"uri": uri, "sha256": digest, "image_id": digest[:20], "group": f"p{index // 2}"}
        return columns(str(index), reader, grade, **(places | changes))

    answers = [answer(index, "kim", index % 4) for index in range(IMAGES)]
    answers += [answer(index, "lee", index % 4) for index in range(8, IMAGES)]
    answers += [
        answer(0, "lee", 3),
        answer(1, "lee", 2),
        answer(1, "lead", 2, deciding=True),
        answer(2, "kim", None, reason="cannot_be_graded"),
        answer(3, "kim", None, reason="not_a_scalp", comment="a hand"),
        answer(4, "kim", 1, saw_model=True),
        answer(5, "kim", 2),
    ]
    write_log(str(tmp_path / "labels"), answers)
    return str(tmp_path / "labels")


def labels_of(data):
    rows = manifest.read_manifest(data).to_pylist()
    return {int(row["uri"].rpartition("/")[2].removesuffix(".jpg")): row["label"] for row in rows}


def dropped_of(data):
    rows = parquet.read(f"{data}/{DROPPED_FILE}").to_pylist()
    return {int(row["uri"].rpartition("/")[2].removesuffix(".jpg")): row["reason"] for row in rows}


@pytest.mark.medium
def test_a_label_log_is_prepared_like_a_table(reviewed, tmp_path, capsys):
    data = str(tmp_path / "data")
    summary = prepare(reviewed, data, OPTIONS)
    expected = {index: index % 4 for index in range(IMAGES) if index not in (0, 2, 3)}
    assert labels_of(data) == expected | {1: 2, 4: 1, 5: 2}
    assert dropped_of(data) == {0: "readers_differ", 2: "cannot_be_graded", 3: "not_a_scalp"}
    assert summary["dropped"] == {"cannot_be_graded": 1, "not_a_scalp": 1, "readers_differ": 1}
    groups = manifest.read_manifest(data)["group"].to_pylist()
    assert set(groups) == {f"p{number}" for number in range(IMAGES // 2) if number != 1}
    (pair,) = summary["label_log"]["agreement"]
    assert pair["readers"] == ["kim", "lee"] and pair["graded"] == 18 and pair["qwk"] > 0.7
    page = storage.read(f"{data}/report.html").decode()
    printed = capsys.readouterr().out
    for text in (page, printed):
        assert f"kappa {pair['qwk']:.2f} (95 % {pair['low']:.2f} to {pair['high']:.2f})" in text
        assert "1 labels were given only by readers who saw the model" in " ".join(text.split())


def test_labels_given_with_the_model_in_view_can_be_left_out(reviewed, tmp_path):
    data = str(tmp_path / "data")
    prepare(reviewed, data, OPTIONS, blind_only=True)
    assert labels_of(data)[4] == 0  # the blind answer before it
    with pytest.raises(UserError, match="prepared with another blind_only"):
        prepare(reviewed, data, OPTIONS)


def test_conflicts_become_soft_labels_of_training_images(reviewed, tmp_path, capsys):
    data = str(tmp_path / "data")
    answers = []
    for index in range(8, 20, 2):  # one image of six of the groups
        uri = f"{tmp_path}/set/{index}.jpg"
        digest = sha256(picture(index)).hexdigest()
        places = {"uri": uri, "sha256": digest, "image_id": digest[:20], "group": f"p{index // 2}"}
        answers.append(columns(str(index), "lee", 3 - index % 4, **places))
    write_log(reviewed, answers)
    summary = prepare(reviewed, data, OPTIONS, conflicts="soft")
    rows = {row["uri"]: row for row in manifest.read_manifest(data).to_pylist()}
    soft = {uri: row for uri, row in rows.items() if row["soft_label"]}
    assert {row["split"] for row in soft.values()} == {"train"}
    assert {row["label"] for row in soft.values()} == {None}
    for uri, row in soft.items():
        index = int(uri.rpartition("/")[2].removesuffix(".jpg"))
        given = {index % 4, 3 if index == 0 else 3 - index % 4}
        assert row["soft_label"] == [0.5 if grade in given else 0 for grade in range(4)]
    assert all(row["label"] is not None for uri, row in rows.items() if uri not in soft)
    # The others are in groups of val and test, and are left out as if none decided.
    counted = summary["label_log"]["soft"]
    assert counted == 7 and summary["soft_labels"] == len(soft)
    assert 0 < len(soft) < counted and summary["dropped"]["readers_differ"] == counted - len(soft)
    assert summary["unlabelled"] == 0
    assert "Readers differ on 7 of these." in storage.read(f"{data}/report.html").decode()
    assert "soft labels" in capsys.readouterr().out
    with pytest.raises(UserError, match="prepared with another conflicts"):
        prepare(reviewed, data, OPTIONS)


def test_groups_by_path_are_for_images_without_one(reviewed, tmp_path):
    data = str(tmp_path / "data")
    by_name = Options(ratio="1:1:1", group_by=r"regex:/(\d)\d*\.jpg")
    prepare(reviewed, data, by_name)
    assert "p3" in manifest.read_manifest(data)["group"].to_pylist()


def test_an_image_that_changed_since_its_review_is_dropped(reviewed, tmp_path):
    storage.write(f"{tmp_path}/set/9.jpg", picture(99))
    prepare(reviewed, str(tmp_path / "data"), OPTIONS)
    assert dropped_of(str(tmp_path / "data"))[9] == "changed"


def test_a_log_without_an_agreed_label_says_what_to_do(tmp_path):
    labels, data = str(tmp_path / "labels"), str(tmp_path / "data")
    write_log(labels, [])
    with pytest.raises(SourceError, match=r"no image with an agreed grade \(no answer\)"):
        prepare(labels, data, OPTIONS)
    write_log(labels, [columns("a.jpg", "kim", 1), columns("a.jpg", "lee", 2)])
    with pytest.raises(SourceError, match=r"\(1 readers_differ\); .* scalp review --adjudicate"):
        prepare(labels, data, OPTIONS)


def test_options_of_label_logs_are_refused_for_other_sources(tmp_path):
    storage.write(f"{tmp_path}/set/0/a.jpg", picture(0))
    done = run_scalp("prepare", tmp_path / "set", tmp_path / "data", "--blind-only", "--local")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --blind-only: {tmp_path}/set is not a label log of scalp review\n")
    with pytest.raises(UserError, match="--conflicts: .* is not a label log"):
        prepare(str(tmp_path / "set"), str(tmp_path / "data"), conflicts="soft")
    assert not storage.exists(f"{tmp_path}/data")


def test_a_label_log_has_grades_of_micro_keratin_alone(reviewed, tmp_path):
    with pytest.raises(UserError, match="--symptom 비듬: readers of scalp review grade 미세각질; omit"):
        prepare(reviewed, str(tmp_path / "data"), Options(symptom="비듬"))
    assert not storage.exists(f"{tmp_path}/data")
