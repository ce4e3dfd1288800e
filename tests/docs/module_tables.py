"""Generate the module tables and layer diagrams of docs/architecture.md: `make docs`.

A generated part of the page is between `<!-- generated: … -->` and `<!-- end -->`. Its sources are
the first line of each module's docstring, and the layer contracts of import-linter in pyproject.toml.
No module is imported: any Python 3.11 runs it, without the project's libraries.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/architecture.md"
PACKAGES = ("scalp_core", "jobs", "serving", "cluster")
LAYERED = ("jobs", "serving", "scalp_core")  # cluster has no layers
COMMAND = "make docs"

_PART = re.compile(
    r"(?P<start><!-- generated: (?:layers|modules of (?P<package>\w+)) -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)


def summary(module: Path) -> str:
    """First line of a module's docstring.

    Raises:
        ValueError: The module has no docstring.
    """
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{module.relative_to(ROOT)} has no docstring; begin it with one line for its table")
    return docstring.splitlines()[0]


def packages(package: Path) -> Iterator[Path]:
    """`package` and the packages below it, by name."""
    yield package
    for init in sorted(package.glob("*/__init__.py")):
        yield from packages(init.parent)


def modules(package: Path) -> list[Path]:
    """Modules directly in `package`, without `__init__.py`."""
    return sorted(path for path in package.glob("*.py") if path.name != "__init__.py")


def module_tables(package: str) -> str:
    """Markdown: for `package` and each package below it, its summary and a table of its modules."""
    parts = []
    for folder in packages(ROOT / package):
        lines = [f"**`{folder.relative_to(ROOT).as_posix()}/`** · {summary(folder / '__init__.py')}"]
        rows = [f"| `{path.name}` | {_cell(summary(path))} |" for path in modules(folder)]
        if rows:
            lines += ["", "| module | |", "| --- | --- |", *rows]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def layer_diagram() -> str:
    """Mermaid: the layers of each package as import-linter checks them, from top to bottom."""
    lines = ["```mermaid", "flowchart TB", "    accTitle: Layers of the packages, the highest on top"]
    for package in LAYERED:
        (layers,) = [
            contract["layers"] for contract in _contracts("layers") if contract.get("containers") == [package]
        ]
        names = [f"{package}_{number}" for number in range(1, len(layers) + 1)]
        boxes = [f'        {name}["{_box(layer)}"]' for name, layer in zip(names, layers, strict=True)]
        arrows = [f"        {above} --> {below}" for above, below in pairwise(names)]
        lines += [f"    subgraph {package}", "        direction TB", *boxes, *arrows, "    end"]
    return "\n".join([*lines, "```"]) + "\n"


def render(text: str) -> str:
    """Replace each generated part of the page `text` by its present content."""

    def generated(part: re.Match[str]) -> str:
        content = module_tables(part["package"]) if part["package"] else layer_diagram()
        return part["start"] + content + part["end"]

    return _PART.sub(generated, text)


def _contracts(kind: str) -> list[dict[str, list[str]]]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    return [contract for contract in settings["contracts"] if contract["type"] == kind]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _box(layer: str) -> str:
    return " · ".join(name.strip() for name in re.split(r"[|:]", layer))


def main() -> None:
    """Rewrite docs/architecture.md where it differs from the modules."""
    before = PAGE.read_text(encoding="utf-8")
    after = render(before)
    if after != before:
        PAGE.write_text(after, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {'unchanged' if after == before else 'rewritten'}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
