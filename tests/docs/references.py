"""Generate the references in docs/ from the code: `make docs`.

Each page in `PAGES` is generated as a whole, and names `make docs` in its head; of docs/benchmarks.md only
the parts between `<!-- generated: … -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import typer
from ray.util.metrics import Metric
from typer.cli import get_docs_for_click

from jobs.cli.main import app
from jobs.common.prometheus import GradeMetrics, TrainMetrics
from jobs.environment import EXIT_CODES, VARIABLES
from scalp_core.bundles.contract import BundleSpec
from scalp_core.errors import IMAGE_CODES, IMAGE_FIXES
from scalp_core.inference.decision import REASONS
from scalp_core.models.recipe import Recipe
from scalp_core.results.schema import COLUMNS
from serving.observability.metrics import GraderMetrics, ImageMetrics, RequestMetrics
from serving.settings import ModelSettings, Settings
from tests.docs import pictures
from tests.docs.http_reference import http
from tests.docs.results import benchmarks, status
from tests.docs.tables import GENERATED, first_part, model_tables, table

ROOT = Path(__file__).resolve().parents[2]


# --- commands ----------------------------------------------------------------------------------------------


def commands() -> str:
    """Reference of all commands, without the hidden ones."""
    head = f"# Commands\n\nFor users of the command line. {GENERATED}\n"
    head += "`scalp COMMAND --help` prints the same.\n\n"
    group = typer.main.get_command(app)
    _remove_hidden(group)
    index = [
        f"- [`scalp {name}`](#scalp-{name}): {command.help.splitlines()[0]}"
        for name, command in sorted(group.commands.items())
    ]
    page = get_docs_for_click(obj=group, ctx=typer.Context(group, info_name="scalp"), name="scalp")
    page = page[page.index("\n## ") :]
    page = re.sub(r"(?:^scalp [^\n]+\n+)+", _fence, page, flags=re.MULTILINE)
    page = re.sub(r"^Example: (scalp .+)$", r"Example: `\1`", page, flags=re.MULTILINE)
    return head + "\n".join(index) + "\n" + page


def _remove_hidden(group: Any) -> None:
    group.commands = {name: command for name, command in group.commands.items() if not command.hidden}
    for command in group.commands.values():
        command.short_help = " ".join(command.help.split("\n\n")[0].split())  # otherwise cut
        if hasattr(command, "commands"):
            _remove_hidden(command)


def _fence(examples: re.Match[str]) -> str:
    return "```bash\n" + re.sub(r"\n+", "\n", examples[0]) + "```\n\n"


# --- settings and formats ----------------------------------------------------------------------------------


def settings() -> str:
    """Reference of the recipe and of the endpoint's settings."""
    return f"""# Settings

For ML engineers and operators. {GENERATED}
Training reads a recipe from `--recipe` and `--set`.
The endpoint reads its settings from `serving/config.yaml`, or from the file of `scalp serve --settings`.

## Recipe

Settings of `scalp train` and `scalp tune`.

{model_tables(Recipe, "setting")}
## Endpoint

`args` of `serving/config.yaml`, and the file of `--settings`.

{model_tables(Settings, "setting")}
## Model

`user_config` of the grader in `serving/config.yaml`: changes apply in place.

{model_tables(ModelSettings, "setting")}"""


def formats() -> str:
    """Reference of the result rows, their codes, and the bundle."""
    codes = [(f"`{code}`", first_part(meaning), IMAGE_FIXES[code]) for code, meaning in IMAGE_CODES.items()]
    columns = [(f"`{name}`", _arrow_type(kind), text) for name, (kind, text) in COLUMNS.items()]
    return f"""# Result rows and bundles

For people who read results or bundles with their own programs. {GENERATED}

## Result rows

Columns of the Parquet files in `OUT/results` of `scalp grade`. The endpoint answers with the same fields as
JSON ([http.md](http.md)). [grading.md](grading.md) describes the run.

{table(("column", "type", "content"), columns)}
## Error codes of images

`error_code` of a failed row, and `code` of a problem of the endpoint.

{table(("code", "meaning", "action"), codes)}
## Reasons of referrals

Values of `refer_reasons` ([gates.md](gates.md#reasons-for-referral)).

{table(("reason", "meaning"), ((f"`{name}`", text) for name, text in REASONS.items()))}
## Bundle

Fields of `bundle.json`, the contract of a bundle. Loading checks `schema_version` and the hash of each file
that is used. [model-card.md](model-card.md) describes the card that is written from it.

{model_tables(BundleSpec, "field")}"""


