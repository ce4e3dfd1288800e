"""A review of suspect labels: from the answers of folds to readers' answers in the label log."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.common.console import read_json, write_json
from jobs.evaluate.audit_labels import audit_labels
from scalp_core import storage
from scalp_core.datasets.manifest import image_id
from scalp_core.errors import UserError
from scalp_core.evaluation.label_errors import OUT_OF_FOLD_FILE, SUSPECTS_FILE
from scalp_core.labels.log import Answer, read_labels
from scalp_core.review.pictures import read_jpeg
from scalp_core.storage import parquet
from tests.support.images import jpeg
from tests.support.reviewing import ids, open_review

WRONG = {7: 0.9, 13: 0.99}  # probability of another grade than the label


@pytest.fixture
def audit(tmp_path):
    rows = []
    for number in range(40):
        data, uri = jpeg(number), f"{tmp_path}/images/{number}.jpg"
        storage.write(uri, data)
        digest, sure = sha256(data).hexdigest(), WRONG.get(number, 0.85)
        probabilities = np.full(4, (1 - sure) / 3)
        probabilities[number % 4] = sure
        rows.append(
            {
                "image_id": image_id(digest),
                "sha256": digest,
                "uri": uri,
                "member": None,
                "label": (number + 2) % 4 if number in WRONG else number % 4,
                "group": f"g{number}",
                "probabilities": probabilities.tolist(),
            }
        )
    parquet.write(f"{tmp_path}/run/{OUT_OF_FOLD_FILE}", pa.Table.from_pylist(rows))
    write_json(f"{tmp_path}/run/summary.json", {"student": {"model_version": "run-12ab"}})
    audit_labels(f"{tmp_path}/run", f"{tmp_path}/suspects")
    return f"{tmp_path}/suspects"


@pytest.fixture
def labels(tmp_path):
    return str(tmp_path / "labels")


def test_answers_to_suspects_go_into_the_log_the_likeliest_error_first(audit, labels, capsys):
    session = open_review(audit, labels)
    assert "0 of 2 images with suspect labels are answered by kim" in capsys.readouterr().out
    order = ids(session)
    assert [Path(session.location(image).uri).stem for image in order] == ["13", "7"]
    assert session.image(order[0])["model"] is None  # neither the model's answer nor the label
    assert read_jpeg(session.location(order[0])).startswith(b"\xff\xd8")
    session.answer(order[0], Answer(grade=1))
    (label,) = read_labels(labels)
    assert (label.grade, label.group, label.saw_model) == (1, "g13", False)
    assert (label.model_grade, label.model_version) == (1, "folds of run-12ab")
    assert ids(open_review(audit, labels)) == order[1:]


def test_the_page_names_the_reason_if_the_model_is_shown(audit, labels):
    session = open_review(audit, labels, show_model=True)
    shown = session.image(ids(session)[0])["model"]
    assert (shown["grade"], shown["grade_set"], shown["refer_reasons"]) == (1, [1], ["suspect_label"])


def test_what_cannot_be_reviewed_is_refused_before_the_log_is_made(audit, labels, bundle):
    def refused(match, **options):
        with pytest.raises(UserError, match=match):
            open_review(audit, labels, **options)
        assert not storage.exists(labels)

    refused("--order informative is for images that a model refers.*omit --order", order="informative")
    refused("the models of all folds graded .*omit the bundle", bundle=str(bundle))
    uri, summary = f"{audit}/{SUSPECTS_FILE}", read_json(f"{audit}/summary.json")
    suspects = parquet.read(uri)
    parquet.write(uri, suspects.drop_columns("sha256"))
    refused("has no column sha256, because an older version")
    parquet.write(uri, suspects.slice(0, 0))
    refused("has no suspect label to review")
    parquet.write(uri, suspects)
    write_json(f"{audit}/summary.json", summary | {"symptom": "dandruff"})
    refused("are of dandruff")
    storage.remove_file(f"{audit}/summary.json")
    refused("is not finished; run the same scalp audit-labels command again")
