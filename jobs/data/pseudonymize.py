"""`scalp pseudonymize`: copy prepared data without identifying names and metadata, for sharing."""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.growth import wait_for_node
from cluster.local import connect
from jobs.common.console import SUMMARY_FILE, console, now, progress_bar, read_json, show, write_json
from jobs.common.images import unreadable
from jobs.common.ray_executor import make_dataset
from scalp_core import storage
from scalp_core.curation.pseudonymize import (
    KEY_BYTES,
    declares_identity,
    pseudonym,
    pseudonymize_row,
    strip_metadata,
)
from scalp_core.datasets import locations as datasets_locations
from scalp_core.datasets import manifest
from scalp_core.datasets.fingerprints import describe_symptoms, fingerprint
from scalp_core.datasets.locations import LOCATION_COLUMNS, location_of
from scalp_core.datasets.manifest import DataSpec
from scalp_core.errors import ImageError, UserError
from scalp_core.images import codecs
from scalp_core.storage import lease, outputs

KIND = "pseudonymize"
IMAGES_FOLDER = "photographs"
_ROWS_PER_BATCH = 64


def pseudonymize(data: str, out: str, key_file: str | None = None) -> dict[str, Any]:
    """Write the images without names and metadata, and their manifest without identifying columns.

    Args:
        data: Output directory of `scalp prepare`.
        out: New output directory, local or `s3://`; other commands read it like `data`.
        key_file: File of the key of the codes, made if missing, so that later exports use the same codes;
            None: the key is discarded, and codes cannot be traced back.

    Returns:
        The summary, also written to `out/summary.json`; a finished export is not changed.

    Raises:
        UserError: Bad input, an image cannot be read any more, or `out` overlaps with `data` or is not empty.
    """
    out = storage.absolute(out)
    outputs.check_output(out, KIND, [data])
    spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    finished = read_json(storage.join(out, SUMMARY_FILE))
    if finished and finished.get("of") == spec.sha256:
        console.print(f"{out} is finished: it holds the images of {data}")
        return finished
    if outputs.kind_of(out) == KIND:
        raise UserError(
            f"{out} holds images of other data, or of a stopped run, which cannot resume: it would mix "
            "codes of two keys; choose a new directory"
        )
    key = _load_key(key_file, out)
    with outputs.open_output(out, KIND, [data]):
        summary = _write(out, spec, table, key, kept=bool(key_file))
    # A lease names this machine, which must not be shared.
    storage.remove_folder(storage.join(out, lease.FOLDER))
    show("pseudonymize", summary | {"folder": out})
    console.print("pixels are unchanged (8 bits per channel): anyone with the originals can match the images")
    if identifying := summary["identifying_pixels"]:
        console.print(
            f"{identifying} images are left out: their DICOM headers declare burned-in text or recognizable "
            "features"
        )
    if conflicting := summary["conflicting_labels"]:
        console.print(
            f"{conflicting} images are left out: without metadata they equal an image with a different grade"
        )
    return summary


def _write(out: str, spec: DataSpec, table: pa.Table, key: bytes, kept: bool) -> dict[str, Any]:
    """Write images, manifest and summary."""
    wait_for_node(connect(), console.print)
    written = make_dataset(table, _ROWS_PER_BATCH).map_batches(
        Pseudonymize(out, key), batch_size=_ROWS_PER_BATCH, batch_format="pyarrow"
    )
    batches = [manifest.SCHEMA.empty_table()]
    with progress_bar("pseudonymizing", table.num_rows) as (progress, task):
        for batch in written.iter_batches(batch_size=None, batch_format="pyarrow"):
            batches.append(batch.cast(manifest.SCHEMA))
            progress.update(task, advance=batch.num_rows)
    all_rows = pa.concat_tables(batches)
    if not all_rows.num_rows:
        raise UserError(
            "the DICOM headers of all images declare burned-in text or recognizable features; prepare others"
        )
    rows, merged, conflicting = _drop_duplicates(all_rows)
    for uri in set(all_rows["uri"].to_pylist()) - set(rows["uri"].to_pylist()):
        storage.remove_file(storage.join(out, uri))  # written above
    manifest.write_manifest(out, rows)
    new_spec = spec.model_copy(
        update={
            "source": "pseudonymized",
            "sha256": fingerprint(rows),
            **describe_symptoms(rows),
            "photographs": rows.num_rows,
            "soft_labels": rows.num_rows - rows["soft_label"].null_count,
        }
    )
    manifest.write_spec(out, new_spec)
    suffixes = [uri.rsplit(".", 1)[-1] for uri in rows["uri"].to_pylist()]
    summary = {
        "kind": "pseudonymize",
        "date": now(),
        "of": spec.sha256,
        "photographs": rows.num_rows,
        "by_format": {suffix: suffixes.count(suffix) for suffix in sorted(set(suffixes))},
        "equal_without_metadata": merged,
        "conflicting_labels": conflicting,
        "identifying_pixels": table.num_rows - all_rows.num_rows,
        "key": "kept" if kept else "thrown away",
        "sha256": new_spec.sha256,
    }
    write_json(storage.join(out, SUMMARY_FILE), summary)
    return summary


