"""Files of an image in AI Hub set 216 and its archives, for `scalp synth --layout`."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from scalp_core.grades import GRADE_NAMES_KO, SYMPTOMS
from scalp_core.synthetic.plan import DELIVERED_PARTS, ImagePlan, LayoutName

_EPOCH = (2020, 12, 1, 0, 0, 0)  # time of each zip member, so that the same options give the same bytes


def list_files(plan: ImagePlan, layout: LayoutName, every_symptom: bool) -> list[tuple[str, bytes | None]]:
    """List path and content of each file of an image; the content of the image itself, the last, is None."""
    texts = {"image_id": plan.stem, "image_file_name": f"{plan.stem}.jpg"}
    label = texts | {f"value_{number}": str(grade) for number, grade in enumerate(plan.symptoms, 1)}
    encoding = "utf-8-sig" if layout == "zipped" else "utf-8"
    chosen = [0]
    if every_symptom:  # as delivered: under each symptom with a grade, else under 양호 of all
        chosen = [n for n, grade in enumerate(plan.symptoms) if grade or not any(plan.symptoms)]
    files: list[tuple[str, bytes | None]] = [(f"Meta/{plan.stem}_META.json", as_json(texts | plan.meta))]
    for number in reversed(chosen):
        grade = plan.symptoms[number]
        folder = f"{SYMPTOMS[number]}_{grade}.{GRADE_NAMES_KO[grade]}"
        files.append((f"{plan.part}/[라벨]{folder}/{plan.stem}.json", as_json(label, encoding)))
        files.append((f"{plan.part}/[원천]{folder}/{plan.stem}.jpg", None))
    return files


def as_json(content: dict[str, Any], encoding: str = "utf-8") -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode(encoding)


def pack(out: Path, layout: LayoutName) -> None:
    """Replace the written folders by zips, if the layout has zips.

    zipped: a zip per folder, as downloaded; zipped-cp949: one zip each of Training and Validation, with names
    in cp949, as Korean Windows packs them.
    """
    if layout == "delivered":
        return
    kind = zipfile.ZipInfo if layout == "zipped" else _KoreanWindowsInfo
    folders = [out / "Meta"]
    for part in DELIVERED_PARTS:
        folders += sorted((out / part).glob("*")) if layout == "zipped" else [out / part]
    for folder in filter(Path.is_dir, folders):
        archive = folder.with_name(f"{folder.name}.zip")
        partial = archive.with_name(f".{archive.name}.part")
        with zipfile.ZipFile(partial, "w") as zipped:
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                zipped.writestr(kind(path.relative_to(folder).as_posix(), _EPOCH), path.read_bytes())
        partial.replace(archive)
        shutil.rmtree(folder)


class _KoreanWindowsInfo(zipfile.ZipInfo):
    """Zip member with a name in cp949, without the UTF-8 flag."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 -- zipfile's own hook
        return self.filename.encode("cp949"), self.flag_bits
