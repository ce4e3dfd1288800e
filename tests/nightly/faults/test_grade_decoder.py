"""A decoder that ends its process costs one row: its shard is tried three times, then image by image."""

import os
from pathlib import Path

import pytest

from scalp_core.results.schema import RESULTS_FOLDER
from tests.support.grading import start
from tests.support.images import jpeg
from tests.support.result_rows import read_results
from tests.support.small_grade import tarred

# In every process of the run: whoever decodes bytes that end so dies as by a fault of a native library.
HOOK = """
import importlib.abc, importlib.util, os, signal, sys

class Deadly(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "jobs.common.images":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            decode = module.decode

            def deadly(data, how):
                if data.endswith(b"deadly"):
                    with open(os.environ["SCALP_TEST_DEATHS"], "a") as file:
                        file.write("x")
                    os.kill(os.getpid(), signal.SIGSEGV)
                if data.endswith(b"odd"):
                    raise RuntimeError("nobody expects this")
                return decode(data, how)

            module.decode = deadly

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Deadly())
"""


@pytest.mark.parametrize("where", ["--cluster", "--local"])
def test_an_image_whose_decoder_ends_its_process_is_one_row(bundle, tmp_path, where):
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    source = tmp_path / "source"
    source.mkdir()
    images = {f"{index}.jpg": jpeg(index, size=(64, 48)) for index in range(4)}
    images |= {"deadly.jpg": jpeg(5, size=(64, 48)) + b"deadly", "odd.jpg": jpeg(6, size=(64, 48)) + b"odd"}
    for name, data in images.items():
        (source / name).write_bytes(data)
    (source / "a.tar").write_bytes(tarred(list(images.items())))
    deaths = tmp_path / "deaths"
    run = start(
        bundle, str(source), str(tmp_path / "out"), tmp_path / "log", options=[where],
        PYTHONPATH=os.pathsep.join([str(tmp_path / "hook"), str(Path(__file__).parents[3])]),
        SCALP_TEST_DEATHS=str(deaths),
    )  # fmt: skip
    run.end()
    rows = read_results(str(tmp_path / "out" / RESULTS_FOLDER)).to_pylist()
    codes = {}
    for row in rows:
        codes.setdefault((row["member"] or Path(row["uri"]).name), []).append(row["error_code"])
    assert codes == {f"{index}.jpg": [None, None] for index in range(4)} | {
        "deadly.jpg": ["crashed", "crashed"], "odd.jpg": ["internal_error", "internal_error"],
    }  # fmt: skip
    assert any(row["error"] == "RuntimeError: nobody expects this" for row in rows)
    # Both shards: three tries, and once more in a child process; one process crashes with both in it.
    assert len(deaths.read_text()) <= 2 * 4
