"""The four ordered grades and the six symptoms of AI Hub set 216, with their names and spellings."""

from __future__ import annotations

import unicodedata
from enum import IntEnum


class Grade(IntEnum):
    """Severity of micro-keratin (미세각질). The order is meaningful: metrics weigh distance."""

    GOOD = 0
    MILD = 1
    MODERATE = 2
    SEVERE = 3

    @property
    def english(self) -> str:
        return GRADE_NAMES[self]

    @property
    def korean(self) -> str:
        return GRADE_NAMES_KO[self]


NUM_GRADES = len(Grade)
_DIGITS = ("0", "1", "2", "3")
GRADE_NAMES = ("good", "mild", "moderate", "severe")
GRADE_NAMES_KO = ("양호", "경증", "중등도", "중증")

# The position in this tuple is the number in the label JSON: SYMPTOMS[0] is value_1.
SYMPTOMS = ("미세각질", "피지과다", "모낭사이홍반", "모낭홍반농포", "비듬", "탈모")
# Their names in columns, JSON and settings, in the same order.
SYMPTOM_IDS = (
    "micro_keratin",
    "excess_sebum",
    "erythema_between_follicles",
    "follicular_pustules",
    "dandruff",
    "hair_loss",
)


def name_symptom(name: str) -> str:
    """Name a symptom of `SYMPTOM_IDS` for people, such as `excess sebum (피지과다)`."""
    if name == SYMPTOM_IDS[0]:
        return "micro-keratin (미세각질, fine flaking)"
    return f"{name.replace('_', ' ')} ({SYMPTOMS[SYMPTOM_IDS.index(name)]})"


# The paper writes 중증도 where the dataset writes 중등도.
_ALIASES = {"중증도": Grade.MODERATE}


def parse_grade(text: str) -> Grade | None:
    """Parse a grade in a folder or label: `2`, `moderate`, `중등도`, `중증도`, `2.중등도`; or None."""
    text = unicodedata.normalize("NFC", text).strip().lower()
    head, dot, tail = text.partition(".")
    if dot and head in _DIGITS:
        grade = parse_grade(tail)
        return grade if grade == parse_grade(head) else None
    if text in _DIGITS:  # `isdigit` also accepts "①"
        return Grade(_DIGITS.index(text))
    if text in GRADE_NAMES:
        return Grade(GRADE_NAMES.index(text))
    if text in GRADE_NAMES_KO:
        return Grade(GRADE_NAMES_KO.index(text))
    return _ALIASES.get(text)
