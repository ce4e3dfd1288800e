"""Simulated objects for `scale`: names like AI Hub's, perceptual hashes like those of images.

Perceptual hashes are not uniform: their bits depend on each other, so that they collide more often. Each bit
has the mean, and each pair of bits the correlation, that rendered images behind a round mask have.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from scipy.stats import norm

from jobs.common.executor import Executor
from jobs.data.prepare import prepare
from jobs.data.tasks import EXAMINED, LISTED, write_listed
from scalp_core import storage
from scalp_core.datasets import aihub, scan
from scalp_core.datasets.scan import Root
from scalp_core.grades import GRADE_NAMES_KO, SYMPTOMS
from scalp_core.images.signature import THUMBNAIL_BYTES, compute_signature
from scalp_core.storage import parquet
from scalp_core.synthetic.dataset import render_jpeg
from scalp_core.synthetic.plan import SynthOptions, plan_dataset

FOLDERS = 64

_SHARES = np.cumsum((0.05, 0.35, 0.43, 0.17))  # of the grades, about as in the paper
DEVICES = 100
SHOTS = 5
START_MS = int(datetime(2020, 10, 13, tzinfo=UTC).timestamp() * 1000)

_PLANNED = 600  # about 140 people, one image of each is rendered
_MASK_RADIUS, _MASK_CENTER = 190, (260, 260)
_COPIES = 0.01  # fraction of objects that are near-duplicates of the previous one
_ROWS_PER_FILE = 50_000


class HashModel(NamedTuple):
    """A normal distribution whose signs are the bits of a hash.

    Args:
        means: Float (128,), of the plain hash's bits and the turned hash's.
        root: Float (128, 128); its product with its transpose is the correlation.
    """

    means: np.ndarray
    root: np.ndarray

    def draw(self, rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Plain and turned hashes; uint64 (number,) each."""
        normal = rng.standard_normal((number, len(self.means)), np.float32) @ self.root.T
        packed = np.packbits(normal + self.means > 0, axis=1).view(">u8").astype(np.uint64)
        return packed[:, 0], packed[:, 1]


def fit_hashes() -> HashModel:
    """Fit the model to rendered images behind a round mask."""
    rows, columns = np.mgrid[:480, :640]
    across, down = _MASK_CENTER
    is_inside = (columns - across) ** 2 + (rows - down) ** 2 < _MASK_RADIUS**2
    plans = plan_dataset(SynthOptions(images=_PLANNED, seed=9, devices=40))
    one_each = {plan.stem.rsplit("_", 2)[0]: plan for plan in plans}
    hashes = []
    for plan in one_each.values():
        pixels = np.asarray(Image.open(io.BytesIO(render_jpeg(plan)))) * is_inside[..., None]
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=85)
        signature = compute_signature(buffer.getvalue())
        if signature.hash is not None and signature.turned_hash is not None:
            hashes.append((signature.hash, signature.turned_hash))
    return fit_bits(np.array(hashes, np.uint64))


def fit_bits(hashes: np.ndarray) -> HashModel:
    """Fit the model to hashes; uint64 (N, 2)."""
    bits = np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(len(hashes), -1), axis=1)
    shares = (bits.sum(axis=0) + 0.5) / (len(bits) + 1)
    signs = bits * 2.0 - 1
    spread = np.maximum(signs.std(axis=0), 1e-9)
    correlation = (
        ((signs - signs.mean(axis=0)) / spread).T @ ((signs - signs.mean(axis=0)) / spread) / len(bits)
    )
    values, vectors = np.linalg.eigh(np.sin(np.pi / 2 * np.clip(correlation, -1, 1)))
    root = vectors * np.sqrt(np.maximum(values, 0))
    root /= np.maximum(np.linalg.norm(root, axis=1, keepdims=True), 1e-9)
    return HashModel(norm.ppf(shares).astype(np.float32), root.astype(np.float32))


def image_names(number: int, step: int = 1, start: int = 0) -> Iterator[tuple[int, str]]:
    """Index, and path below the source, of each image: AI Hub's layout, people with five shots."""
    for index in range(start, number, step):
        person = index // SHOTS
        grade = int(grades_of(index))
        folder = f"[원천]{SYMPTOMS[0]}_{grade}.{GRADE_NAMES_KO[grade]}"
        device = person % DEVICES
        stem = f"{device:04d}_A2LEBJJDE{device:05d}O_{START_MS + person * 60_000}_{index % SHOTS + 2}_TH"
        part = "Training" if index % 9 < 7 else "Validation"
        yield index, f"{part}/{folder}/{stem}.jpg"


def grades_of(indices: Any) -> Any:
    """Grades in their shares, spread evenly: multiples of the golden ratio."""
    return np.minimum(np.searchsorted(_SHARES, np.asarray(indices) * 0.6180339887498949 % 1), 3)


# --- a whole run of prepare --------------------------------------------------------------------------------


def list_simulated(objects: int, work: str, part: tuple[int, list[Root]]) -> dict[str, int]:
    """Task: list simulated objects, divided among the tasks of the real listing."""
    number, _ = part
    names = image_names(objects, FOLDERS, number)
    return write_listed(work, number, ({"uri": f"/simulated/{name}", "bytes": 60_000} for _, name in names))


def examine_simulated(model: HashModel, work: str, base: str, shard: tuple[str, bool]) -> tuple[int, int]:
    """Task: examine simulated objects without reading files."""
    name, _ = shard
    listed = parquet.read(storage.join(work, LISTED, name))["uri"].to_pylist()
    seed = int.from_bytes(sha256(name.encode()).digest()[:4])
    named = pa.Table.from_pylist(list(map(_named, listed)), schema=scan.EXAMINED)
    devices = np.array(named["device"].to_pylist())
    parquet.write(storage.join(work, EXAMINED, name), _with_signatures(named, devices, model, seed))
    return len(listed), 0


