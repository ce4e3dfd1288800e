"""`folds`: wrong labels that are planted among images, and the student of cross-validation against others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from jobs.bench.measure import marker, write_result
from jobs.common.console import console
from jobs.data.prepare import prepare
from jobs.evaluate.audit_labels import audit_labels
from jobs.evaluate.comparison import evaluate_models
from jobs.train.driver import RECIPES, train
from jobs.train.folds import train_folds
from scalp_core.curation.audit import Options
from scalp_core.datasets import manifest
from scalp_core.datasets.fingerprints import fingerprint
from scalp_core.evaluation import paired
from scalp_core.grades import NUM_GRADES
from scalp_core.models.recipe import load_recipe
from scalp_core.storage import outputs, parquet
from scalp_core.synthetic.dataset import write_dataset
from scalp_core.synthetic.plan import SynthOptions, plan_dataset

_RECIPE = "cpu"


@dataclass(frozen=True)
class FoldsOptions:
    """Options of `folds`.

    Args:
        photographs: Number of synthetic images; a tenth is for the test.
        planted: Share of wrong labels among the others; each is another grade, at random.
        folds: Number of folds.
        workers: Data-parallel workers of each training.
        seed: Random seed of the images and of the wrong labels.
        settings: Changes of the recipe, as `key=value`.
    """

    photographs: int = 1500
    planted: float = 0.05
    folds: int = 5
    workers: int = 1
    seed: int = 0
    settings: tuple[str, ...] = ()


def bench_folds(out: str, options: FoldsOptions) -> dict[str, Any]:
    """Train folds, their student and an ordinary run on images with planted wrong labels.

    The test split has no planted label, and microscopes that no training saw. A label is wrong if it is not
    the grade that was drawn: planted, or an error of the simulated reader.

    Args:
        out: Output directory, for the runs and `summary.json`.
        options: Options of the benchmark.

    Returns:
        The summary: `audit`, how many wrong labels the audit lists first; `test`, student, ensemble, mean of
        the folds and the ordinary run; `student_minus_ordinary`, paired.
    """
    outputs.claim_output(out, marker("folds"))
    recipe = load_recipe(_RECIPE, RECIPES, list(options.settings))
    images, data = (str(Path(out, name)) for name in ("photographs", "data"))
    synthetic = SynthOptions(images=options.photographs, seed=options.seed)
    with console.status("generating images"):
        write_dataset(Path(images), synthetic)
    prepare(images, data, Options(folds=options.folds, ratio="7:2:1"))
    planted = _plant(data, options)
    truth = {plan.stem: plan.true_grade for plan in plan_dataset(synthetic)}

    trained = train_folds(data, str(Path(out, "folds")), recipe, options.folds, options.workers, "cpu")
    audit_labels(str(Path(out, "folds")), str(Path(out, "audit")), pictures=20)
    suspects = parquet.read(str(Path(out, "audit", "suspects.parquet")))
    train(data, str(Path(out, "ordinary")), recipe, options.workers, "cpu")
    bundles = [str(Path(out, name)) for name in ("ordinary", "folds")]
    compared = evaluate_models(bundles, data, str(Path(out, "compared")), probe=False)

    audit = _score(suspects, planted, truth)
    settings = vars(options) | {"recipe": recipe.model_dump(), "test_images": trained["test"]["images"]}
    more = {
        "audit": audit,
        "test": {name: trained["test"][name] for name in ("groups", "models", "differences")},
        "student_minus_ordinary": compared["comparison"]["differences"][0],
    }
    rows = [{"list": name, **values} for name, values in audit["precision"].items()]
    result = write_result(out, "folds", settings, rows, {}, **more)
    _show(result)
    return result


def _plant(data: str, options: FoldsOptions) -> set[str]:
    """Change labels of the train and val splits of prepared data; return the ids of these images."""
    spec, table = manifest.read_spec(data), manifest.read_manifest(data)
    rng = np.random.default_rng([options.seed, 1])
    learned = np.array([split in ("train", "val") for split in table["split"].to_pylist()])
    labels = np.array(table["label"].to_pylist())
    chosen = rng.permutation(np.flatnonzero(learned))[: round(options.planted * learned.sum())]
    labels[chosen] = (labels[chosen] + rng.integers(1, NUM_GRADES, len(chosen))) % NUM_GRADES
    table = table.set_column(table.column_names.index("label"), "label", pa.array(labels, pa.int8()))
    manifest.write_manifest(data, table)
    manifest.write_spec(data, spec.model_copy(update={"sha256": fingerprint(table)}))
    return set(table["image_id"].take(chosen).to_pylist())


def _score(suspects: pa.Table, planted: set[str], truth: dict[str, int]) -> dict[str, Any]:
    """Count the wrong labels among the first suspects, as many as were planted, and among all."""
    ids, uris = suspects["image_id"].to_pylist(), suspects["uri"].to_pylist()
    is_planted = np.array([image_id in planted for image_id in ids])
    is_wrong = np.array(
        [
            truth[Path(uri).stem] != label
            for uri, label in zip(uris, suspects["label"].to_pylist(), strict=True)
        ]
    )
    precision = {}
    for name, count in (("as many as planted", len(planted)), ("all", len(ids))):
        first = slice(0, count)
        precision[name] = {
            "suspects": len(ids[first]),
            "planted": round(float(is_planted[first].mean()), 4),
            "wrong": round(float(is_wrong[first].mean()), 4),
            "planted_found": round(float(is_planted[first].sum() / len(planted)), 4),
        }
    return {"planted": len(planted), "precision": precision}


def _show(result: dict[str, Any]) -> None:
    table = Table("suspects", "planted among them", "wrong among them", "of the planted found")
    for values in result["audit"]["precision"].values():
        table.add_row(
            str(values["suspects"]),
            *(f"{values[name]:.1%}" for name in ("planted", "wrong", "planted_found")),
        )
    console.print(table)
    table = Table("test on other microscopes", *result["test"]["models"])
    for name, label in paired.METRICS.items():
        values = (of_model[name]["value"] for of_model in result["test"]["models"].values())
        table.add_row(label, *("-" if value is None else f"{value:.3f}" for value in values))
    console.print(table)
