"""A file of a bundle that `scalp quantise` does not take for its own."""

import shutil

import pytest

from jobs.console import SUMMARY_FILE
from jobs.quantise import quantise
from scalp_core.errors import UserError


@pytest.mark.parametrize("text", ["[]", '{"kind": "evaluate"}', "my notes"])
def test_a_summary_of_somebody_else_is_refused_and_kept(bundle, tmp_path, text):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    (copy / SUMMARY_FILE).write_text(text)
    with pytest.raises(UserError, match=f"{copy}/{SUMMARY_FILE} was not written by scalp quantise; move it"):
        quantise(str(copy), str(tmp_path / "data"))
    assert (copy / SUMMARY_FILE).read_text() == text
