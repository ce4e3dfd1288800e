"""The tables of kept results: newest files, all ratios, lost ones first."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.ratios import RATIOS, score
from tests.docs.results import Result, benchmarks, newest

PAGE = """# Page
<!-- generated: results serve -->
old
<!-- end -->
## Other
<!-- generated: results * -->
<!-- end -->
"""


def content(kind, **ratios):
    machine = {"cpu": "AMD EPYC", "cores": 2, "gpu": None}
    settings = {"photographs": 1200, "rounds": 2}
    return {
        "kind": kind,
        "date": "2026-11-30T01:00:00+00:00",
        "git_revision": "0123456789ab",
        "machine": machine,
        "settings": settings,
        "rows": [],
        "ratios": ratios,
    }


def kept(folder, name, value):
    path = folder / name
    path.write_text(json.dumps(value))
    return path


def test_the_newest_file_of_each_benchmark_and_machine_counts(tmp_path):
    for name in ("bulk-2026-11-29-2cores", "bulk-2026-11-30-2cores", "bulk-2026-11-28-h200"):
        kept(tmp_path, f"{name}.json", content("bulk"))
    found = {result.path.stem for result in newest(tmp_path)}
    assert found == {"bulk-2026-11-30-2cores", "bulk-2026-11-28-h200"}
    kept(tmp_path, "summary.json", content("bulk"))
    with pytest.raises(ValueError, match="summary.json is not named"):
        newest(tmp_path)


def test_a_section_has_the_conditions_and_the_lost_ratios_first(tmp_path):
    ratios = {
        "rps_vs_litserve_c8": 1.4,
        "rps_vs_litserve_c16": None,
        "rps_vs_litserve_with_our_engine_c32": 0.7,
        "p50_vs_litserve_with_our_engine_c1": 1.25,
    }
    path = kept(tmp_path, "serve-2026-11-30-2cores.json", content("serve", **ratios))
    page = benchmarks(PAGE, newest(tmp_path))
    assert "**serve**: 2 cores of AMD EPYC, 2026-11-30, revision 0123456789ab, 1,200 images, 2 rounds" in page
    assert f"(results/{path.name})" in page and "old" not in page
    lines = [line.split(" | ")[:2] for line in page.splitlines() if line.startswith("| `")]
    assert lines == [
        ["| `rps_vs_litserve_with_our_engine_c32`", "0.7"],
        ["| `p50_vs_litserve_with_our_engine_c1`", "1.25"],
        ["| `rps_vs_litserve_c8`", "1.4"],
    ]


def test_a_benchmark_without_a_section_is_among_the_others(tmp_path):
    results = [Result(tmp_path / "new-2026-11-30-2cores.json", "new", content("new", much=2))]
    assert "**new**" in benchmarks(PAGE, results).split("## Other")[1]


def test_a_missed_goal_is_below_one():
    assert score("higher", 0.9) < 1 < score("higher", 1.1)
    assert score("lower", 1.1) < 1 < score("lower", 0.9)
    assert score("0", 2) < 1 < score("0", 0)
    assert score("2 or less", 2.5) < 1 < score("2 or less", 1.5)
    assert score("yes", False) < 1 < score("yes", True)
    assert score("1", 1.1) < 1 and score("", 0.1) == 1


@pytest.mark.parametrize("result", newest(), ids=lambda result: result.path.stem)
def test_every_kept_ratio_has_a_meaning(result):
    ratios = result.content.get("ratios") or {}
    assert set(ratios) <= set(RATIOS.get(result.content["kind"], {}))
