import hashlib
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from scalp_core.curation import splits
from scalp_core.curation.splits import parse_ratio
from scalp_core.datasets import manifest
from scalp_core.datasets.fingerprints import fingerprint
from scalp_core.datasets.manifest import DataSpec, SplitSpec
from scalp_core.errors import UserError
from scalp_core.storage import parquet
from tests.support.examples import examples
from tests.support.sources import PLANS, audited, write_set


def random_rows(groups, rows, seed):
    """Labels and groups; every group occurs, and their sizes differ."""
    rng = np.random.default_rng(seed)
    of_row = np.concatenate([np.arange(groups), rng.integers(0, groups, rows)])
    return rng.choice(4, len(of_row), p=[0.1, 0.3, 0.4, 0.2]), of_row


def assert_no_group_in_two(parts, groups):
    for group in np.unique(groups):
        assert len({part for part in parts[groups == group] if part is not None}) <= 1


@pytest.mark.medium
@pytest.mark.promise("README: splits share no microscope")
@settings(max_examples=examples(10, 50), deadline=None)
@given(groups=st.integers(10, examples(14, 40)), rows=st.integers(60, 300), seed=st.integers(0, 1000))
def test_no_group_is_ever_in_two_parts(groups, rows, seed):
    labels, of_row = random_rows(groups, rows, seed)
    parts = splits.split_by_group(labels, of_row, (7, 2, 1), seed)
    assert set(parts) == {"train", "val", "test"}
    assert_no_group_in_two(parts, of_row)
    folds = splits.assign_folds(labels, of_row, 5, seed)
    assert set(folds) == set(range(5))
    assert_no_group_in_two(folds, of_row)


@pytest.mark.medium
@settings(max_examples=examples(10, 50), deadline=None)
@given(groups=st.integers(24, examples(30, 120)), rows=st.integers(100, 600), seed=st.integers(0, 1000))
def test_the_delivered_parts_are_kept_but_for_their_overlap(groups, rows, seed):
    labels, of_row = random_rows(groups, rows, seed)
    rng = np.random.default_rng(seed)
    # Most groups are delivered in one part, some in both.
    home = rng.random(groups) < 0.2
    delivered = np.where(home[of_row] ^ (rng.random(len(of_row)) < 0.05), "Validation", "Training")
    if len(np.unique(of_row[~np.isin(of_row, of_row[delivered == "Validation"])])) < 9:
        reject()  # too little of Training is left to divide
    parts = splits.split_as_delivered(labels, of_row, delivered, (7, 2, 1), seed)
    assert_no_group_in_two(parts, of_row)
    assert ((parts == "test") == (delivered == "Validation")).all()
    overlap = np.isin(of_row, of_row[delivered == "Validation"]) & (delivered == "Training")
    assert (np.equal(parts, None) == overlap).all()


@pytest.mark.medium
def test_parts_have_their_shares_of_rows_and_of_every_grade():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 6000)
    labels = rng.choice(4, 6000, p=[0.042, 0.348, 0.431, 0.179])
    for ratio in ((7, 2, 1), (7, 1, 2)):  # as the paper writes it, and as its notebook did
        parts = splits.split_by_group(labels, groups, ratio, 0)
        counts = Counter(parts)
        for name, share in zip(manifest.SPLITS, ratio, strict=True):
            assert counts[name] / 6000 == pytest.approx(share / 10, abs=0.02)
            for grade in range(4):
                expected = np.mean(labels == grade)
                assert np.mean(labels[parts == name] == grade) == pytest.approx(expected, abs=0.05)


def split_table(labels, groups, seed=0):
    """Share, groups and grades of each split."""
    parts = splits.split_by_group(labels, groups, (7, 2, 1), seed)
    return {
        name: (np.mean(parts == name), len(set(groups[parts == name])), set(labels[parts == name]))
        for name in manifest.SPLITS
    }


@pytest.mark.parametrize("seed", [11, 73, 113, 65])
def test_the_busiest_clinic_is_trained_on_and_every_split_has_two_groups(seed):
    """The worst of 300 sources: the clinic with 96 % of all images was the test part, train had 1.5 %."""
    rng = np.random.default_rng(seed)
    number = int(rng.integers(10, 16))
    sizes = np.maximum(1, (rng.pareto(0.7, number) * 10).astype(int)).clip(1, 3000)
    groups = np.repeat(np.arange(number), sizes)
    labels = np.clip(rng.normal(rng.normal(1.6, 0.6, number)[groups], 0.6).round(), 0, 3).astype(int)
    found = split_table(labels, groups)
    assert found["train"][0] > 0.5
    assert min(groups for _, groups, _ in found.values()) >= 2


