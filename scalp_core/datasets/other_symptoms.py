"""Labels of the symptoms other than the one that a manifest's `label` is for."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from scalp_core.grades import SYMPTOM_IDS, SYMPTOMS

OTHER_LABELS = "other_labels"
"""Column that `add_other_labels` adds."""


def other_symptoms(symptom: str | None) -> tuple[str, ...]:
    """Names (`grades.SYMPTOM_IDS`) of the symptoms other than `DataSpec.symptom`, in their order."""
    return tuple(name for name in SYMPTOM_IDS if name != symptom_id(symptom))


def symptom_id(symptom: str | None) -> str:
    """Name (`grades.SYMPTOM_IDS`) of `DataSpec.symptom`; None is micro-keratin."""
    return SYMPTOM_IDS[0] if symptom is None else SYMPTOM_IDS[SYMPTOMS.index(symptom)]


def add_other_labels(table: pa.Table, symptom: str | None) -> pa.Table:
    """Add the grades of the symptoms other than `symptom`, int8 (5,) in the order of `other_symptoms`.

    An image without a label of a symptom has -1.
    """
    labels = np.full((table.num_rows, len(SYMPTOM_IDS)), -1, np.int8)
    for row, grades in enumerate(table["labels"].to_pylist()):
        if grades:
            labels[row] = [-1 if grade is None else grade for grade in grades]
    others = np.delete(labels, SYMPTOM_IDS.index(symptom_id(symptom)), axis=1)
    return table.append_column(
        OTHER_LABELS, pa.FixedSizeListArray.from_arrays(others.ravel(), others.shape[1])
    )
