"""A canary over real HTTP, and its counts in the audit log; for a shadow see test_whole_way.py."""

from __future__ import annotations

import hashlib

import httpx
import pytest

from jobs.evaluate.compare import compare
from scalp_core.bundles.loading import load_bundle
from scalp_core.images.preprocess import decode
from scalp_core.inference.predictor import Predictor
from serving import app
from serving.observability.audit_writer import AuditSettings
from serving.replicas.rollout import is_chosen
from serving.settings import CandidateSettings, Scaling, Settings
from tests.support.images import jpeg
from tests.support.ports import free_port

pytestmark = pytest.mark.slow

PHOTOGRAPHS = [jpeg(seed) for seed in range(24)]
SHARE = 0.5
CHOSEN = [is_chosen(hashlib.sha256(data).hexdigest(), SHARE) for data in PHOTOGRAPHS]


@pytest.fixture(scope="module")
def other_bundle(make_bundle, tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("other"), seed=8)


@pytest.fixture(scope="module")
def tried(bundle, other_bundle, cluster, tmp_path_factory):
    """The answers to all photographs, and the comparison."""
    audit, port = tmp_path_factory.mktemp("audit"), free_port()
    settings = Settings(
        device="cpu",
        precision="fp32",
        grader=Scaling(target_ongoing_requests=16, max_ongoing_requests=64, max_queued_requests=64),
        candidate=CandidateSettings(mode="canary", share=SHARE),
        audit=AuditSettings(folder=str(audit)),
    )
    app.start(str(bundle), "127.0.0.1", port, settings, str(other_bundle))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        answers = [client.post("/v1/grade", files={"file": ("a.jpg", each)}).json() for each in PHOTOGRAPHS]
    app.stop()
    return answers, compare(str(audit))


def test_a_canary_answers_its_share(tried, bundle, other_bundle):
    answers, _ = tried
    assert 0 < sum(CHOSEN) < len(CHOSEN)
    models = [Predictor(load_bundle(str(each)), "cpu", "fp32") for each in (bundle, other_bundle)]
    assert models[0].model_version != models[1].model_version
    for data, answer, chosen in zip(PHOTOGRAPHS, answers, CHOSEN, strict=True):
        model = models[chosen]
        truth = model.grade(decode(data, model.spec.preprocess).pixels[None])[0]
        assert answer["model_version"] == model.model_version
        assert answer["probabilities"] == pytest.approx(truth.probabilities, abs=1e-5)


def test_what_both_answered_is_counted(tried, bundle, other_bundle):
    _, compared = tried
    first, second = (load_bundle(str(each)).spec.model_version for each in (bundle, other_bundle))
    counts = {row["model_version"]: row["photographs"] for row in compared["models"]}
    assert counts == {first: len(CHOSEN) - sum(CHOSEN), second: sum(CHOSEN)}
    assert (compared["failed"], compared["pairs"]) == (0, [])