def lay_out_roots(source: Path) -> None:
    """Make the folders over which the listing of a simulated source is divided."""
    for number in range(FOLDERS):
        (source / f"{number:02d}").mkdir(parents=True)
        (source / f"{number:02d}" / "listed.by.none").touch()


def prepare_simulated(
    source: str, out: str, number: int, model: HashModel, executor: Executor | None = None
) -> dict[str, Any]:
    """Run `prepare` with `number` simulated objects in place of those below `source`."""
    listing, examining = partial(list_simulated, number), partial(examine_simulated, model)
    with mock.patch.multiple("jobs.data.prepare", list_roots=listing, examine_shard=examining):
        return prepare(source, out, executor=executor)


# --- the audit alone ---------------------------------------------------------------------------------------


def write_examined(folder: str, number: int, model: HashModel) -> None:
    """Write examined shards of `number` simulated objects."""
    for start in range(0, number, _ROWS_PER_FILE):
        indices = np.arange(start, min(start + _ROWS_PER_FILE, number))
        table = _with_signatures(_named_by_index(indices), indices // SHOTS % DEVICES, model, start)
        parquet.write(storage.join(folder, f"{start:09d}.parquet"), table)


def _named_by_index(indices: np.ndarray) -> pa.Table:
    """Rows as from `_named` for the names of `names.image_names`, computed column by column."""
    person, shot = indices // SHOTS, indices % SHOTS + 2
    grades = grades_of(indices)
    number = pc.utf8_lpad(pa.array(person % DEVICES).cast(pa.string()), 5, "0")
    device = pc.binary_join_element_wise("A2LEBJJDE", number, "O", "")
    milliseconds = pa.array(START_MS + person * 60_000)
    session = milliseconds.cast(pa.string())
    site = pc.utf8_slice_codeunits(number, 1)
    stem = pc.binary_join_element_wise(site, device, session, pa.array(shot).cast(pa.string()), "TH", "_")
    part = pa.array(np.where(indices % 9 < 7, "Training", "Validation"))
    folder = pc.binary_join_element_wise("/simulated", part, pa.array(grades).cast(pa.string()), stem, "/")
    digits = np.frombuffer(
        np.random.default_rng(indices[0]).bytes(32 * len(indices)).hex().encode(), np.uint8
    )
    content = pa.FixedSizeBinaryArray.from_buffers(pa.binary(64), len(indices), [None, pa.py_buffer(digits)])
    columns: dict[str, Any] = {
        "uri": folder,
        "kind": pa.array(["photograph"] * len(indices)),
        "bytes": pa.array(np.full(len(indices), 60_000)),
        "stem": stem,
        "part": part,
        "symptom": pa.array(np.zeros(len(indices), np.int8)),
        "folder_grade": pa.array(grades.astype(np.int8)),
        "site": site,
        "device": device,
        "session": session,
        "captured_at": milliseconds.cast(pa.timestamp("ms", tz="UTC")),
        "position": pa.array(["TH"] * len(indices)),
        "sha256": content.cast(pa.binary()).cast(pa.string()),
        "width": pa.array(np.full(len(indices), 640, np.int32)),
        "height": pa.array(np.full(len(indices), 480, np.int32)),
    }
    rows = [columns.get(field.name, pa.nulls(len(indices), field.type)) for field in scan.EXAMINED]
    return pa.Table.from_arrays(rows, schema=scan.EXAMINED)


def _with_signatures(table: pa.Table, devices: np.ndarray, model: HashModel, seed: int) -> pa.Table:
    """Rows with hashes and thumbnails; one in a hundred is a near-duplicate of another.

    Copies are of the same microscope: those of others would join all microscopes to one group.
    """
    rng = np.random.default_rng(seed)
    rows = len(devices)
    hashes, turned = model.draw(rng, rows)
    texture = rng.integers(1, 256, (rows, THUMBNAIL_BYTES), dtype=np.uint8)
    order = np.argsort(devices, kind="stable")
    is_copy = (devices[order][1:] == devices[order][:-1]) & (rng.random(rows - 1) < _COPIES)
    copies, originals = order[1:][is_copy], order[:-1][is_copy]
    flips = np.uint64(1) << rng.integers(0, 64, len(copies), dtype=np.uint64)
    hashes[copies], turned[copies] = hashes[originals] ^ flips, turned[originals]
    texture[copies] = texture[originals]
    buffers = [None, pa.py_buffer(texture)]
    kind = pa.binary(THUMBNAIL_BYTES)
    columns = {
        "hash": pa.array(hashes),
        "turned_hash": pa.array(turned),
        "thumbnail": pa.FixedSizeBinaryArray.from_buffers(kind, rows, buffers),
    }
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, scan.EXAMINED.field(name), values)
    return table


def _named(uri: str) -> dict[str, Any]:
    """Examined row of an object: fields of its name, and a distinct content hash."""
    folders, stem = aihub.read_folders(uri.rpartition("/")[0]), aihub.stem_of(uri)
    shot = aihub.read_stem(stem)
    return {
        "uri": uri,
        "kind": "photograph",
        "bytes": 60_000,
        "stem": stem,
        "part": folders.part,
        "symptom": folders.symptom,
        "folder_grade": folders.grade,
        "sha256": sha256(uri.encode()).hexdigest(),
        "width": 640,
        "height": 480,
        **(vars(shot) if shot else {}),
    }
