"""Fingerprints of a manifest: of contents, labels and splits, and of the grades of the six symptoms."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalp_core.grades import NUM_GRADES, SYMPTOM_IDS

_FINGERPRINTED = ["sha256", "label", "split", "fold"]
_ROWS_A_DIGEST = 50_000


def fingerprint(rows: pa.Table | pa.RecordBatchReader) -> str:
    """Fingerprint contents, labels and splits, independent of the order of rows, in constant memory.

    It is the sum, modulo 2**256, of the SHA-256 of each row's `sha256,label,split,fold`, followed by a comma
    and the soft label, `0.5;0.5;0;0`, if it has one.
    """
    total = 0
    for batch in rows.to_batches(_ROWS_A_DIGEST) if isinstance(rows, pa.Table) else rows:
        columns = [pc.fill_null(batch[name].cast(pa.string()), "") for name in _FINGERPRINTED]
        lines = pc.binary_join_element_wise(*columns, ",")
        if batch["soft_label"].null_count < batch.num_rows:
            lines = pc.binary_join_element_wise(lines, _soft_label_suffixes(batch["soft_label"]), "")
        total += _sum_digests(lines)
    return f"{total % 2**256:064x}"


def describe_symptoms(rows: pa.Table | pa.RecordBatchReader) -> dict[str, Any]:
    """Fingerprint and count the grades of the six symptoms: `labels_sha256` and `symptoms` of `DataSpec`.

    The fingerprint is the sum, modulo 2**256, of the SHA-256 of `sha256,2;0;;1;0;0` of each row with labels.
    It is separate from `fingerprint`, so that data of earlier versions keep theirs. Constant memory.

    Args:
        rows: Rows with the columns `sha256` and `labels`.
    """
    total, counts = 0, np.zeros((len(SYMPTOM_IDS), NUM_GRADES), int)
    for batch in rows.to_batches(_ROWS_A_DIGEST) if isinstance(rows, pa.Table) else rows:
        graded = batch.filter(pc.is_valid(batch["labels"]))
        total += _sum_digests(_label_lines(graded))
        for number, of_symptom in enumerate(counts):
            known = pc.list_element(graded["labels"], number).drop_null()
            of_symptom += np.bincount(known, minlength=NUM_GRADES)
    if not counts.any():
        return {"labels_sha256": None, "symptoms": {}}
    symptoms = dict(zip(SYMPTOM_IDS, map(tuple, counts.tolist()), strict=True))
    return {"labels_sha256": f"{total % 2**256:064x}", "symptoms": symptoms}


def fingerprint_labels(table: pa.Table) -> str:
    """Fingerprint the grades of the six symptoms: `labels_sha256` of `describe_symptoms`."""
    batches = table.filter(pc.is_valid(table["labels"])).to_batches(_ROWS_A_DIGEST)
    return f"{sum(_sum_digests(_label_lines(batch)) for batch in batches) % 2**256:064x}"


def _label_lines(graded: pa.RecordBatch) -> pa.Array:
    """Lines `sha256,2;0;;1;0;0` of rows that have labels."""
    labels = graded["labels"]
    texts = pc.fill_null(labels.values.cast(pa.string()), "")
    joined = pc.binary_join(pa.ListArray.from_arrays(labels.offsets, texts), ";")
    return pc.binary_join_element_wise(graded["sha256"], joined, ",")


def _sum_digests(lines: pa.Array) -> int:
    """Sum of the SHA-256 of each line."""
    digests = b"".join([hashlib.sha256(line).digest() for line in lines.cast(pa.binary()).to_pylist()])
    words = np.frombuffer(digests, "<u4").reshape(-1, 8).sum(axis=0, dtype=np.uint64)
    return sum(int(word) << 32 * place for place, word in enumerate(words))


def _soft_label_suffixes(column: pa.Array) -> pa.Array:
    values = column.to_pylist()
    return pa.array([f",{';'.join(f'{part:g}' for part in soft)}" if soft else "" for soft in values])
