"""Each promise of `promises.PROMISES` is on its page, and has a marked test outside tests/nightly."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.promises import PROMISES, page_of

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"


def promises_in(source: str) -> Iterator[tuple[str, str]]:
    """Promises in the decorators of test functions, with the function's name."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        marks = [ast.unparse(mark.func) if isinstance(mark, ast.Call) else "" for mark in node.decorator_list]
        if "pytest.mark.slow" in [ast.unparse(mark) for mark in node.decorator_list]:
            continue
        for name, mark in zip(marks, node.decorator_list, strict=True):
            if name == "pytest.mark.promise" and isinstance(mark, ast.Call):
                for argument in mark.args:
                    yield ast.literal_eval(argument), node.name


def find_marked() -> dict[str, list[str]]:
    """Tests outside tests/nightly that are not slow, by the promise that they prove."""
    marked = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        if "nightly" in path.relative_to(TESTS).parts:
            continue
        for promise, test in promises_in(path.read_text(encoding="utf-8")):
            marked[promise].append(f"{path.relative_to(TESTS)}::{test}")
    return marked


MARKED = find_marked()


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_has_a_test_that_each_change_runs(promise):
    assert MARKED.get(promise), f"mark a test of tests/ with @pytest.mark.promise({promise!r})"


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_is_on_its_page(promise):
    page = " ".join((ROOT / page_of(promise)).read_text(encoding="utf-8").split())
    assert PROMISES[promise] in page, f"update tests/docs/promises.py: {page_of(promise)} changed"


def test_every_marked_promise_is_in_the_table():
    assert set(MARKED) <= set(PROMISES)


def test_slow_tests_prove_nothing_for_each_change():
    source = '@pytest.mark.promise("a")\n@pytest.mark.slow\ndef test_x():\n    pass\n'
    assert list(promises_in(source)) == []
    assert list(promises_in(source.replace("slow", "gpu"))) == [("a", "test_x")]
