"""Sweeping sentences of the pages, each proved by a test marked `@pytest.mark.promise("README: …")`."""

from __future__ import annotations

# Promise -> words of the page that make it.
PROMISES = {
    "README: every image has exactly one row": "every photograph accounted for",
    "README: a missing or repeated row is an error": "a photograph without a row, or with two, is an exit",
    "README: a killed grading resumes": "a run that is killed anywhere goes on by the same command",
    "README: failed rows are graded again": "`--retry-failed` grades failed rows again",
    "README: one output holds one bundle": "another bundle for the same OUT is refused",
    "README: all paths share preprocessing and predictor": "share one preprocessing path and one predictor",
    "README: a stopped run resumes": "a stopped run goes on",
    "README: a finished run ends immediately": "a finished one ends at once",
    "README: bad input is one line and a non-zero exit code": "with one line and a non-zero exit code",
    "README: no image is dropped without a reason": "drops nothing without a reason",
    "README: splits share no microscope": "never shares a microscope, a session or a picture between",
    "README: what follows from a random split reports the leak": "all that follows says that it leaks",
    "README: evaluation reports intervals and the majority baseline": "baseline of always answering",
    "README: a lost worker costs one epoch": "costs at most the epoch that was running",
    "README: weights that do not fit are refused": "Weights that do not fit the architecture are refused",
    "README: int8 above the limit is refused": "`quantize` refuses it unless the validation part shows",
    "README: registries are only added to": "the history of promotions are only ever added to",
    "README: the same bundle adds no version": "the same bundle again adds nothing",
    "README: the endpoint answers the fields of a row": "The endpoint answers the same fields as JSON",
    "README: an invalid bundle changes nothing": "one that cannot be loaded changes nothing",
    "README: beyond loopback only with keys": "beyond loopback it listens with keys only",
    "README: a damaged file is never half graded": "is refused, never half graded",
    "README: the same command is one job": "the same command again attaches to the job",
    "README: Ctrl-C leaves a job alone": "Ctrl-C leaves it alone",
    "README: the exit code of a job is its command's": "its exit code is the command's",
    "README: nodes are checked before long work": "Versions, storage, disks and room are checked before",
    "docs/training.md: images that do not fit are decoded again": "else they are decoded anew in every epoch",
}
PAGES = {"README": "README.md"}


def page_of(promise: str) -> str:
    """Path of the page that makes a promise."""
    name = promise.partition(":")[0]
    return PAGES.get(name, name)
