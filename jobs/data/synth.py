"""`scalp synth`: generate synthetic scalp images in the layout of AI Hub set 216."""

from __future__ import annotations

from typing import Any

from jobs.common.console import progress_bar, show
from scalp_core import storage
from scalp_core.grades import GRADE_NAMES, SYMPTOM_IDS
from scalp_core.storage import outputs
from scalp_core.synthetic.dataset import write_dataset
from scalp_core.synthetic.plan import SynthOptions

KIND = "synth"


def synth(out: str, options: SynthOptions) -> dict[str, Any]:
    """Generate the images; a finished folder of the same options is not changed.

    Raises:
        UserError: `out` is in object storage, holds something else, or is in use.
    """
    folder = storage.local_folder(out, "OUT")
    with (
        outputs.open_output(str(folder), KIND),
        progress_bar("rendering", options.images) as (progress, task),
    ):
        summary = write_dataset(
            folder, options, on_progress=lambda done: progress.update(task, completed=done)
        )
    show(
        KIND,
        {
            "images": summary.images,
            "by grade": _by_name(summary.grades),
            **{name: _by_name(summary.symptoms[name]) for name in SYMPTOM_IDS[1:] if summary.symptoms},
            "people": summary.people,
            "devices": summary.devices,
            "folder": out,
        },
    )
    return summary.model_dump()


def _by_name(counts: dict[str, int]) -> dict[str, int]:
    return {GRADE_NAMES[int(grade)]: count for grade, count in counts.items()}
