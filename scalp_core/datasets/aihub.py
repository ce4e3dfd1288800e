"""Parse paths, label files and META files of AI Hub set 216, in all layouts in which the set is found.

As delivered, `Training/[원천]미세각질_2.중등도/STEM.jpg` (or in a `.zip` of that name) has its label in
`Training/[라벨]미세각질_2.중등도/STEM.json` and its survey in `Meta/STEM_META.json`; Validation has the same
folders. Other layouts nest the folders by symptom, number them, omit the brackets, or put them below
`원천데이터` and `라벨링데이터`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from scalp_core.grades import NUM_GRADES, SYMPTOMS, parse_grade

META_SUFFIX = "_META.json"

# Spaces inside a symptom's name occur ("피지 과다"), and a symptom may be a separate folder.
_FOLDER = re.compile(
    r"(?:^|/)(?:\[(?:원천|라벨)\])?\s*(?:\d+\.)?\s*(?P<symptom>"
    + "|".join(r"\s*".join(name) for name in SYMPTOMS)
    + r")\s*[_/](?:\[(?:원천|라벨)\])?\s*(?P<grade>\d\s*\.\s*[^/_.\s]+)\s*(?=/|$)"
)
_PART = re.compile(r"(?:^|[/.\s])(Training|Validation)(?=/|$)", re.IGNORECASE)
STEM = r"(?P<site>\d{4})_(?P<device>[A-Z0-9]+)_(?P<epoch>\d{13})_(?P<shot>\d+)_(?P<pos>TH|LH|RH|BH)"
"""0013_A2LEBJJDE00060O_1602578303771_3_TH: site, microscope, epoch in ms, shot, position on the head."""

_STEM = re.compile(f"^{STEM}$")
_SEXES = {"남": "male", "여": "female"}


@dataclass(frozen=True)
class Folders:
    """Split, symptom and grade from the folders above a file."""

    part: str | None = None  # Training or Validation, as delivered
    symptom: int | None = None  # position in `grades.SYMPTOMS`
    grade: int | None = None  # grade of that symptom, 0 to 3
    class_grade: int | None = None  # grade in the name of the nearest folder, for a source of class folders


@dataclass(frozen=True)
class Shot:
    """Site, microscope, session, time and position on the head, from the name of a file."""

    site: str
    device: str
    session: str
    captured_at: datetime
    position: str


def read_folders(folder: str) -> Folders:
    """Parse the path of a folder, separated by `/`; an archive counts as a folder of its name."""
    folder = re.sub(r"\.zip(?=/|$)", "", unicodedata.normalize("NFC", folder), flags=re.IGNORECASE)
    parts, names = _PART.findall(folder), list(_FOLDER.finditer(folder))
    symptom = grade = None
    if names:
        symptom = SYMPTOMS.index(re.sub(r"\s", "", names[-1]["symptom"]))
        grade = parse_grade(re.sub(r"\s", "", names[-1]["grade"]))
    class_grade = parse_grade(folder.rsplit("/", 1)[-1])
    return Folders(parts[-1].capitalize() if parts else None, symptom, grade, class_grade)


def stem_of(name: str) -> str:
    """Return the name that an image, its label and its META file share; NFC, without folders."""
    base = unicodedata.normalize("NFC", name.rsplit("/", 1)[-1])
    return base.removesuffix(META_SUFFIX) if base.endswith(META_SUFFIX) else base.rsplit(".", 1)[0]


def read_stem(stem: str) -> Shot | None:
    """Parse a name in AI Hub's form; None for any other name."""
    match = _STEM.match(stem)
    if not match:
        return None
    return Shot(
        site=match["site"],
        device=match["device"],
        session=match["epoch"],
        captured_at=datetime.fromtimestamp(int(match["epoch"]) / 1000, UTC),
        position=match["pos"],
    )


def read_label(data: bytes) -> list[int]:
    """Parse the six grades of a label file, in the order of `grades.SYMPTOMS`.

    Raises:
        ValueError: the file is invalid; the message names the first problem.
    """
    content = _json(data)
    values = []
    for number in range(1, len(SYMPTOMS) + 1):
        key = f"value_{number}"
        if key not in content:
            raise ValueError(f"{key} is missing")
        # The delivered values are strings; some copies have integers or floats.
        text = str(content[key]).strip().removesuffix(".0")
        if text not in {str(grade) for grade in range(NUM_GRADES)}:
            raise ValueError(f"{key} is {content[key]!r}, not 0 to {NUM_GRADES - 1}")
        values.append(int(text))
    return values


def read_meta(data: bytes) -> dict[str, str | None]:
    """Parse `sex` (male, female), `age` (`40s`) and `position` of a META file; None for a missing one.

    Raises:
        ValueError: the file is not a JSON object.
    """
    content = _json(data)
    decade = re.match(r"(\d+)\s*대", str(content.get("age", "")))
    position = str(content.get("location", ""))
    return {
        "sex": _SEXES.get(str(content.get("gender", "")).strip()),
        "age": f"{decade[1]}s" if decade else None,
        "position": position if position in ("TH", "LH", "RH", "BH") else None,
    }


def _json(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(_text(data))
    except RecursionError:
        raise ValueError("it is JSON nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _text(data: bytes) -> str:
    for encoding in ("utf-8-sig", "cp949"):  # cp949: Korean Windows
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError("it is neither UTF-8 nor cp949")
