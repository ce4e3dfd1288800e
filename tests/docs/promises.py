"""Sweeping sentences of the pages, each proved by a test marked `@pytest.mark.promise("README: …")`."""

from __future__ import annotations

# Promise -> words of the page that make it.
PROMISES = {
    "README: every image has exactly one row": "Each image has exactly one row.",
    "README: a missing or repeated row is an error": "If an image has no row or two, the command exits",
    "README: a killed grading resumes": "The same command resumes a killed run.",
    "README: failed rows are graded again": "`--retry-failed` grades failed rows again.",
    "README: one output holds one bundle": "Another bundle for the same output directory is refused.",
    "README: all paths share preprocessing and predictor": "share one preprocessing path and one predictor",
    "README: a stopped run resumes": "The same command resumes a stopped run.",
    "README: a finished run ends immediately": "`tune`, `grade` or `explain` exits immediately.",
    "README: bad input is reported with a fix and exit code 2": "with the problem, a hint and exit code 2",
    "README: no image is dropped without a reason": "drops no image without a reason",
    "README: splits share no microscope": "No microscope, session or image is in two splits.",
    "README: what follows from a random split reports the leak": "all later results are marked as leaky",
    "README: evaluation reports intervals and the majority baseline": "are compared with the majority",
    "README: a lost worker costs one epoch": "A lost worker or node costs the epoch in progress",
    "README: weights that do not fit are refused": "Weights that do not fit the architecture are refused.",
    "README: int8 above the limit is refused": "refuses an int8 model that is worse on the validation split",
    "README: registries are only added to": "Versions and promotions are only added to.",
    "README: the same bundle adds no version": "The same bundle adds no second version.",
    "README: the endpoint answers the fields of a row": "It answers the fields of a result row.",
    "README: an invalid bundle changes nothing": "An invalid bundle changes nothing.",
    "README: beyond loopback only with keys": "loopback only with keys, or with `--allow-anonymous`.",
    "README: no image is kept that did not ask": "and the request asks for it.",
    "README: a damaged file is never half graded": "A damaged image is refused, not half graded.",
    "README: the same command is one job": "with the same command attaches to the running job",
    "README: Ctrl-C leaves a job alone": "Ctrl-C leaves the job alone.",
    "README: the exit code of a job is its command's": "Its exit code is the command's.",
    "README: nodes are checked before long work": "Nodes are checked before long work.",
    "docs/training.md: a training in one process resumes after a crash": "the command starts it again",
    "docs/training.md: one process trains as Ray does": "Both train the same model, and each resumes",
    "docs/training.md: images that do not fit are decoded again": "they are decoded again in each epoch",
}
PAGES = {"README": "README.md"}


def page_of(promise: str) -> str:
    """Path of the page that makes a promise."""
    name = promise.partition(":")[0]
    return PAGES.get(name, name)
