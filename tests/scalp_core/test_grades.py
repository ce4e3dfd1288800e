import unicodedata

import pytest

from scalp_core.grades import Grade, parse_grade


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("0", Grade.GOOD),
        ("3", Grade.SEVERE),
        ("moderate", Grade.MODERATE),
        ("Mild", Grade.MILD),
        ("중등도", Grade.MODERATE),
        ("중증도", Grade.MODERATE),  # the paper's spelling
        ("중증", Grade.SEVERE),
        ("2.중등도", Grade.MODERATE),
        (unicodedata.normalize("NFD", "1.경증"), Grade.MILD),  # as macOS stores names
    ],
)
def test_every_name_of_a_grade_is_read(text, grade):
    assert parse_grade(text) is grade


@pytest.mark.parametrize("text", ["4", "-1", "", "severely", "1.중증", "탈모"])
def test_what_names_no_grade_is_none(text):
    assert parse_grade(text) is None
