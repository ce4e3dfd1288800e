"""`scalp audit-labels`: the suspect labels of handmade out-of-fold answers."""

import json

import numpy as np
import pyarrow as pa

from jobs.evaluate.audit_labels import audit_labels
from scalp_core import storage
from scalp_core.evaluation.label_errors import OUT_OF_FOLD_FILE
from scalp_core.storage import parquet
from tests.support.images import jpeg
from tests.support.korean_view import untranslated


def test_a_wrong_label_is_listed_with_its_image_in_both_languages(tmp_path):
    labels = [number % 4 for number in range(40)]
    rows = []
    for number, label in enumerate(labels):
        image = tmp_path / "images" / f"{number}.jpg"
        storage.write(str(image), jpeg(number))
        probabilities = np.full(4, 0.05)
        probabilities[label] = 0.85
        rows.append(
            {
                "image_id": f"{number:020x}",
                "uri": str(image),
                "member": None,
                "label": (label + 2) % 4 if number == 7 else label,
                "group": "a",
                "probabilities": probabilities.tolist(),
            }
        )
    parquet.write(f"{tmp_path}/run/{OUT_OF_FOLD_FILE}", pa.Table.from_pylist(rows))
    storage.write(f"{tmp_path}/run/summary.json", json.dumps({"synthetic": True}).encode())
    summary = audit_labels(str(tmp_path / "run"), str(tmp_path / "suspects"))
    assert (summary["images"], summary["suspects"]) == (40, 1)
    assert summary["by_label_and_suggestion"][1][3] == 1
    html = (tmp_path / "suspects/report.html").read_text()
    assert html.count("<figure>") == 1 and "7.jpg" in html
    assert untranslated(html) == []