@pytest.mark.medium
@pytest.mark.parametrize("seed", range(2))
def test_shares_are_met_where_the_groups_allow_it(seed):
    rng = np.random.default_rng(seed)
    sizes = np.maximum(3, rng.lognormal(3, 1, 30).astype(int))
    groups = np.repeat(np.arange(30), sizes)
    found = split_table(rng.choice(4, len(groups), p=[0.1, 0.3, 0.4, 0.2]), groups)
    for name, share in zip(manifest.SPLITS, (0.7, 0.2, 0.1), strict=True):
        assert found[name][0] == pytest.approx(share, abs=0.03)
        assert found[name][2] == {0, 1, 2, 3}


def test_small_sources_are_divided():
    labels = np.repeat(np.arange(4), 9)  # class folders with 9 images each
    for parts in (
        splits.split_by_group(labels, np.arange(36), (7, 2, 1), 0),
        splits.split_at_random(labels, (7, 2, 1), 0),
    ):
        assert all(set(labels[parts == name]) == {0, 1, 2, 3} for name in manifest.SPLITS)
    folds = splits.assign_folds(labels, np.arange(36), 10, 0)
    assert set(np.bincount(folds)) == {3, 4}
    found = split_table(labels, np.arange(36) % 12)
    assert [groups for _, groups, _ in found.values()] == [8, 2, 2]
    found = split_table(np.zeros(3, int), np.arange(3))
    assert [groups for _, groups, _ in found.values()] == [1, 1, 1]


def test_a_rare_grade_reaches_every_split_of_a_large_source():
    labels = np.zeros(20_000, int)
    labels[:30] = 3
    parts = splits.split_by_group(labels, np.arange(20_000), (7, 2, 1), 0)
    for name, share in zip(manifest.SPLITS, (0.7, 0.2, 0.1), strict=True):
        assert np.sum(labels[parts == name] == 3) == pytest.approx(30 * share, abs=3)


def test_few_groups_are_divided_as_well_as_they_go():
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(12), rng.integers(5, 60, 12))
    labels = np.clip(rng.normal(rng.normal(1.6, 0.5, 12)[groups], 0.7).round(), 0, 3).astype(int)
    parts = splits.split_by_group(labels, groups, (7, 2, 1), 0)
    for name in manifest.SPLITS:  # every part has every grade
        assert set(labels[parts == name]) == {0, 1, 2, 3}


def test_the_same_seed_gives_the_same_split_and_another_another():
    rng = np.random.default_rng(0)
    groups, labels = np.arange(500), rng.integers(0, 4, 500)
    first = splits.split_by_group(labels, groups, (7, 2, 1), 1)
    assert (first == splits.split_by_group(labels, groups, (7, 2, 1), 1)).all()
    assert (first != splits.split_by_group(labels, groups, (7, 2, 1), 2)).any()


def test_leaking_pairs_are_counted():
    key = np.array([5, 5, 5, 1, 1, 0, 0], np.uint64)
    parts = np.array(["train", "train", "test", "val", "val", "train", "test"], dtype=object)
    assert splits.count_leaking_pairs(key, parts) == 2


def test_a_hundred_thousand_images_without_groups_have_the_ratio_in_each_grade():
    labels = np.random.default_rng(0).integers(0, 4, 100_000)
    parts = splits.split_by_group(labels, np.arange(100_000), (7, 2, 1), 0)
    for grade in range(4):
        shares = Counter(parts[labels == grade])
        total = shares.total()
        assert [shares[name] / total for name in ("train", "val", "test")] == pytest.approx(
            [0.7, 0.2, 0.1], abs=0.01
        )


def test_too_few_groups_are_refused_with_a_way_out():
    with pytest.raises(UserError, match="--ratio 7:2:1: 2 groups cannot be divided into 3; use more micro"):
        splits.split_by_group(np.zeros(9, int), np.arange(9) % 2, (7, 2, 1), 0)
    with pytest.raises(UserError, match="--folds 10: 9 groups cannot be divided into 10"):
        splits.assign_folds(np.zeros(9, int), np.arange(9), 10, 0)
    with pytest.raises(UserError, match="--folds 129 is too many; give 128 or fewer"):
        splits.assign_folds(np.zeros(999, int), np.arange(999), 129, 0)
    with pytest.raises(UserError, match="--split-by group"):
        splits.split_as_delivered(np.zeros(3, int), np.arange(3), np.array(["Training"] * 3), (7, 2, 1), 0)


@pytest.mark.parametrize("text", ["7:2", "a:b:c", "7:0:1", "70:20:11"])
def test_a_ratio_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=text):
        parse_ratio(text)


def test_a_ratio_is_the_same_in_percent():
    assert parse_ratio("70:20:10") == parse_ratio("7:2:1") == (7, 2, 1)


