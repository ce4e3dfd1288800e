"""Names that docstrings and comments mention, such as `scan.LISTED`, exist in the module that they name."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.test_paths import has_name

ROOT = Path(__file__).parents[2]
PACKAGES = ("cluster", "jobs", "scalp_core", "serving")
FILES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
_REFERENCE = re.compile(r"`([a-z_]\w*(?:\.\w+)+)(?:\([^`]*\))?`")
_FILE_NAME = re.compile(
    r"\.(?:bin|css|csv|gz|html|jpg|js|json|lock|log|md|npy|parquet|png|pt|pth|py|safetensors|sh|tar|toml|txt|xml"
    r"|ya?ml|zip)$"
)
# First words of names outside scalp: libraries by their usual short name, Ray's, and examples.
_ELSEWHERE = ("nn", "np", "pa", "serve", "execute", "module", "provider")


def _module_texts() -> dict[str, str]:
    """Text of modules by their last name; of a package its `__init__.py` and the names of its modules."""
    texts: dict[str, str] = {}
    for path in FILES:
        name = path.parent.name if path.name == "__init__.py" else path.stem
        texts[name] = texts.get(name, "") + path.read_text(encoding="utf-8")
        texts[path.parent.name] = texts.get(path.parent.name, "") + f"\n{path.stem}\n"
    return texts


MODULES = _module_texts()


def tokens(text: str) -> tuple[list[tuple[int, str]], set[str]]:
    """Comments and docstrings with their lines, and the names that the code uses."""
    prose: list[tuple[int, str]] = []
    names: set[str] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or (
            token.type == tokenize.STRING and token.string.lstrip("rbfu").startswith('"""')
        ):
            prose.append((token.start[0], token.string))
        elif token.type == tokenize.NAME:
            names.add(token.string)
    return prose, names


def broken_references(text: str) -> Iterator[str]:
    """References in the prose of a module that lead nowhere, with their lines."""
    prose, names = tokens(text)
    for line, words in prose:
        for reference in _REFERENCE.findall(words):
            first, second, *_ = reference.split(".")
            if first in names or first in _ELSEWHERE or _FILE_NAME.search(reference):
                continue
            if first in PACKAGES:
                if not has_name(reference):
                    yield f"line {line}: `{reference}`: no such module or name"
            elif first in MODULES:
                if not re.search(rf"\b{second}\b", MODULES[first]):
                    yield f"line {line}: `{reference}`: no `{second}` in {first}"
            elif find_spec(first) is None:
                yield f"line {line}: `{reference}`: no module {first}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_in_docstrings_and_comments_exist(path):
    assert list(broken_references(path.read_text(encoding="utf-8"))) == []


def test_a_renamed_module_is_detected():
    (problem,) = broken_references('"""Rows of `inventory.LISTED`, by `splits.parse_ratio`, in `a.json`."""')
    assert problem == "line 1: `inventory.LISTED`: no module inventory"
