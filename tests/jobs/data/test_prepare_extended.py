"""`scalp prepare LABELS OUT --extend DATA`: the splits of DATA stay, and new labels go to train."""

from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from jobs.common.local_executor import LocalExecutor
from jobs.data import prepare as module
from scalp_core import storage
from scalp_core.curation.audit import Options
from scalp_core.curation.queries import DROPPED_FILE
from scalp_core.datasets import manifest
from scalp_core.errors import SourceError, UserError
from scalp_core.storage import parquet
from tests.support.labels import columns, write_log
from tests.support.preparing import picture

IMAGES = 24
prepare = partial(module.prepare, executor=LocalExecutor())


def write_picture(folder, index):
    uri, data = f"{folder}/{index}.jpg", picture(index)
    storage.write(uri, data)
    return uri, sha256(data).hexdigest()


def write_data(folder):
    """Prepare a table with groups of two images."""
    rows = [f"{write_picture(folder / 'set', index)[0]},{index % 4},p{index // 2}" for index in range(IMAGES)]
    (folder / "labels.csv").write_text("\n".join(["uri,label,group", *rows]))
    prepare(str(folder / "labels.csv"), str(folder / "data"), Options(ratio="2:1:1"))
    return str(folder / "data")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The data set that `write_data` prepares; tests write elsewhere."""
    return write_data(tmp_path_factory.mktemp("prepared"))


def table_of(data):
    return str(Path(data).with_name("labels.csv"))


def write_labels(tmp_path, groups):
    """A log with one new image per group, and an image of the data with another grade."""
    answers = []
    for index, group in [*enumerate(groups, 100), (5, None)]:
        uri, digest = write_picture(tmp_path / "new", index)
        places = {"uri": uri, "sha256": digest, "image_id": digest[:20], "group": group}
        answers.append(columns(str(index), "kim", 3, **places))
    write_log(str(tmp_path / "labels"), answers)
    return str(tmp_path / "labels")


def splits_of(data):
    return {row["sha256"]: (row["split"], row["label"]) for row in manifest.read_manifest(data).to_pylist()}


def group_in(data, split):
    return next(row["group"] for row in manifest.read_manifest(data).to_pylist() if row["split"] == split)


@pytest.mark.medium
def test_new_labels_go_to_train_and_the_splits_stay(data, tmp_path):
    groups = {split: group_in(data, split) for split in manifest.SPLITS}
    labels = write_labels(tmp_path, [None, groups["train"], groups["val"], groups["test"]])
    out = str(tmp_path / "more")
    summary = prepare(labels, out, Options(extend=data))
    before, after = splits_of(data), splits_of(out)
    assert {digest: after[digest] for digest in before} == before
    added = {digest: after[digest] for digest in after.keys() - before.keys()}
    assert len(added) == 2 and set(added.values()) == {("train", 3)}
    reasons = [row["reason"] for row in parquet.read(f"{out}/{DROPPED_FILE}").to_pylist()]
    assert sorted(reasons) == ["already_in_data", "held_out_group", "held_out_group"]
    rows = {row["sha256"]: row["group"] for row in manifest.read_manifest(out).to_pylist()}
    assert {row["sha256"]: row["group"] for row in manifest.read_manifest(data).to_pylist()}.items() <= (
        rows.items()
    )
    assert groups["train"] in {rows[digest] for digest in added}
    spec = manifest.read_spec(out)
    assert spec.extends == (manifest.read_spec(data).sha256,)
    (reviews,) = spec.reviews
    assert (reviews.labels, reviews.answers, reviews.images) == (labels, 5, 2)
    assert reviews.sha256 == summary["label_log"]["sha256"]


@pytest.mark.medium
def test_a_second_round_adds_what_is_new(data, tmp_path):
    labels = write_labels(tmp_path, [None])
    prepare(labels, str(tmp_path / "first"), Options(extend=data))
    labels = write_labels(tmp_path, [None, None])
    prepare(labels, str(tmp_path / "second"), Options(extend=str(tmp_path / "first")))
    spec = manifest.read_spec(str(tmp_path / "second"))
    assert [round_.images for round_ in spec.reviews] == [1, 1] and len(spec.extends) == 2
    assert len(splits_of(str(tmp_path / "second"))) == IMAGES + 2


@pytest.mark.medium
def test_soft_labels_of_the_data_stay(data, tmp_path):
    labels = write_labels(tmp_path, [None])
    uri, digest = write_picture(tmp_path / "new", 100)
    places = {"uri": uri, "sha256": digest, "image_id": digest[:20]}
    write_log(labels, [columns("100", "lee", 1, **places)])
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    prepare(labels, first, Options(extend=data), conflicts="soft")
    prepare(labels, second, Options(extend=first))
    for prepared in (first, second):
        soft = {
            row["sha256"]: row for row in manifest.read_manifest(prepared).to_pylist() if row["soft_label"]
        }
        assert list(soft) == [digest]
        assert soft[digest]["soft_label"] == [0, 0.5, 0, 0.5] and soft[digest]["label"] is None
        assert manifest.read_spec(prepared).soft_labels == 1


@pytest.mark.medium
def test_an_image_of_the_data_that_is_lost_is_an_error(tmp_path):
    data = write_data(tmp_path)
    (tmp_path / "set" / "7.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match=r"1 images of \S+data cannot be read, such as \S+7.jpg \(\w+\)"):
        prepare(write_labels(tmp_path, [None]), str(tmp_path / "more"), Options(extend=data))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(ratio="8:1:1"), "keeps the splits and groups"),
        (Options(method="random"), "keeps the splits and groups"),
    ],
)
def test_options_of_splits_are_refused(data, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        module.prepare(
            write_labels(tmp_path, [None]), str(tmp_path / "more"), module.replace(options, extend=data)
        )
    with pytest.raises(UserError, match="is not a label log"):
        prepare(table_of(data), str(tmp_path / "more"), Options(extend=data))


def test_data_with_leaky_splits_is_refused(data, tmp_path):
    leaky = str(tmp_path / "leaky")
    prepare(table_of(data), leaky, Options(method="random"))
    with pytest.raises(UserError, match="is split by random"):
        prepare(write_labels(tmp_path, [None]), str(tmp_path / "more"), Options(extend=leaky))