# --- on photographs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    write_set(tmp_path_factory.mktemp("split") / "set")
    return tmp_path_factory.getbasetemp() / "split0" / "set"


@pytest.mark.medium
def test_a_random_split_says_how_it_leaks(source, tmp_path):
    found = audited(source, tmp_path, method="random")
    record = manifest.read_spec(found.data).split
    table = found.table
    rows = table.to_pylist()
    for key, of in (
        ("device", lambda row: (row["site"], row["device"])),
        ("session", lambda row: (row["site"], row["device"], row["captured_at"])),
    ):
        pairs = sum(
            of(one) == of(other) and one["split"] != other["split"]
            for index, one in enumerate(rows)
            for other in rows[:index]
        )
        assert record.leaking_pairs[key] == pairs > 0
    assert record.leaky
    assert f"{record.leaking_pairs['session']:,} of one session" in record.warning


@pytest.mark.medium
def test_the_official_split_keeps_sessions_apart_and_says_what_it_cannot(source, tmp_path):
    found = audited(source, tmp_path, method="official", ratio="2:1:1")
    record = manifest.read_spec(found.data).split
    assert record.leaking_pairs["session"] == record.leaking_pairs["near_duplicate"] == 0
    assert record.leaking_pairs["device"] > 0
    assert not record.leaky
    test = {row["uri"].rsplit("/", 1)[-1] for row in manifest.select_split(found.table, "test").to_pylist()}
    assert test == {f"{plan.stem}.jpg" for plan in PLANS if plan.part == "Validation"}
    held_out = {plan.stem[:-5] for plan in PLANS if plan.part == "Validation"}
    overlap = [plan for plan in PLANS if plan.part == "Training" and plan.stem[:-5] in held_out]
    assert found.summary["dropped"]["official_overlap"] == len(overlap)


@pytest.mark.medium
def test_folds_are_for_training_and_validation_and_keep_devices_apart(source, tmp_path):
    found = audited(source, tmp_path, ratio="2:1:1", folds=3)
    table = found.table
    for row in table.to_pylist():
        assert (row["fold"] is None) == (row["split"] == "test")
    test = manifest.select_split(table, "test")
    for fold in range(3):
        again = manifest.apply_fold(table, fold)
        manifest.check_splits(again)
        assert manifest.select_split(again, "test").equals(test)
        assert (
            manifest.select_split(again, "val")["fold"].to_pylist().count(fold)
            == manifest.select_split(again, "val").num_rows
        )
        held_out = manifest.apply_fold(table, fold, hold_out_val=True)
        assert manifest.select_split(held_out, "val").equals(manifest.select_split(again, "val"))
        trained = manifest.select_split(held_out, "train")["image_id"].to_pylist()
        expected = manifest.select_split(table, "train").filter(pc.field("fold") != fold)
        assert trained == expected["image_id"].to_pylist()
    with pytest.raises(UserError, match="does not have this fold; it has 0 to 2"):
        manifest.apply_fold(table, 3)


def rows(**changes):
    base = [
        {
            "image_id": str(index),
            "uri": f"/{index}.jpg",
            "sha256": f"{index}",
            "group": f"g{index}",
            "label": 1,
        }
        for index in range(3)
    ]
    for row, part in zip(base, manifest.SPLITS, strict=True):
        row["split"] = part
    base[1] |= changes
    return base


def write(folder, rows, method="group"):
    table = pa.Table.from_pylist(rows, schema=manifest.SCHEMA)
    manifest.write_manifest(str(folder), table)
    spec = DataSpec(
        created_at=datetime.now(UTC),
        source="/",
        layout="class_folders",
        task="folder",
        symptom=None,
        split=SplitSpec(method=method, ratio="7:2:1", seed=0, keys=()),
        photographs=len(rows),
        sha256=fingerprint(table),
    )
    manifest.write_spec(str(folder), spec)
    return str(folder)


def test_a_manifest_that_was_edited_into_leaking_is_refused(tmp_path):
    assert manifest.read_manifest(write(tmp_path, rows())).num_rows == 3
    with pytest.raises(UserError, match="group g0 is in both train and val"):
        manifest.read_manifest(write(tmp_path, rows(group="g0")))
    with pytest.raises(UserError, match="content hash 0 is in both train and val"):
        manifest.read_manifest(write(tmp_path, rows(sha256="0")))
    # A random split shares groups, and says so; the same bytes it must not share either.
    assert manifest.read_manifest(write(tmp_path, rows(group="g0"), "random")).num_rows == 3
    with pytest.raises(UserError, match="content hash 0"):
        manifest.read_manifest(write(tmp_path, rows(sha256="0"), "random"))


