"""Layouts of AI Hub set 216 for `scalp synth --layout`: folders, archives and label files."""

from __future__ import annotations

import json
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scalp_core.grades import GRADE_NAMES_KO, SYMPTOMS
from scalp_core.synthetic.plan import ImagePlan

_EPOCH = (2020, 12, 1, 0, 0, 0)  # time of each zip member, so that the same options give the same bytes


@dataclass(frozen=True)
class Layout:
    """A layout of folders, archives and label files.

    Args:
        images: Folder of a symptom's grade below Training or Validation.
        labels: Folder of their label files.
        moderate: Spelling of grade 2.
        zipped: folder: a zip per folder, as downloaded; part: one zip each of Training and Validation,
            with names in cp949, as Korean Windows packs them.
        form: Unicode form of the names; macOS writes NFD.
        bom: Whether label files begin with a byte order mark.
        numbers: Whether label files have numbers instead of strings.
        spaced: Whether names of symptoms have spaces.
    """

    images: str = "[원천]{symptom}_{grade}.{name}"
    labels: str = "[라벨]{symptom}_{grade}.{name}"
    moderate: str = GRADE_NAMES_KO[2]
    zipped: Literal["folder", "part"] | None = None
    form: Literal["NFC", "NFD"] = "NFC"
    bom: bool = False
    numbers: bool = False
    spaced: bool = False


LAYOUTS = {
    "delivered": Layout(),
    "zipped": Layout(zipped="folder", bom=True),
    "zipped-cp949": Layout(zipped="part"),
    "unmarked": Layout("{symptom}_{grade}.{name}", "{symptom}_{grade}.{name}", numbers=True),
    "nested": Layout(
        "{symptom}/[원천]{symptom}_{grade}.{name}", "{symptom}/[라벨]{symptom}_{grade}.{name}", bom=True
    ),
    "spaced": Layout(spaced=True),
    "numbered": Layout(
        "{number}.{symptom}/{grade}.{name}", "{number}.{symptom}/{grade}.{name}", bom=True, numbers=True
    ),
    "parents": Layout(
        "원천데이터/{symptom}_{grade}.{name}", "라벨링데이터/{symptom}_{grade}.{name}", moderate="중증도"
    ),
    "nfd": Layout(form="NFD"),
}

# Spellings of the symptoms with spaces.
_SPACED = ("미세 각질", "피지 과다", "모낭사이 홍반", "모낭홍반 농포", "비듬", "탈모")


def paths(plan: ImagePlan, layout: Layout, every_symptom: bool) -> Iterator[tuple[str, str]]:
    """Yield kind (meta, label or photograph) and path of each file of an image; the image is last."""
    yield "meta", f"Meta/{plan.stem}_META.json"
    chosen = [0]
    if every_symptom:  # as delivered: under each symptom with a grade, else under 양호 of all
        chosen = [n for n, grade in enumerate(plan.symptoms) if grade or not any(plan.symptoms)]
    for number in reversed(chosen):
        yield "label", f"{plan.part}/{_folder(layout.labels, layout, plan, number)}/{plan.stem}.json"
        yield "photograph", f"{plan.part}/{_folder(layout.images, layout, plan, number)}/{plan.stem}.jpg"


def _folder(pattern: str, layout: Layout, plan: ImagePlan, number: int) -> str:
    grade = plan.symptoms[number]
    return pattern.format(
        number=number + 1,
        symptom=(_SPACED if layout.spaced else SYMPTOMS)[number],
        grade=grade,
        name=layout.moderate if grade == 2 else GRADE_NAMES_KO[grade],
    )


def label_file(plan: ImagePlan, layout: Layout) -> bytes:
    """Content of a label file: JSON of six values, as strings or numbers."""
    values: dict[str, Any] = {
        f"value_{number}": value if layout.numbers else str(value)
        for number, value in enumerate(plan.symptoms, 1)
    }
    content = {"image_id": plan.stem, "image_file_name": f"{plan.stem}.jpg"} | values
    return as_json(content, bom=layout.bom)


def meta_file(plan: ImagePlan) -> bytes:
    return as_json({"image_id": plan.stem, "image_file_name": f"{plan.stem}.jpg"} | plan.meta)


def as_json(content: dict[str, Any], bom: bool = False) -> bytes:
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    return text.encode("utf-8-sig" if bom else "utf-8")


def pack(out: Path, layout: Layout) -> None:
    """Replace the written folders by zips, if the layout has zips."""
    if layout.zipped is None:
        return
    folders = [out / "Meta"]
    for part in sorted({"Training", "Validation"} & {path.name for path in out.iterdir()}):
        folders += [out / part] if layout.zipped == "part" else sorted((out / part).iterdir())
    for folder in folders:
        if not folder.is_dir():
            continue
        archive = folder.with_name(f"{folder.name}.zip")
        partial = archive.with_name(f".{archive.name}.part")
        with zipfile.ZipFile(partial, "w") as zipped:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                name = path.relative_to(folder).as_posix()
                kind = _KoreanWindowsInfo if layout.zipped == "part" else zipfile.ZipInfo
                zipped.writestr(kind(name, _EPOCH), path.read_bytes())
        partial.replace(archive)
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


class _KoreanWindowsInfo(zipfile.ZipInfo):
    """Zip member with a name in cp949, without the UTF-8 flag."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 -- zipfile's own hook
        return self.filename.encode("cp949"), self.flag_bits


def normalized(path: str, layout: Layout) -> str:
    return unicodedata.normalize(layout.form, path)
