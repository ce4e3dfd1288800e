"""Tables of the kept results in docs/results, for docs/benchmarks.md and docs/status.md: `make docs`.

A generated part of docs/benchmarks.md is between `<!-- generated: results NAME … -->` and `<!-- end -->`. It
has the newest file of each machine, for each name of a benchmark. `*` stands for all without a section.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.benchmarks.ratios import RATIOS, Ratio, score
from tests.docs.tables import table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"
BENCHMARKS = ROOT / "docs/benchmarks.md"
_PART = re.compile(r"(<!-- generated: results ([\w* -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{7,40}(?:-dirty)?")
_NAME = re.compile(r"(.+)-\d{4}-\d\d-\d\d[b-z]?-(.+)")  # a letter: another run of the same day
_STATUS: dict[str, Any] = yaml.safe_load((RESULTS / "status.yaml").read_text(encoding="utf-8"))


class Result(NamedTuple):
    """A kept result.

    Args:
        path: Its file.
        prefix: Name of the benchmark, from the file's name.
        content: Parsed JSON.
    """

    path: Path
    prefix: str
    content: dict[str, Any]


def newest(folder: Path = RESULTS) -> list[Result]:
    """Newest result of each benchmark and machine, by name."""
    found: dict[tuple[str, str], Result] = {}
    for path in sorted(folder.glob("*.json")):  # a name has the date
        if not (match := _NAME.fullmatch(path.stem)):
            raise ValueError(f"{path.name} is not named BENCHMARK-YYYY-MM-DD-MACHINE.json")
        prefix, machine = match.groups()
        found[prefix, machine] = Result(path, prefix, json.loads(path.read_text(encoding="utf-8")))
    return list(found.values())


# --- docs/benchmarks.md ------------------------------------------------------------------------------------


def benchmarks(text: str | None = None, results: list[Result] | None = None) -> str:
    """The page with its generated parts made again."""
    text = BENCHMARKS.read_text(encoding="utf-8") if text is None else text
    kept = [result for result in results or newest() if result.content.get("ratios")]
    named = {name for part in _PART.finditer(text) for name in part[2].split()}

    def generate(part: re.Match[str]) -> str:
        names = part[2].split()
        chosen = [
            result
            for result in kept
            if result.prefix in names or ("*" in names and result.prefix not in named)
        ]
        sections = "\n".join(_section(result) for result in chosen)
        return f"{part[1]}{sections}{part[3]}"

    return _PART.sub(generate, text)


def _section(result: Result) -> str:
    """Conditions of one run, its ratios with the lost ones first, and its rows."""
    content, settings = result.content, result.content.get("settings") or {}
    counts = [
        f"{settings[name]:,} {unit}"
        for name, unit in (("photographs", "images"), ("images", "images"), ("rounds", "rounds"))
        if isinstance(settings.get(name), int)
    ]
    facts = [describe_machine(content), content["date"][:10], f"revision {_revision(content)}", *counts]
    note = _STATUS["notes"].get(result.path.name)
    parts = [f"**{result.prefix}**: {', '.join(facts)} ([{result.path.name}](results/{result.path.name}))."]
    if note:
        parts[0] += f" {note}"
    meanings = RATIOS.get(content["kind"], {})
    entries = [(meanings.get(name, Ratio("", "")), name, value) for name, value in content["ratios"].items()]
    entries = [entry for entry in entries if entry[2] is not None]
    entries.sort(key=lambda entry: min(score(entry[0].better, entry[2]), 1.0000001))
    rows = [(f"`{name}`", format_value(value), ratio.better, ratio.meaning) for ratio, name, value in entries]
    parts.append(table(("ratio", "value", "better", "meaning"), rows))
    parts += _ROWS.get(content["kind"], lambda _: [])(content["rows"])
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _bulk_rows(rows: list[dict[str, Any]]) -> list[str]:
    columns = ("photographs_per_second", "whole_seconds", "start_up_seconds")
    cells = [
        (
            _name(row["what"]),
            row["source"],
            *(f"{row[name]:,.1f}" for name in columns),
            _equal_grades(row),
        )
        for row in rows
    ]
    headings = (
        "candidate",
        "source",
        "images/s, steady",
        "seconds, whole run",
        "of which start-up",
        "equal grades",
    )
    return [table(headings, cells)]


def _train_rows(rows: list[dict[str, Any]]) -> list[str]:
    cells = [(_name(row["what"]), f"{row['photographs_per_second']:,.1f}") for row in rows]
    return [table(("candidate", "images/s"), cells)]


def _serve_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Closed loops by number of clients, and the open loop with the same rate for all."""
    closed = [row for row in rows if row["load"] == "closed" and "p50_ms" in row]
    clients = sorted({row["clients"] for row in closed})
    by_server: dict[str, dict[int, dict[str, Any]]] = {}
    for row in closed:
        by_server.setdefault(row["what"], {})[row["clients"]] = row
    headings = [
        "server",
        *(f"{count}: {figure}" for count in clients for figure in ("images/s", "p50", "p99")),
    ]
    cells = [
        [
            _name(server),
            *(
                f"{loads[count][name]:,.1f}" if count in loads else ""
                for count in clients
                for name in ("requests_per_second", "p50_ms", "p99_ms")
            ),
        ]
        for server, loads in by_server.items()
    ]
    parts = [
        "Clients that send the next image after an answer, by their number; p50 and p99 in ms:",
        table(tuple(headings), cells),
    ]
    common = [row for row in rows if row["load"] == "open, the same for all"]
    if common:
        rate = common[0]["offered_per_second"]
        parts += [
            f"{rate:g} images per second at random moments, ms:",
            table(
                ("server", "p50", "p99"),
                [(_name(row["what"]), f"{row['p50_ms']:,.1f}", f"{row['p99_ms']:,.1f}") for row in common],
            ),
        ]
    return parts


