"""The manifest of prepared data: one row per image with its location, label, group and split.

data.json                      source, task and split method; `DataSpec`
manifest/split=train/*.parquet rows, in Hive partitions that other programs can read
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import groupby
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalp_core import storage
from scalp_core.datasets.fingerprints import fingerprint, fingerprint_labels
from scalp_core.datasets.locations import Location
from scalp_core.errors import UserError
from scalp_core.storage import parquet

MANIFEST_FOLDER = "manifest"
SPEC_FILE = "data.json"
SPLITS = ("train", "val", "test")
LEAKY = "LEAKY SPLIT: by image; pairs of images in two splits: {pairs}; metrics are too optimistic"

SCHEMA = pa.schema(
    {
        "image_id": pa.string(),  # `image_id` of the sha256
        "uri": pa.string(),
        "member": pa.string(),  # the entry, when uri is an archive
        "sha256": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "label": pa.int8(),  # null if unlabelled, or if the label is soft
        "soft_label": pa.list_(pa.float32()),  # probability of each grade, for training alone; else null
        # Six symptoms, in the order of grades.SYMPTOMS; null where unknown, each or all.
        "labels": pa.list_(pa.int8()),
        "site": pa.string(),
        "device": pa.string(),
        "captured_at": pa.timestamp("ms", tz="UTC"),
        "position": pa.string(),  # on the head: TH, LH, RH, BH
        "sex": pa.string(),  # male, female
        "age": pa.string(),  # 40s
        "group": pa.string(),  # in one split only, unless the split method leaks
        "fold": pa.int8(),  # for cross-validation; null without it, and in the test split
        "split": pa.string(),  # train, val, test; null if unlabelled
        "source_note": pa.string(),  # Training or Validation, as AI Hub delivered it
        "byte_offset": pa.int64(),  # stored bytes of a member in its archive; null for files, and if
        "byte_length": pa.int64(),  # the archive is compressed as a whole
        "compression": pa.string(),  # compression of these bytes: stored, deflate
    }
)

# 80 bits: the probability of a collision among a billion ids is below one in a million.
ID_DIGITS = 20
# Columns that manifests of earlier versions lack; they are null there.
_LATER_COLUMNS = ("soft_label",)
_NO_SPLIT = "__HIVE_DEFAULT_PARTITION__"
_ROWS_A_FILE = 250_000
_ROWS_A_GROUP = 25_000
_ROWS_A_PIECE = 1_000_000
_FILE = re.compile(r"/split=[^/]+/part-\d+\.parquet$")

SplitMethod = Literal["group", "official", "random", "none"]
Task = Literal["folder", "json", "table", "unlabelled"]


class SplitSpec(BaseModel):
    """Split method, and the groups that splits share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: SplitMethod = Field(
        description="group: each group is in one split; official: as AI Hub delivered it, without overlap; "
        "random: by image, as the paper did, which leaks; none: unlabelled"
    )
    ratio: str = Field(description="TRAIN:VAL:TEST")
    seed: int = Field(description="seed of the assignment")
    keys: tuple[str, ...] = Field(description="images that share one of these keys are one group")
    folds: int | None = Field(None, description="number of folds for cross-validation")
    leaking_pairs: dict[str, int] = Field(
        {}, description="pairs of images in different splits that share a device, session, …"
    )

    @property
    def leaky(self) -> bool:
        """Whether metrics on these splits are too optimistic."""
        return self.method == "random"

    @property
    def warning(self) -> str | None:
        """Warning to print next to each metric on these splits, or None."""
        return LEAKY.format(pairs=self.list_leaking_pairs()) if self.leaky else None

    def list_leaking_pairs(self) -> str:
        """List the numbers of pairs in two splits, by what they share."""
        return ", ".join(
            f"{count:,} of one {key.replace('_', '-')}" for key, count in self.leaking_pairs.items()
        )


