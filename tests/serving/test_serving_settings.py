"""Settings of the endpoint are checked together, and Ray takes what is made of them."""

import subprocess
import sys

import pytest
from pydantic import ValidationError
from ray import serve

from cluster.haproxy import COMMON_ENVIRONMENT
from serving import app
from serving.schemas.review import ReviewSettings
from serving.settings import Scaling, Settings, deployment_options

QUEUE = {"max_queued_requests": 8}


def test_ray_takes_the_default_settings_as_they_are():
    settings = Settings()
    for scaling in (settings.ingress, settings.grader, settings.explainer):
        made = serve.deployment(type("Any", (), {}), **deployment_options(scaling, settings))
        assert made.max_queued_requests == scaling.max_queued_requests


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target_ongoing_requests": 8, "max_ongoing_requests": 8, "max_replicas": 2}, "does not scale up"),
        (
            {"target_ongoing_requests": 4, "max_ongoing_requests": 8, "min_replicas": 3},
            "min_replicas .3. is above",
        ),
    ],
)
def test_scaling_that_cannot_work_is_refused(values, said):
    with pytest.raises(ValidationError, match=said):
        Scaling(**values, **QUEUE)


def test_a_fixed_number_of_replicas_may_be_full_on_target():
    Scaling(target_ongoing_requests=8, max_ongoing_requests=8, **QUEUE)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"answer_seconds": 15}, "wedged_seconds"),
        ({"answer_secs": 15}, "Extra inputs"),
        (
            {"grader": Scaling(min_replicas=0, target_ongoing_requests=4, max_ongoing_requests=8, **QUEUE)},
            "grader.min_replicas must be",
        ),
        (
            {"audit": {"folder": "audit", "computed": True}, "cache_mib": 8},
            r"cache_mib \(8\) keeps answers; set",
        ),
        ({"audit": {"computed": True}}, "set audit.folder"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, said):
    with pytest.raises(ValidationError, match=said):
        Settings(**values)


@pytest.mark.parametrize("draining", ["1", "30"])
def test_a_replica_that_ends_has_time_for_what_it_took_in_last(monkeypatch, draining):
    monkeypatch.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", draining)
    settings = Settings()
    of_ingress = app._application(settings)._bound_deployment._deployment_config.graceful_shutdown_timeout_s
    assert of_ingress >= float(draining) + settings.limits.batch_seconds + settings.answer_seconds
    # HAProxy, when it is replaced, does not cut them either.
    assert of_ingress < float(COMMON_ENVIRONMENT["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"])
    of_grader = deployment_options(settings.grader, settings)["graceful_shutdown_timeout_s"]
    assert of_grader > settings.answer_seconds


@pytest.mark.medium
def test_what_answers_requests_needs_no_pytorch():
    """Which takes seconds and half a gigabyte of each replica that decodes."""
    check = "import sys, serving.app; print({'torch', 'timm', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_places_of_a_review_do_not_depend_on_the_directory_of_a_replica(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    review = ReviewSettings(graded="graded", labels="labels", bundle="runs/first")
    assert (review.graded, review.labels) == (f"{tmp_path}/graded", f"{tmp_path}/labels")
    assert review.bundle == f"{tmp_path}/runs/first"
    assert ReviewSettings(graded="a", labels="b", bundle="models://scalp@1").bundle == "models://scalp@1"
