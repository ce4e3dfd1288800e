"""Layouts in which copies of AI Hub set 216 are found: the three of `scalp synth`, and six more."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from scalp_core.grades import SYMPTOMS
from scalp_core.synthetic.plan import LayoutName

WRITTEN = get_args(LayoutName)
"""Layouts that `scalp synth` writes."""

_DELIVERED = re.compile(r"(?P<mark>\[..\])(?P<symptom>[^/]+)_(?P<grade>\d)\.(?P<name>[^/]+)/")
_SPACED = ("미세 각질", "피지 과다", "모낭사이 홍반", "모낭홍반 농포", "비듬", "탈모")


def _parents(folder: re.Match[str]) -> str:
    parent = {"[원천]": "원천데이터", "[라벨]": "라벨링데이터"}[folder["mark"]]
    name = folder["name"].replace("중등도", "중증도")  # the paper's spelling
    return f"{parent}/{folder['symptom']}_{folder['grade']}.{name}/"


REARRANGED: dict[str, Callable[[re.Match[str]], str]] = {
    "unmarked": lambda folder: folder[0].removeprefix(folder["mark"]),
    "nested": lambda folder: f"{folder['symptom']}/{folder[0]}",
    "spaced": lambda folder: folder[0].replace(folder["symptom"], _SPACED[SYMPTOMS.index(folder["symptom"])]),
    "numbered": lambda folder: (
        f"{SYMPTOMS.index(folder['symptom']) + 1}.{folder['symptom']}/{folder['grade']}.{folder['name']}/"
    ),
    "parents": _parents,
    "nfd": lambda folder: unicodedata.normalize("NFD", folder[0]),
}
"""Folder of a symptom's grade in each other layout."""

LAYOUTS = (*WRITTEN, *REARRANGED)

_NUMBERS = ("unmarked", "numbered")  # label files with numbers instead of strings
_BYTE_ORDER_MARKS = ("nested", "numbered")


def rearrange(delivered: Path, out: Path, layout: str) -> None:
    """Copy a set as delivered to `out`, in one of the layouts of `REARRANGED`."""
    for file in (path for path in delivered.rglob("*") if path.is_file()):
        target = out / _DELIVERED.sub(REARRANGED[layout], file.relative_to(delivered).as_posix())
        target.parent.mkdir(parents=True, exist_ok=True)
        if "[라벨]" in str(file):
            target.write_bytes(_label_file(json.loads(file.read_text("utf-8")), layout))
        else:
            shutil.copyfile(file, target)


def _label_file(label: dict[str, str], layout: str) -> bytes:
    if layout in _NUMBERS:
        label = {key: int(value) if key.startswith("value_") else value for key, value in label.items()}
    encoding = "utf-8-sig" if layout in _BYTE_ORDER_MARKS else "utf-8"
    return json.dumps(label, ensure_ascii=False).encode(encoding)