def _active_rows(rows: list[dict[str, Any]]) -> list[str]:
    kappa: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        kappa.setdefault(row["strategy"], {}).setdefault(row["labels"], []).append(row["qwk"])
    labels, seeds = sorted({row["labels"] for row in rows}), len({row["seed"] for row in rows})
    cells = [
        (strategy, *(f"{statistics.mean(by_labels[count]):.3f}" for count in labels))
        for strategy, by_labels in kappa.items()
    ]
    headings = ("order", *(f"{count} labels" for count in labels))
    return [f"Kappa on the test images, mean of {seeds} seeds:", table(headings, cells)]


_ROWS = {
    "active": _active_rows,
    "active-trained": _active_rows,
    "bulk": _bulk_rows,
    "serve": _serve_rows,
    "train": _train_rows,
}


def _name(what: str) -> str:
    return what.replace("our engine", "scalp's engine")


def _equal_grades(row: dict[str, Any]) -> str:
    if "same_grades" not in row:
        return "not recorded"
    return "no grades" if row["same_grades"] is None else f"{row['same_grades']:.1%}"


def format_value(value: Any) -> str:
    """Three digits of a ratio; yes or no."""
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value:.3g}"


def describe_machine(content: dict[str, Any]) -> str:
    """Cores and processor, or GPU, of a result; a processor without bf16 computes in fp32."""
    machine = content["machine"]
    cpu = re.sub(r"\((R|TM)\)|Processor", "", machine.get("cpu", "")).strip()
    cores = f"{machine['cores']} cores" + (f" of {cpu}" if cpu else "")
    cores += " without bf16" if machine.get("bf16") is False else ""
    return f"{machine['gpu']}, {cores}" if machine.get("gpu") else cores


def _revision(content: dict[str, Any]) -> str:
    """Commit of a result; those of the rows if each has its own. Words after a commit are left out."""
    texts = [content["git_revision"]] if content.get("git_revision") else _row_revisions(content)
    found = [match[0] for text in texts if (match := _COMMIT.match(text))]
    return ", ".join(dict.fromkeys(found)) or "not recorded"


def _row_revisions(content: dict[str, Any]) -> list[str]:
    return [row["git_revision"] for row in content["rows"] if row.get("git_revision")]


def _storage(kind: dict[str, Any], content: dict[str, Any]) -> str:
    """Storage of a run: by the sources of its rows if they name them."""
    sources = [row["source"] for row in content["rows"] if "source" in row]
    if not sources:
        return str(kind["storage"])
    places = {"disk": any(name.startswith("local") for name in sources)}
    places["local S3 server"] = any(name.startswith("s3") for name in sources)
    return ", ".join(name for name, used in places.items() if used)


def _weights(kind: dict[str, Any], content: dict[str, Any]) -> str:
    """Weights of the model: random if the settings say so."""
    untrained = (content.get("settings") or {}).get("weights") == "untrained"
    return "random" if untrained else str(kind["weights"])


# --- docs/status.md ----------------------------------------------------------------------------------------


def status() -> str:
    """The page of what ran where, and of what has never run."""
    rows = []
    for result in sorted(newest(), key=lambda result: (result.prefix, result.path.name)):
        kind = _STATUS["kinds"].get(result.content["kind"])
        if kind is None:
            raise ValueError(f"{result.path.name}: add its kind to docs/results/status.yaml")
        machine, nodes = describe_machine(result.content), str(kind["nodes"])
        storage, weights = _storage(kind, result.content), _weights(kind, result.content)
        where = (machine, nodes, storage, kind["data"], weights)
        when = (result.content["date"][:10], _revision(result.content))
        rows.append((kind["what"], *where, *when, f"[{result.path.stem}](results/{result.path.name})"))
    never = [(entry["what"], entry["detail"]) for entry in _STATUS["never"]]
    headings = ("what", "machine", "nodes", "storage", "images", "weights", "date", "revision", "file")
    return f"""# Status: what ran where

For people who judge how far scalp was tested. `make docs` generates this page from `docs/results`.

## Has never run

{table(("what", "detail"), never)}
## Has run

The newest kept result of each benchmark and machine. A revision with `-dirty` had uncommitted changes.
[benchmarks.md](benchmarks.md) has the ratios, [CONTRIBUTING.md](../CONTRIBUTING.md#tiers) the tests of each
change. Those include a local Ray, a local S3 server and Chromium.

{table(headings, rows)}"""
