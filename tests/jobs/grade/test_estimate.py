"""`scalp grade --plan` counts the images of the sources, and writes nothing."""

import re

import pytest

from jobs.grade.estimate import estimate
from scalp_core import storage
from scalp_core.errors import UserError
from tests.support.small_grade import run, sources, write_bundle


def test_images_are_counted_and_nothing_is_written(tmp_path, capsys):
    named, out = sources(str(tmp_path / "data")), tmp_path / "out"
    found = estimate(named, str(out), rate=10, price=3.6)
    assert (found["images"], found["tars"], found["other_files"]) == (8, 1, 1)
    assert found["hours"] == pytest.approx(8 / 36_000) and found["cost"] == pytest.approx(8e-4)
    assert found["requests"] == 0 and not out.exists()
    assert re.search(
        "8 and those in 1 tar .* 0.0 minutes at 10.0 images/s", capsys.readouterr().out, re.DOTALL
    )


def test_the_rate_and_the_images_that_are_done_come_from_out(tmp_path):
    named, out = [f"{tmp_path}/data/more"], str(tmp_path / "out")
    sources(str(tmp_path / "data"))
    assert estimate(named, out)["hours"] is None
    summary = run(write_bundle(str(tmp_path / "bundle")), named, out, report=False)
    found = estimate(named, out)
    assert (found["rate"], found["done"], found["hours"]) == (summary["photographs_per_second"], 2, 0)


def test_objects_in_s3_cost_requests(s3, tmp_path):
    for index in range(3):
        storage.write(f"s3://{s3.bucket}/{tmp_path.name}/{index}.jpg", b"x")
    found = estimate([f"s3://{s3.bucket}/{tmp_path.name}"], f"{tmp_path}/out", rate=1)
    assert (found["images"], found["bytes"], found["requests"]) == (3, 3, 2 * 3 + 1)


def test_a_missing_source_is_refused(tmp_path):
    with pytest.raises(UserError, match="none"):
        estimate([f"{tmp_path}/none"], f"{tmp_path}/out")
