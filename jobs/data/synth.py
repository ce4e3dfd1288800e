"""`scalp synth`: generate synthetic scalp images in the layout of AI Hub set 216."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.common.console import progress_bar, show
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.grades import GRADE_NAMES
from scalp_core.storage import outputs
from scalp_core.synthetic.dataset import write_dataset
from scalp_core.synthetic.plan import SynthOptions

KIND = "synth"


def synth(out: str, options: SynthOptions) -> dict[str, Any]:
    """Generate the images; a finished folder of the same options is not changed.

    Raises:
        UserError: `out` is in object storage, holds something else, or is in use.
    """
    if storage.is_s3(out):
        raise UserError(f"OUT {out} is not a local folder; choose one, then copy it")
    with (
        outputs.open_output(out, KIND) as output,
        progress_bar("rendering", options.images) as (progress, task),
    ):
        summary = write_dataset(
            Path(output.uri), options, on_progress=lambda done: progress.update(task, completed=done)
        )
    show(
        KIND,
        {
            "images": summary.images,
            "by grade": {GRADE_NAMES[int(grade)]: count for grade, count in summary.grades.items()},
            "people": summary.people,
            "devices": summary.devices,
            "folder": out,
        },
    )
    return summary.model_dump()
