"""`scalp synth`: options that are refused."""

import pytest

from tests.support.command import run_scalp


@pytest.mark.parametrize("words", [("--layout", "nested"), ("--set", "layout=nested")])
def test_a_layout_that_is_read_and_not_written_is_refused_with_those_that_are(words, tmp_path):
    finished = run_scalp("synth", str(tmp_path / "set"), *words)
    assert finished.returncode == 2
    assert all(
        name in finished.stderr for name in ("--", "layout", "'delivered', 'zipped'", "'zipped-cp949'")
    )
    assert not (tmp_path / "set").exists()
