"""Generate the references from the code: docs/commands.md and docs/settings.md, by `make docs`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click

from jobs.cli.main import app
from scalp_core.models.recipe import Recipe
from serving.settings import ModelSettings, Settings

ROOT = Path(__file__).resolve().parents[2]
_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}

COMMANDS = """# Commands

For users of the command line. `make docs` generates this page from the code.
`scalp COMMAND --help` prints the same.

"""
SETTINGS = """# Settings

For ML engineers and operators. `make docs` generates this page from the code.
Training reads a recipe from `--recipe` and `--set`.
The endpoint reads its settings from `serving/config.yaml`, or from the file of `scalp serve --settings`.

"""


def commands() -> str:
    """Reference of all commands, without the hidden ones."""
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
    return COMMANDS + "\n".join(index) + "\n" + page


def _remove_hidden(group: Any) -> None:
    group.commands = {name: command for name, command in group.commands.items() if not command.hidden}
    for command in group.commands.values():
        if hasattr(command, "commands"):
            _remove_hidden(command)


def _fence(examples: re.Match[str]) -> str:
    return "```bash\n" + re.sub(r"\n+", "\n", examples[0]) + "```\n\n"


def settings() -> str:
    """Reference of the recipe and of the endpoint's settings."""
    parts = [
        ("Recipe", "Settings of `scalp train` and `scalp tune`.", Recipe),
        ("Endpoint", "`args` of `serving/config.yaml`, and the file of `--settings`.", Settings),
        (
            "Model",
            "`user_config` of the grader in `serving/config.yaml`: changes apply in place.",
            ModelSettings,
        ),
    ]
    page = SETTINGS
    for heading, text, model in parts:
        schema = model.model_json_schema()
        page += f"## {heading}\n\n{text}\n\n{_table(schema)}"
        for name, part in schema.get("$defs", {}).items():
            names = ", ".join(
                f"`{key}`" for key, value in schema["properties"].items() if f"/{name}'" in str(value)
            )
            page += f"### {names}\n\n{_table(part)}"
    return page.rstrip() + "\n"


def _table(schema: dict[str, Any]) -> str:
    rows = ["| setting | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in schema["properties"].items():
        text = field.get("description", "").replace("|", "\\|")
        default = (
            f"`{json.dumps(field['default'], ensure_ascii=False)}`" if "default" in field else "required"
        )
        if "$ref" in field:
            default = "below"
        rows.append(f"| `{name}` | {_type(field)} | {default} | {text} |")
    return "\n".join(rows) + "\n\n"


def _type(field: dict[str, Any]) -> str:
    """Type of a field with its bounds, such as `integer, 1 to 512`."""
    if "anyOf" in field:
        return " or ".join(_type(kind) for kind in field["anyOf"])
    if "$ref" in field:
        return "settings"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    bounds = [f"{word} {field[key]}" for key, word in _BOUNDS.items() if key in field]
    return ", ".join(filter(None, [field["type"], " ".join(bounds)]))


PAGES = {ROOT / "docs/commands.md": commands, ROOT / "docs/settings.md": settings}

if __name__ == "__main__":
    for path, generate in PAGES.items():
        path.write_text(generate(), encoding="utf-8")
