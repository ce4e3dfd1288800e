"""`scalp quantize`: other files in the bundle, and concurrent runs."""

import shutil
from types import SimpleNamespace

import pytest

from jobs.common.console import SUMMARY_FILE
from jobs.models.quantize import quantize
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.storage import lease, outputs


@pytest.mark.parametrize("text", ["[]", '{"kind": "evaluate"}', "my notes"])
def test_summary_of_another_program_is_refused_and_kept(bundle, tmp_path, text):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    (copy / SUMMARY_FILE).write_text(text)
    with pytest.raises(UserError, match=f"{copy}/{SUMMARY_FILE} was not written by scalp quantize; move it"):
        quantize(str(copy), str(tmp_path / "data"))
    assert (copy / SUMMARY_FILE).read_text() == text


@pytest.mark.parametrize("verb", ["train", None], ids=["in a run", "alone"])
def test_a_bundle_in_use_is_refused(bundle, tmp_path, monkeypatch, verb):
    """`scalp train` also writes the bundle of a run."""
    run = tmp_path / "run"
    if verb:
        outputs.claim_output(str(run), verb)
    copy = shutil.copytree(bundle, run / "bundle")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(manifest, "read_spec", lambda _: SimpleNamespace(sha256="0" * 64))
    with (
        lease.hold(str(run if verb else copy), verb or "quantize"),
        pytest.raises(UserError, match=f"is in use by scalp {verb or 'quantize'}"),
    ):
        quantize(str(copy), str(tmp_path / "data"))
    kept = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert {path: data for path, data in kept.items() if lease.FOLDER not in path.parts} == before