def _arrow_type(kind: Any) -> str:
    if pa.types.is_struct(kind):
        kinds = {_arrow_type(field.type) for field in kind}
        if len(kinds) == 1:
            return f"struct with {', '.join(f'`{field.name}`' for field in kind)}; each a {kinds.pop()}"
        return f"struct with {', '.join(f'`{field.name}` ({_arrow_type(field.type)})' for field in kind)}"
    if pa.types.is_list(kind):
        return f"list of {_arrow_type(kind.value_type)}"
    return "timestamp, ms, UTC" if kind == pa.timestamp("ms", "UTC") else str(kind)


# --- metrics, environment ----------------------------------------------------------------------------------


def metrics() -> str:
    """Reference of the Prometheus metrics."""
    parts = [
        ("Endpoint", "Labels of Ray: `application`, `deployment`, `replica`, `NodeAddress`.",
         (RequestMetrics(), ImageMetrics(), GraderMetrics())),
        ("Training", "The label `run` is the last path component of RUN. `scalp tune` exports no metrics.",
         (TrainMetrics("run", 1, 1),)),
        ("Bulk grading", "The label `run` is the last path component of OUT. Without Ray there are none.",
         (GradeMetrics("out", 1, 0),)),
    ]  # fmt: skip
    sections = "\n".join(
        f"## {heading}\n\n{text}\n\n"
        + table(
            ("name", "type", "labels", "meaning"),
            (_metric_row(metric) for group in groups for metric in _metrics_of(group)),
        )
        for heading, text, groups in parts
    )
    return f"""# Metrics

For operators. {GENERATED}
Ray's agent on each node exports them in the Prometheus format. [serving.md](serving.md#metrics) and
[operations.md](operations.md#metrics-of-training-and-grading) describe how to read them.

{sections}"""


def _metrics_of(group: Any) -> Iterator[Metric]:
    """Metrics that an object creates; a run's gauges may be keys of its values."""
    found = [*vars(group).values(), *getattr(group, "_values", ())]
    yield from dict.fromkeys(metric for metric in found if isinstance(metric, Metric))


def _metric_row(metric: Metric) -> tuple[str, ...]:
    kind = type(metric).__name__.lower()
    name = f"ray_{metric.info['name']}" + ("_total" if kind == "counter" else "")
    return (
        f"`{name}`",
        kind,
        ", ".join(f"`{key}`" for key in metric.info["tag_keys"]),
        metric.info["description"],
    )


def _with_json(command: Any, name: str) -> Iterator[str]:
    """Names of the commands with the option --json, those of groups included."""
    for child, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _with_json(inner, f"{name} {child}")
    if not command.hidden and any("--json" in parameter.opts for parameter in command.params):
        yield name


def environment() -> str:
    """Reference of the environment variables and exit codes."""
    sections = "\n".join(
        f"### {program}\n\n"
        + table(("variable", "meaning"), ((f"`{name}`", text) for name, text in names.items()))
        for program, names in VARIABLES.items()
    )
    with_json = ", ".join(f"`{name}`" for name in _with_json(typer.main.get_command(app), "scalp"))
    return f"""# Environment variables and exit codes

For operators, and for people who call `scalp` from programs. {GENERATED}

## Environment variables

{sections}
## JSON output

With `--json` a command prints one JSON document on standard output. Tables, notes and progress are on
standard error. These commands have it: {with_json}.

## Exit codes

`scalp submit` and `scalp jobs logs` have the exit code of the job.

{table(("code", "meaning"), ((str(code), text) for code, text in EXIT_CODES.items()))}"""


def _ended(page: Callable[[], str]) -> Callable[[], str]:
    return lambda: page().rstrip() + "\n"


PAGES: dict[Path, Callable[[], str]] = {
    ROOT / f"docs/{page.__name__}.md": _ended(page)
    for page in (commands, settings, http, formats, metrics, environment, status, benchmarks)
}

if __name__ == "__main__":
    for path, generate in PAGES.items():
        path.write_text(generate(), encoding="utf-8")
    pictures.draw_charts()
