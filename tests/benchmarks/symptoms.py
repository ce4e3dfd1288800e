"""`symptoms`: one model of six symptoms, and a model of `grade` alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from jobs.bench.measure import marker, write_result
from jobs.common.console import console, read_json
from jobs.data.prepare import prepare
from jobs.evaluate.comparison import evaluate_models
from jobs.train.driver import RECIPES, train
from scalp_core import storage
from scalp_core.curation.audit import Options
from scalp_core.grades import SYMPTOM_IDS
from scalp_core.models.recipe import load_recipe
from scalp_core.storage import outputs
from scalp_core.synthetic.dataset import write_dataset
from scalp_core.synthetic.plan import SynthOptions

_RECIPE = "cpu"


@dataclass(frozen=True)
class SymptomsOptions:
    """Options of `symptoms`.

    Args:
        photographs: Number of synthetic images; a tenth is for the test.
        workers: Data-parallel workers of each training.
        seed: Random seed of the images.
        settings: Changes of the recipe, as `key=value`.
    """

    photographs: int = 1500
    workers: int = 1
    seed: int = 0
    settings: tuple[str, ...] = ()


def bench_symptoms(out: str, options: SymptomsOptions) -> dict[str, Any]:
    """Train both models with equal settings and images, and test them on microscopes of neither.

    Args:
        out: Output directory, for the runs and `summary.json`.
        options: Options of the benchmark.

    Returns:
        The summary: `rows`, kappa and its interval per symptom of the model of six; `six_minus_one`, the
        paired differences in `grade`; `ratios`, training time of six over that of one.
    """
    outputs.claim_output(out, marker("symptoms"))
    recipe = load_recipe(_RECIPE, RECIPES, list(options.settings))
    images, data = (str(Path(out, name)) for name in ("photographs", "data"))
    with console.status("generating images"):
        write_dataset(
            Path(images), SynthOptions(images=options.photographs, seed=options.seed, symptoms="all")
        )
    prepare(images, data, Options(task="json"))
    runs = {"one": str(Path(out, "one")), "all": str(Path(out, "six"))}
    trained = {
        symptoms: train(data, run, recipe.model_copy(update={"symptoms": symptoms}), options.workers, "cpu")
        for symptoms, run in runs.items()
    }
    compared = evaluate_models(list(runs.values()), data, str(Path(out, "compared")), probe=False)
    six = read_json(storage.join(out, "compared", "model-2", "summary.json")) or {}
    scores = {SYMPTOM_IDS[0]: six["metrics"] | {"intervals": six["intervals"]}} | six["other_symptoms"]
    rows = [
        {
            "symptom": name,
            "images": score["n"],
            "grades": score["support"],
            "qwk": score["qwk"],
            "qwk_interval": [score["intervals"]["qwk"][end] for end in ("low", "high")],
            "top1": score["top1"],
        }
        for name, score in scores.items()
    ]
    ratio = trained["all"]["train_seconds"] / trained["one"]["train_seconds"]
    settings = vars(options) | {"recipe": recipe.model_dump()}
    groups = {"test_groups": compared["comparison"]["groups"]}
    more = {"six_minus_one": compared["comparison"]["differences"][0]}
    result = write_result(
        out, "symptoms", settings | groups, rows, {"train_seconds_six_vs_one": ratio}, **more
    )
    table = Table("symptom", "test images", "QWK", "95 % interval", title="test on other microscopes")
    for row in rows:
        low, high = row["qwk_interval"]
        table.add_row(row["symptom"], str(row["images"]), f"{row['qwk']:.3f}", f"{low:.3f} to {high:.3f}")
    console.print(table)
    return result