def test_the_fingerprint_names_the_rows_in_any_order_and_changes_with_each_of_them():
    table = pa.Table.from_pylist(rows(), schema=manifest.SCHEMA)
    whole = fingerprint(table)
    assert fingerprint(table.take([2, 0, 1])) == whole
    assert fingerprint(table.to_reader(1)) == whole
    twice = fingerprint(pa.concat_tables([table, table]))
    others = [rows(label=2), rows(label=None), rows(sha256="x"), rows(fold=1), rows()[:2]]
    changed = [fingerprint(pa.Table.from_pylist(each, schema=manifest.SCHEMA)) for each in others]
    assert len({whole, twice, *changed}) == len(changed) + 2
    swapped = rows()
    swapped[0]["split"], swapped[1]["split"] = "val", "train"
    assert fingerprint(pa.Table.from_pylist(swapped, schema=manifest.SCHEMA)) != whole


def test_the_fingerprint_of_data_without_soft_labels_is_that_of_earlier_versions():
    digests = [hashlib.sha256(f"{index},1,{part},".encode()) for index, part in enumerate(manifest.SPLITS)]
    total = sum(int.from_bytes(digest.digest(), "little") for digest in digests) % 2**256
    assert fingerprint(pa.Table.from_pylist(rows(), schema=manifest.SCHEMA)) == f"{total:064x}"
    softs = [[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0]]
    tables = [pa.Table.from_pylist(rows(soft_label=soft), schema=manifest.SCHEMA) for soft in softs]
    assert len({f"{total:064x}", *map(fingerprint, tables)}) == 3


def test_a_manifest_of_an_earlier_version_has_no_soft_labels(tmp_path):
    data = write(tmp_path, rows())
    for split in manifest.SPLITS:
        file = f"{data}/manifest/split={split}/part-0.parquet"
        parquet.write(file, parquet.read(file).drop_columns(["soft_label"]))
    table = manifest.read_manifest(data)
    assert table.schema == manifest.SCHEMA and table["soft_label"].null_count == 3
    assert manifest.select_training(table).num_rows == 1


def test_soft_labels_are_for_training_alone(tmp_path):
    soft = {"label": None, "soft_label": [0, 0, 0.25, 0.75], "split": "train", "fold": 1}
    table = manifest.read_manifest(write(tmp_path, rows(**soft)))
    assert manifest.select_training(table)["label"].to_pylist() == [1, 3]
    assert manifest.select_split(table, "train").num_rows == 1
    held_out = table.set_column(table.column_names.index("split"), "split", pa.array(["val"] * 3))
    assert manifest.select_split(held_out, "val")["label"].to_pylist() == [1, 1]


@pytest.mark.slow
def test_more_text_than_an_array_of_arrow_can_hold_has_a_fingerprint():
    """2 GiB, which were about 27 million rows."""
    piece = pa.table(
        {
            "sha256": ["f" * 2**26],
            "label": pa.nulls(1, pa.int8()),
            "soft_label": pa.nulls(1, pa.list_(pa.float32())),
            "split": ["train"],
            "fold": pa.nulls(1, pa.int8()),
        }
    )
    assert fingerprint(pa.concat_tables([piece] * 33)) != fingerprint(piece)


def test_rows_are_read_in_the_order_of_their_files_whatever_the_pieces(tmp_path, monkeypatch):
    """In pieces, because 2 GiB of text do not fit into one array of Arrow."""
    base = [
        {"image_id": str(index), "uri": f"/{index % 3}.zip", "member": f"{index % 5}-{index:02d}.jpg",
         "sha256": str(index), "group": str(index), "label": 1, "split": manifest.SPLITS[index % 3]}
        for index in range(20)
    ]  # fmt: skip
    monkeypatch.setattr(manifest, "_ROWS_A_PIECE", 7)
    monkeypatch.setattr(manifest, "_ROWS_A_GROUP", 2)
    monkeypatch.setattr(manifest, "_ROWS_A_FILE", 4)
    table = manifest.read_manifest(write(tmp_path, base))
    assert table.schema == manifest.SCHEMA
    read = table.to_pylist()
    assert [(row["uri"], row["member"]) for row in read] == sorted(
        (row["uri"], row["member"]) for row in base
    )
    assert {row["image_id"]: row["split"] for row in read} == {row["image_id"]: row["split"] for row in base}
    files = {path.name for path in (tmp_path / "manifest" / "split=train").iterdir()}
    assert files == {"part-0.parquet", "part-1.parquet"}
    (tmp_path / "manifest" / "split=train" / "mine.txt").write_text("mine")
    write(tmp_path, base[:3])  # fewer files: those that scalp wrote before go
    assert {path.name for path in (tmp_path / "manifest" / "split=train").iterdir()} == {
        "part-0.parquet", "mine.txt",
    }  # fmt: skip