class ReviewedLabels(BaseModel):
    """Answers of a label log of `scalp review` that became labels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: str = Field(description="directory of the label log")
    answers: int = Field(description="answers in the log when it was read")
    sha256: str = Field(description="hash of these answers")
    images: int = Field(description="images whose label they are")


class DataSpec(BaseModel):
    """Contract of a prepared data directory, stored in `data.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[2] = 2
    created_at: datetime
    source: str
    layout: Literal["aihub", "class_folders", "table", "unlabelled"]
    task: Task = Field(
        description="folder: the label is the folder's grade, as in the paper; json: the label file's grade; "
        "table: the label in the CSV or Parquet; unlabelled"
    )
    symptom: str | None = Field(description="symptom of AI Hub's six for the label")
    split: SplitSpec
    photographs: int
    sha256: str = Field(description="fingerprint of contents, labels and splits")
    labels_sha256: str | None = Field(
        None,
        description="fingerprint of contents and grades of the six symptoms; null without such grades, and "
        "in data of earlier versions",
    )
    symptoms: dict[str, tuple[int, int, int, int]] = Field(
        {}, description="images of each grade, by symptom, if some images have grades of the six symptoms"
    )
    soft_labels: int = Field(0, description="training images with a soft label")
    synthetic: bool = Field(False, description="whether some images are from scalp synth")
    reviews: tuple[ReviewedLabels, ...] = Field((), description="label logs among the labels, oldest first")
    extends: tuple[str, ...] = Field(
        (), description="fingerprints of the data with the same val and test splits, oldest first"
    )

    @property
    def warning(self) -> str | None:
        """Warning that the images are synthetic, or None."""
        if not self.synthetic:
            return None
        return (
            "SYNTHETIC IMAGES, drawn by scalp synth: they say nothing about real scalps, and a model that is "
            "trained on them is not for clinical use"
        )


def image_id(sha256: str) -> str:
    """Identify an image by the SHA-256 of its bytes, independent of its location."""
    return sha256[:ID_DIGITS]


def location_id(location: Location) -> str:
    """Identify the location of an image, independent of its bytes: the unique key of result rows."""
    # JSON, not a joined string: `a.zip!b.jpg` may be a file, or the member b.jpg of a.zip.
    place = json.dumps([location.uri, location.member or None])
    return hashlib.sha256(place.encode()).hexdigest()[:ID_DIGITS]


def write_manifest(data: str, rows: pa.RecordBatchReader | pa.Table) -> None:
    """Write rows of `SCHEMA` to `data/manifest`, and remove outdated files of an earlier run.

    `write_spec` makes the rows valid; readers refuse a directory without `data.json`.

    Args:
        data: Data directory.
        rows: Table, or stream that is sorted by split.
    """
    folder = storage.join(storage.absolute(data), MANIFEST_FOLDER)
    if isinstance(rows, pa.Table):
        rows = rows.sort_by([("split", "ascending"), ("image_id", "ascending")]).to_reader(_ROWS_A_GROUP)
    schema = pa.schema([field for field in SCHEMA if field.name != "split"])
    rows_of_split: Counter[str] = Counter()

    def file_of(run: pa.RecordBatch) -> str:
        name = run["split"][0].as_py() or _NO_SPLIT
        number = rows_of_split[name] // _ROWS_A_FILE
        rows_of_split[name] += run.num_rows
        return storage.join(folder, f"split={name}", f"part-{number}.parquet")

    written = set()
    for uri, runs in groupby((run for batch in rows for run in _runs(batch)), key=file_of):
        batches = (run.drop_columns(["split"]) for run in runs)
        parquet.write_batches(uri, pa.RecordBatchReader.from_batches(schema, batches))
        written.add(uri)
    _remove_stale(folder, written)


def _remove_stale(folder: str, written: set[str]) -> None:
    for part in storage.folders_in(folder):
        storage.remove_temporary(storage.join(folder, part))
        for name in storage.names_in(storage.join(folder, part)):
            uri = storage.join(folder, part, name)
            if _FILE.search(uri) and uri not in written:
                storage.remove_file(uri)


def _runs(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices of one split each, at most a row group long."""
    start = 0
    for end in pc.run_end_encode(batch["split"]).run_ends.to_pylist():
        for begin in range(start, end, _ROWS_A_GROUP):
            yield batch.slice(begin, min(_ROWS_A_GROUP, end - begin))
        start = end


def write_spec(data: str, spec: DataSpec) -> None:
    """Write `data.json`, as the last file: it marks the directory as complete."""
    storage.write(storage.join(storage.absolute(data), SPEC_FILE), spec.model_dump_json(indent=2).encode())


def read_spec(data: str) -> DataSpec:
    """Read `data.json` of a prepared data directory.

    Raises:
        UserError: it is missing, or of another version.
    """
    uri = storage.join(storage.absolute(data), SPEC_FILE)
    with storage.rename_errors(data):
        is_prepared = storage.exists(uri)
    if not is_prepared:
        raise UserError(
            f"{data} has no {SPEC_FILE}; prepare images with: scalp prepare SOURCE OUT, and give OUT"
        )
    try:
        return DataSpec.model_validate_json(storage.read(uri))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{uri} is not of this version ({'.'.join(map(str, first['loc']))}: {first['msg']}); "
            "run scalp prepare again"
        ) from error


def read_manifest(data: str) -> pa.Table:
    """Read and check the rows of a prepared data directory.

    Raises:
        UserError: the manifest is missing, invalid or changed, or its splits share groups unexpectedly.
    """
    import pyarrow.dataset as pads  # imports pandas, which is slow

    spec = read_spec(data)
    uri = storage.join(storage.absolute(data), MANIFEST_FOLDER)
    partitions = pads.partitioning(pa.schema({"split": pa.string()}), flavor="hive")
    with storage.explain_errors(uri):
        table = parquet.dataset(uri, partitioning=partitions).to_table()
    for name in _LATER_COLUMNS:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, SCHEMA.field(name).type))
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise UserError(f"{uri} lacks the columns {', '.join(missing)}; run scalp prepare again")
    table = table.select(SCHEMA.names).cast(SCHEMA)
    if table.num_rows != spec.photographs:
        raise UserError(f"{uri} has {table.num_rows} rows, not {spec.photographs}; run scalp prepare again")
    check_splits(table, ("sha256",) if spec.split.leaky else ("group", "sha256"))
    is_changed = fingerprint(table) != spec.sha256
    if spec.labels_sha256:  # data of earlier versions have none
        is_changed |= fingerprint_labels(table) != spec.labels_sha256
    if is_changed:
        raise UserError(
            f"{uri} was changed since it was prepared; run scalp prepare again; for other labels, give it "
            "a CSV or Parquet of uri,label"
        )
    table = table.set_column(1, "uri", _resolved(table["uri"], storage.absolute(data)))
    return _sorted(table)


def _sorted(table: pa.Table) -> pa.Table:
    """Sort rows of `SCHEMA` by uri and member, because an archive is read fastest in one piece.

    In pieces: an Arrow string array is limited to 2 GiB, which 27 million uris exceed.
    """
    wide = [field.with_type(pa.large_string()) if field.type == pa.string() else field for field in SCHEMA]
    whole = table.cast(pa.schema(wide)).combine_chunks()
    order = pc.sort_indices(whole, sort_keys=[("uri", "ascending"), ("member", "ascending")])
    starts = range(0, max(1, len(order)), _ROWS_A_PIECE)
    return pa.concat_tables(whole.take(order.slice(start, _ROWS_A_PIECE)).cast(SCHEMA) for start in starts)


def _resolved(uris: pa.ChunkedArray, data: str) -> pa.ChunkedArray:
    """Make uris absolute; those of a data directory with its own images are relative to it."""
    relative = pc.invert(pc.match_substring_regex(uris, "^(/|[a-z0-9]+://)"))
    return pc.if_else(relative, pc.binary_join_element_wise(data, uris, "/"), uris)


def likeliest_grade(soft: Sequence[float]) -> int:
    """Return the likeliest grade of a soft label, the lowest of equals."""
    return max(range(len(soft)), key=soft.__getitem__)


def select_training(table: pa.Table) -> pa.Table:
    """Select the rows of the train split; the `label` of one with a soft label becomes its likeliest grade.

    Raises:
        UserError: the split has no label.
    """
    if table["soft_label"].null_count < table.num_rows:
        softs = table["soft_label"].to_pylist()
        likeliest = pa.array([likeliest_grade(soft) if soft else None for soft in softs], pa.int8())
        labels = pc.coalesce(table["label"], likeliest)
        table = table.set_column(table.column_names.index("label"), "label", labels)
    return select_split(table, "train")


def select_split(table: pa.Table, name: str) -> pa.Table:
    """Select the labeled rows of one split; a soft label is none.

    Raises:
        UserError: the split is empty.
    """
    rows = table.filter((pc.field("split") == name) & pc.field("label").is_valid())
    if not rows.num_rows:
        known = sorted(value for value in pc.unique(table["split"]).to_pylist() if value)
        raise UserError(f"the manifest has no labeled image in split {name!r}; it has {known}")
    return rows


def apply_fold(table: pa.Table, fold: int, hold_out_val: bool = False) -> pa.Table:
    """Set the splits for cross-validation: fold `fold` for validation, all other folds for training.

    Args:
        table: Manifest with folds.
        fold: Fold for validation.
        hold_out_val: Whether images of the split val in other folds are in no split, instead of in training.

    Raises:
        UserError: the manifest does not have the fold.
    """
    folds = sorted(value for value in pc.unique(table["fold"]).to_pylist() if value is not None)
    if fold not in folds:
        have = f"it has {folds[0]} to {folds[-1]}" if folds else "make folds with scalp prepare --folds 5"
        raise UserError(f"--fold {fold}: the manifest does not have this fold; {have}")
    others = pc.if_else(pc.equal(table["split"], "val"), None, "train") if hold_out_val else "train"
    split = pc.if_else(pc.equal(table["fold"], fold), "val", others)
    split = pc.if_else(pc.is_null(table["fold"]), table["split"], split)
    return table.set_column(table.column_names.index("split"), "split", split)


def check_splits(table: pa.Table, columns: Iterable[str] = ("group", "sha256")) -> None:
    """Refuse splits that share a group or an image content, which would leak from training to test.

    Raises:
        UserError: two splits share a value; the message names the first one.
    """
    placed = table.filter(pc.field("split").is_valid())
    for column in columns:
        parts = placed.group_by(column).aggregate([("split", "min"), ("split", "max")])
        shared = parts.filter(pc.field("split_min") != pc.field("split_max")).slice(0, 1).to_pylist()
        for row in shared:
            name = "content hash" if column == "sha256" else column
            raise UserError(
                f"the split leaks: {name} {row[column]} is in both {row['split_min']} and "
                f"{row['split_max']}; run scalp prepare again instead of editing the split"
            )