def _drop_duplicates(rows: pa.Table) -> tuple[pa.Table, int, int]:
    """Keep one row per image content: some files differ only in their metadata.

    Returns:
        Kept rows, number of dropped rows of equal content and label, number of rows of equal content whose
        labels conflict, which are all dropped.
    """
    grades = [f"{row['label']} {row['labels']}" for row in rows.select(["label", "labels"]).to_pylist()]
    same = (
        rows.append_column("grades", pa.array(grades, pa.string()))
        .group_by("image_id")
        .aggregate([("grades", "count_distinct"), ("uri", "min"), ("uri", "count")])
    )
    agreeing = same.filter(pc.field("grades_count_distinct") == 1)
    conflicting = rows.num_rows - (pc.sum(agreeing["uri_count"]).as_py() or 0)
    kept = rows.filter(pc.is_in(rows["uri"], agreeing["uri_min"].combine_chunks()))
    return kept, rows.num_rows - conflicting - kept.num_rows, conflicting


def _load_key(key_file: str | None, out: str) -> bytes:
    if key_file is None:
        return secrets.token_bytes(KEY_BYTES)
    if "://" in key_file:
        raise UserError(
            f"--key-file {key_file} is not a local file; choose one on this machine: the key is a secret "
            "that traces every code back"
        )
    path = Path(key_file)
    if storage.absolute(path).startswith(f"{out}/"):
        raise UserError(
            f"--key-file {key_file} is in OUT, and would be shared with the images; choose another folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # An existing file is not overwritten, nor one that another run makes at the same time.
    with suppress(FileExistsError), open(path, "x", opener=_open_private) as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")
    try:
        key = bytes.fromhex(path.read_text().strip())
    except (OSError, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError(
            f"--key-file {key_file} does not hold {2 * KEY_BYTES} hexadecimal digits; choose a new file"
        )
    return key


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Pseudonymize:
    """Task: write the images of a batch under their codes, and return the new rows of written images.

    An image whose header declares that its pixels identify a person is not written.
    """

    def __init__(self, out: str, key: bytes) -> None:
        self._out = out
        self._key = key

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        locations = [location_of(row) for row in rows]
        files = datasets_locations.read_images(locations, codecs.MAX_BYTES)
        written = [self._write(row, data) for row, data in zip(rows, files, strict=True)]
        return pa.Table.from_pylist([row for row in written if row], schema=manifest.SCHEMA)

    def _write(self, row: dict[str, Any], data: bytes | ImageError) -> dict[str, Any] | None:
        try:
            if isinstance(data, ImageError):
                raise data
            if declares_identity(data):
                return None
            image, suffix = strip_metadata(data)
        except ImageError as error:
            raise unreadable(location_of(row), error) from None
        grade = "unlabelled" if row["label"] is None else str(row["label"])
        name = pseudonym(self._key, f"photograph:{row['sha256']}") + suffix
        uri = storage.join(IMAGES_FOLDER, grade, name)  # relative to OUT, which may be moved
        storage.write(storage.join(self._out, uri), image)
        digest = hashlib.sha256(image).hexdigest()
        location = dict.fromkeys(LOCATION_COLUMNS) | {"uri": uri, "sha256": digest}
        location["image_id"] = manifest.image_id(digest)
        return pseudonymize_row(row, self._key) | location
