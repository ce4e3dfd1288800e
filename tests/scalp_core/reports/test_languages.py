"""Reports in English and Korean: every text has both, with the same fields."""

import ast
import string
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import jinja2
import pytest
from jinja2 import nodes
from markupsafe import Markup

from jobs.evaluate.driver import SEEN
from scalp_core.bundles.contract import BundleSpec
from scalp_core.curation.audit import GROUP_KEYS
from scalp_core.curation.findings import FINDINGS, REASONS
from scalp_core.datasets.manifest import LEAKY, SPLITS, DataSpec
from scalp_core.datasets.scan import OBJECT_CODES
from scalp_core.errors import IMAGE_CODES
from scalp_core.evaluation.paired import METRICS
from scalp_core.grades import SYMPTOM_IDS
from scalp_core.images.statistics import STATISTICS
from scalp_core.inference import decision
from scalp_core.reports import grading
from scalp_core.reports.korean import KOREAN
from scalp_core.reports.page import join, text
from scalp_core.reports.words import WORDS
from scalp_core.results.drift import GRADE_MIX
from tests.support.korean_view import untranslated

ROOT = Path(__file__).parents[3]
MODULES = [
    *sorted((ROOT / "scalp_core/reports").glob("*.py")),
    ROOT / "jobs/grade/report.py",
    ROOT / "jobs/evaluate/comparison.py",
    ROOT / "jobs/evaluate/driver.py",
]
# Texts of tables in other modules that the reports look up.
TABLES = (
    IMAGE_CODES,
    OBJECT_CODES,
    REASONS,
    FINDINGS,
    decision.REASONS,
    METRICS,
    grading._LEVELS,
    grading._DRIFTS,
    SEEN,
    *WORDS.values(),
)


def template_texts() -> Iterator[str]:
    """Constants within the arguments of `t(…)` in the templates."""
    for path in resources.files("scalp_core.reports").iterdir():
        if path.name.endswith(".html"):
            tree = jinja2.Environment(autoescape=True).parse(path.read_text("utf-8"))
            for call in tree.find_all(nodes.Call):
                if isinstance(call.node, nodes.Name) and call.node.name == "t":
                    yield from _constants(call.args[0])


def _constants(node: nodes.Node) -> Iterator[str]:
    if isinstance(node, nodes.Const):
        yield node.value
    elif isinstance(node, nodes.Getitem):  # t({"key": "text", …}[key]); tables are in TABLES
        if isinstance(node.node, nodes.Dict):
            yield from (pair.value.value for pair in node.node.items)
    else:
        raise AssertionError(f"t({node}) cannot be looked up")


def module_texts() -> Iterator[str]:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id="text"), args=[ast.Constant(value=value)]):
                    yield value


def texts() -> set[str]:
    warnings = {
        BundleSpec.warning.fget(_Synthetic),  # type: ignore[attr-defined]
        DataSpec.warning.fget(_Synthetic),  # type: ignore[attr-defined]
        GRADE_MIX,
        LEAKY,
    }
    return {
        *template_texts(),
        *module_texts(),
        *warnings,
        *(value for table in TABLES for value in table.values()),
    }


class _Synthetic:
    synthetic = True
    training: "type[_Synthetic]"


_Synthetic.training = _Synthetic


def fields(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def test_every_text_has_a_korean_one_and_none_is_left_over():
    assert texts() - KOREAN.keys() == set()
    assert KOREAN.keys() - texts() == set()


@pytest.mark.parametrize("english", sorted(KOREAN))
def test_korean_text_has_the_same_fields_and_markup(english):
    korean = KOREAN[english]
    assert fields(korean) == fields(english)
    assert korean.count("<") == english.count("<")


def test_each_code_that_a_report_shows_has_words():
    assert set(WORDS["referral"]) == set(decision.REASONS)
    assert set(WORDS["failure"]) == set(IMAGE_CODES)
    assert set(WORDS["statistic"]) == set(STATISTICS)
    assert set(WORDS["split"]) == set(SPLITS)
    assert set(WORDS["symptom"]) == set(SYMPTOM_IDS)
    assert set(WORDS["key"]) == {"content", *GROUP_KEYS}


def test_a_text_escapes_its_values_in_both_languages():
    shown = text("{count} more", count="<b>").__html__()
    assert shown.count("&lt;b&gt;") == 2
    assert "<b>" not in shown


def test_a_value_takes_the_language_of_its_text():
    outer = text("the model was {warning}", warning=text("trained on synthetic images; not for clinical use"))
    assert outer.english == "the model was trained on synthetic images; not for clinical use"
    assert "trained" not in outer.korean
    assert join([outer, "a"], "; ").english.endswith("use; a")
    assert isinstance(outer.korean, Markup)


@pytest.mark.parametrize(
    ("html", "count"),
    [
        ('<p lang="en">an epoch</p><p lang="ko">에폭</p>', 0),
        ("<p>an epoch</p>", 1),
        ('<svg><text x="0">epoch</text></svg>', 1),
        ('<svg aria-label="epochs"><rect><title>epoch 1</title></rect></svg>', 2),
        ('<img alt="a plot" src="data:image/jpeg;base64,">', 1),
        ('<img alt="" src="data:image/png;base64,">', 1),
        ('<img alt="" aria-labelledby="a" src="data:image/jpeg;base64,">', 1),
    ],
)
def test_english_in_the_korean_view_is_found(html, count):
    found = untranslated(f"<html lang='en'><title>Report · 보고서</title><main>{html}</main></html>")
    assert len(found) == count, found
    assert len(untranslated(f"<html><title>Report</title><main>{html}</main></html>")) == count + 1
