"""The curve compares fine-tuning with training from scratch, with the same images and steps."""

import json

import pytest

from scalp_core.errors import UserError
from tests.benchmarks.transfer import TransferOptions, bench_transfer

SMALL = ("size=64", "batch_size=8")


def test_each_start_has_the_same_steps_and_the_same_test(tmp_path):
    options = TransferOptions(counts=(16, 32), photographs=60, steps=8, settings=SMALL)
    bench_transfer(str(tmp_path), options)
    result = json.loads((tmp_path / "summary.json").read_text())
    assert [(row["images"], row["weights"]) for row in result["rows"]] == [
        (16, "offline"), (16, "none"), (32, "offline"), (32, "none"),
    ]  # fmt: skip
    assert {row["steps"] for row in result["rows"]} == {8}
    for row in result["rows"]:
        low, high = row["qwk_interval"]
        assert low <= row["qwk"] <= high
    scratch = result["settings"]["recipes"]["none"]
    assert (scratch["weights"], scratch["frozen_epochs"], scratch["layer_decay"]) == ("none", 0, 1.0)


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="use more --photographs"):
        bench_transfer(str(tmp_path), TransferOptions(counts=(500,), photographs=60, settings=SMALL))
