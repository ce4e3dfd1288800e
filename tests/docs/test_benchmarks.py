"""The tables of kept results: newest files, all ratios, lost ones first."""

from __future__ import annotations

import json
import re

import pytest

from tests.benchmarks.ratios import RATIOS, score
from tests.docs import pictures
from tests.docs.results import ROOT, Result, benchmarks, describe_machine, newest

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


def test_a_processor_without_bf16_is_named():
    machine = {"cpu": "AMD EPYC", "cores": 2, "gpu": None}
    for bf16, name in ((True, "2 cores of AMD EPYC"), (False, "2 cores of AMD EPYC without bf16")):
        assert describe_machine({"machine": machine | {"bf16": bf16}}) == name


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


def test_orders_of_review_have_their_mean_kappa_by_number_of_labels(tmp_path):
    result = content("active-trained", informative_qwk_gain=0.02)
    result["rows"] = [
        {"strategy": strategy, "seed": seed, "labels": labels, "qwk": labels / 1000 + seed / 10}
        for strategy in ("random", "informative")
        for seed in (0, 1)
        for labels in (200, 100)
    ]
    page = benchmarks(PAGE, [Result(tmp_path / "active-2026-11-30-2cores.json", "active", result)])
    assert "mean of 2 seeds" in page and "| order | 100 labels | 200 labels |" in page
    assert "| informative | 0.150 | 0.250 |" in page


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


@pytest.mark.parametrize("path", sorted((ROOT / "docs/results").glob("*.json")), ids=lambda path: path.stem)
def test_no_kept_result_names_a_path_of_the_machine(path):
    assert not re.search(r"[\s=\"'](/tmp|/home|/root|/work|/Users)\b", path.read_text())


def _kept(kind, has):
    content = json.loads(pictures.newest(kind, has).read_text())
    alone = [row for row in content["rows"] if row.get("clients", 1) == 1 and row.get("load") != "idle"]
    return content["ratios"], {(row.get("what"), row.get("source")): row for row in reversed(alone)}


def test_the_figures_of_readme_are_those_of_the_newest_results():
    readme = " ".join((ROOT / "README.md").read_text().split())
    ratios, rows = _kept("bulk", "plain PyTorch fp32")
    rate = {what: f"{row['photographs_per_second']:.0f}" for (what, _), row in rows.items()}
    assert f"{rate['scalp grade']} images/s on two EPYC cores, as fast as the engine alone." in readme
    assert (
        f"PyTorch loops reach {rate['plain PyTorch fp32']} (plain) and {rate['tuned PyTorch']} (tuned)."
        in readme
    )
    assert 0.97 <= ratios["vs_engine"] <= 1.03

    ratios, rows = _kept("serve", "scalp serve")
    wait = {what: f"{row['p50_ms']:.0f} ms" for (what, _), row in rows.items() if "p50_ms" in row}
    assert f"One client waits {wait['scalp serve']} per image (median)" in readme
    pytorch, ours = wait["LitServe, PyTorch, 1 worker"], wait["LitServe, our engine"]
    assert f"LitServe with PyTorch needs {pytorch}, with scalp's engine {ours}." in readme
    lost = {name: 1 - ratio for name, ratio in ratios.items() if name.startswith("rps_vs_") and ratio < 1}
    ((name, less),) = lost.items()
    clients = name.removeprefix("rps_vs_litserve_with_our_engine_c")
    less = f"{less:.0%}".replace("%", " %")
    assert (
        f"At {clients} clients the endpoint answers {less} less than LitServe with scalp's engine." in readme
    )

    (decisions,) = [result.content for result in newest() if result.prefix == "decisions"]
    kept = min(row["wrong_kept"] for row in decisions["rows"] if "wrong_kept" in row)
    assert f"was kept in {kept:.0%}".replace("%", " %") + " or more of the draws of each simulation" in readme

    (demo,) = [result.content for result in newest() if result.prefix == "demo"]
    seconds = {row["step"]: row["seconds"] for row in demo["rows"]}
    assert f"a quadratic weighted kappa of {demo['ratios']['qwk']:.3f}." in readme
    whole, training = f"{demo['ratios']['seconds'] / 60:.0f}", f"{seconds['train'] / 60:.0f}"
    assert f"It took {whole} minutes on two EPYC cores, {training} of them training" in readme

    loops = {
        result.prefix: result.content.get("ratios", {}).get("default_vs_tuned_loop") for result in newest()
    }
    lite, xception = (f"{loops[name]:.2f}" for name in ("train-lite0", "train"))
    assert f"is {lite} times as fast as a tuned PyTorch loop with EfficientNet-lite0" in readme
    assert f"and {xception} times with Xception" in readme


def test_the_table_of_the_gates_is_that_of_its_result():
    section = (ROOT / "docs/gates.md").read_text(encoding="utf-8").split("\n## Detection, measured\n")[1]
    (name,) = re.findall(r"\(results/(out-of-distribution-[^)]+)\)", section)
    measured = []
    for row in json.loads((ROOT / "docs/results" / name).read_text(encoding="utf-8"))["rows"]:
        auroc = row["auroc"]
        of_features = max(auroc["mahalanobis"], auroc["neighbor"])
        of_answers = max(auroc["energy"], auroc["top_probability"])
        flagged = f"{100 * row['flagged']['gates']:.0f} %"
        measured.append(
            [str(row["images"]), f"{auroc['gates']:.3f}", flagged, f"{of_features:.3f}", f"{of_answers:.3f}"]
        )
    lines = re.findall(r"^\| .* \| (\d+) \| (\S+) \| (\d+ %) \| (\S+) \| (\S+) \|$", section, re.M)
    assert sorted(map(list, lines)) == sorted(measured)
