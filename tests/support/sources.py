"""Sources of images for the tests of `scalp prepare`, and prepare without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from scalp_core import storage
from scalp_core.curation import audit, queries
from scalp_core.curation.audit import Options
from scalp_core.datasets import examination, manifest, scan
from scalp_core.grades import GRADE_NAMES_KO, NUM_GRADES, SYMPTOMS
from scalp_core.storage import parquet
from scalp_core.synthetic.dataset import render_jpeg as render
from scalp_core.synthetic.dataset import write_image
from scalp_core.synthetic.layouts import pack
from scalp_core.synthetic.plan import ImagePlan, LayoutName, SynthOptions, plan_dataset
from tests.support.images import jpeg

PLANS = plan_dataset(SynthOptions(images=48, seed=5, devices=8))


@cache
def picture(index: int) -> bytes:
    """JPEG of `PLANS[index]`, drawn once."""
    return render(PLANS[index])


def folder_of(plan: ImagePlan) -> str:
    """Folder of an image in a set as delivered."""
    return f"{plan.part}/[원천]{SYMPTOMS[0]}_{plan.grade}.{GRADE_NAMES_KO[plan.grade]}"


def write_set(
    out: Path, layout: LayoutName = "delivered", every_symptom: bool = True, plans: list[ImagePlan] = PLANS
) -> list[ImagePlan]:
    """Write images of `PLANS` in a layout."""
    for plan in plans:
        write_image(plan, out, layout, every_symptom, picture(plan.index))
    pack(out, layout)
    return plans


def write_small_set(out: Path, options: SynthOptions) -> None:
    """Write a synthetic set whose images are small and show nothing, for tests of numbers of images."""
    for plan in plan_dataset(options):
        write_image(plan, out, options.layout, options.every_symptom, jpeg(plan.index, (96, 72)))


@dataclass(frozen=True)
class Audited:
    """Result of preparing a source."""

    data: str
    summary: dict[str, Any]

    @property
    def table(self) -> pa.Table:
        return manifest.read_manifest(self.data).sort_by("image_id")

    @property
    def dropped(self) -> list[dict[str, Any]]:
        return parquet.read(f"{self.data}/{queries.DROPPED_FILE}").to_pylist()

    @property
    def findings(self) -> list[dict[str, Any]]:
        return parquet.read(f"{self.data}/{queries.FINDINGS_FILE}").to_pylist()


def audited(source: Path | str, out: Path, **options: Any) -> Audited:
    """List, examine and audit a source in this process, as `scalp prepare` does in Ray's workers."""
    return audited_rows(examined(source), out, storage.absolute(source), **options)


def examined(source: Path | str) -> pa.Table:
    """List and examine a source; the table depends on no option of the audit."""
    source = storage.absolute(source)
    listed = [row for root in scan.divide_source(source) for row in scan.list_root(root, open_tars=True)]
    table = pa.Table.from_pylist(listed, schema=scan.LISTED)
    settings = examination.Examination(source.rpartition("/")[0])
    return pa.concat_tables(examination.examine(table.to_pylist(), settings))


def audited_jpegs(root: Path, images: int = 48, **options: Any) -> Audited:
    """Prepare small JPEGs in class folders, for tests that need a data set but no realistic images."""
    for number in range(images):
        image = root / "set" / str(number % NUM_GRADES) / f"{number}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(jpeg(number, (96, 72)))
    return audited(root / "set", root / "data", **options)


def audited_rows(examined: pa.Table, out: Path, source: str = "/source", **options: Any) -> Audited:
    """Audit a table of examined objects, real or handmade."""
    parquet.write(str(out / "examined" / "0.parquet"), examined)
    summary = audit.audit(str(out / "examined"), source, str(out), Options(**options), scan.is_table(source))
    manifest.write_spec(str(out), manifest.DataSpec.model_validate(summary["spec"]))
    return Audited(str(out), summary)
