"""`scalp grade --plan` counts the images of the sources, and writes nothing."""

import re
from pathlib import Path

import pytest

from jobs.common.inference import ModelOptions
from jobs.grade.estimate import estimate
from scalp_core import storage
from scalp_core.errors import UserError
from tests.support.command import run_scalp
from tests.support.small_grade import run, sources, write_bundle


def test_images_are_counted_and_nothing_is_written(tmp_path, capsys):
    named, out = sources(str(tmp_path / "data")), tmp_path / "out"
    found = estimate(
        write_bundle(str(tmp_path / "bundle")), named, str(out), ModelOptions(), rate=10, price=3.6
    )
    assert (found["images"], found["tars"], found["other_files"]) == (8, 1, 1)
    assert found["hours"] == pytest.approx(8 / 36_000) and found["cost"] == pytest.approx(8e-4)
    assert found["requests"] == 0 and not out.exists()
    assert re.search(
        "8 and those in 1 tar .* 0.0 minutes at 10.0 images/s", capsys.readouterr().out, re.DOTALL
    )


def test_the_rate_and_the_images_that_are_done_come_from_out(tmp_path):
    named, out = [f"{tmp_path}/data/more"], str(tmp_path / "out")
    sources(str(tmp_path / "data"))
    bundle = write_bundle(str(tmp_path / "bundle"))
    assert estimate(bundle, named, out, ModelOptions())["hours"] is None
    summary = run(bundle, named, out, report=False)
    found = estimate(bundle, named, out, ModelOptions())
    assert (found["rate"], found["done"], found["hours"]) == (summary["photographs_per_second"], 2, 0)


def test_objects_in_s3_cost_requests(s3, tmp_path):
    for index in range(3):
        storage.write(f"s3://{s3.bucket}/{tmp_path.name}/{index}.jpg", b"x")
    bundle = write_bundle(str(tmp_path / "bundle"))
    found = estimate(bundle, [f"s3://{s3.bucket}/{tmp_path.name}"], f"{tmp_path}/out", ModelOptions(), rate=1)
    assert (found["images"], found["bytes"], found["requests"]) == (3, 3, 2 * 3 + 1)


def test_a_missing_source_is_refused(tmp_path):
    with pytest.raises(UserError, match="none"):
        estimate(
            write_bundle(str(tmp_path / "bundle")), [f"{tmp_path}/none"], f"{tmp_path}/out", ModelOptions()
        )


def test_what_the_run_would_refuse_is_refused(tmp_path):
    bundle = write_bundle(str(tmp_path / "bundle"))
    first, second = (Path(sources(str(tmp_path / name))[0]) for name in ("first", "second"))
    done = run_scalp("grade", tmp_path / "none", first, "--out", tmp_path / "out", "--plan")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {tmp_path}/none is not a bundle" in done.stderr
    done = run_scalp("grade", bundle, first, second, "--plan")  # OUT is forgotten
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: OUT {second} is not empty" in done.stderr and "name OUT with --out" in done.stderr
    run(bundle, [str(first)], str(tmp_path / "out"), report=False)
    with pytest.raises(UserError, match="holds results of sources"):
        estimate(bundle, [str(second)], str(tmp_path / "out"), ModelOptions())
