"""The simulated source of `scalp bench scale` passes through the real steps of `prepare`."""

import numpy as np

from jobs.bench.grade.simulated_source import fit_bits, lay_out_roots, prepare_simulated
from jobs.common.executor import InProcessExecutor


def test_simulated_objects_are_listed_examined_and_audited(tmp_path):
    source = tmp_path / "source"
    lay_out_roots(source)
    out = str(tmp_path / "out")
    model = fit_bits(np.random.default_rng(0).integers(2**63, size=(200, 2), dtype=np.uint64))
    summary = prepare_simulated(str(source), out, 1000, model, InProcessExecutor())
    assert summary["objects_listed"] == summary["photographs"] == 1000
