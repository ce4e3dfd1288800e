"""Grades of other symptoms, from logits to answers."""

import numpy as np
import pytest

from scalp_core.bundles.loading import load_bundle
from scalp_core.evaluation.subgroups import score_other_symptoms
from scalp_core.grades import SYMPTOM_IDS
from scalp_core.images.preprocess import decode
from scalp_core.images.statistics import STATISTICS
from scalp_core.inference.calibration import mean_logits, probabilities
from scalp_core.inference.decision import make_gradings, other_answers
from scalp_core.inference.explainer import make_explainer
from scalp_core.inference.fitting import fit_other_symptoms
from scalp_core.inference.predictor import Predictor
from tests.support.images import jpeg

GRADED = SYMPTOM_IDS[1:5]  # the last of the six has no temperature


@pytest.fixture(scope="module", params=["softmax", "corn"])
def six(tmp_path_factory, request):
    from tests.support.bundles import make_bundle

    folder = tmp_path_factory.mktemp("six")
    return load_bundle(str(make_bundle(folder / "bundle", head=request.param, symptoms=6)))


def logits_of(count):
    return np.random.default_rng(count).normal(0, 2, (count, 24)).astype(np.float32)


def test_answers_have_the_other_symptoms_and_decide_by_the_first_alone(six):
    logits, statistics = logits_of(30), np.zeros((30, len(STATISTICS)))
    gradings = make_gradings(logits, statistics, six.spec)
    alone = make_gradings(logits[:, :4], statistics, six.spec)
    for index, (grading, same) in enumerate(zip(gradings, alone, strict=True)):
        assert vars(same) | {"other_symptoms": grading.other_symptoms} == vars(grading)
        assert tuple(grading.other_symptoms) == GRADED and same.other_symptoms is None
        for place, name in enumerate(GRADED, 1):
            answer, own = grading.other_symptoms[name], logits[index, 4 * place : 4 * place + 4]
            assert answer["grade"] == own.argmax()
            assert answer["grade_name"] == six.spec.grade_names[own.argmax()]
            assert answer["probabilities"] == pytest.approx(probabilities(own[None], 2.0)[0])


def test_scores_of_a_symptom_that_are_not_finite_are_its_worst_grade(six):
    logits = logits_of(1)
    logits[0, 9] = np.nan
    grading = make_gradings(logits, np.zeros((1, len(STATISTICS))), six.spec)[0]
    broken = grading.other_symptoms[SYMPTOM_IDS[2]]
    assert (broken["grade"], broken["probabilities"]) == (3, [0.25] * 4)
    assert "not_finite" not in grading.refer_reasons
    assert grading.other_symptoms[SYMPTOM_IDS[1]]["grade"] == logits[0, 4:8].argmax()


@pytest.mark.medium
def test_graph_and_weights_give_the_same_answers_and_heatmaps_are_of_the_first_symptom(six):
    images = np.stack([decode(jpeg(seed), six.spec.preprocess).pixels for seed in range(5)])
    graph, weights = (Predictor(six, "cpu", "fp32", runtime=runtime) for runtime in ("openvino", "torch"))
    assert graph.logits(images).shape == (5, 24)
    assert np.allclose(graph.logits(images), weights.logits(images), atol=1e-3)
    grades = [grading.grade for grading in graph.grade(images)]
    explainer = make_explainer(six, "cpu")
    for image, grade in zip(images, grades, strict=True):
        assert np.array_equal(explainer.heatmap(image), explainer.heatmap(image, grade))


def test_the_mean_of_passes_is_that_of_each_symptom_s_probabilities(six):
    passes = np.stack([logits_of(7), logits_of(8)[:7]])
    mean = mean_logits(passes, six.spec)
    for place, temperature in enumerate((six.spec.temperature, 2.0, 2.0, 2.0, 2.0, 1.0)):
        own = slice(4 * place, 4 * place + 4)
        expected = np.mean([probabilities(one[:, own], temperature) for one in passes], axis=0)
        assert probabilities(mean[:, own], temperature) == pytest.approx(expected, abs=1e-5)


def test_a_temperature_is_fitted_per_symptom_and_few_labels_give_none(six):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (400, 20))
    labels = np.full((400, 5), -1)
    for place, scale in enumerate((1.0, 4.0)):  # the second one's logits are too large by four
        own = logits[:, 4 * place : 4 * place + 4]
        drawn = [rng.choice(4, p=row) for row in probabilities(own, 1.0)]
        labels[:, place] = drawn
        own *= scale
    labels[::2, 0] = -1
    labels[:19, 2], labels[:, 3] = rng.integers(0, 4, 19), 2  # too few, and one grade
    spec = fit_other_symptoms(six.spec, SYMPTOM_IDS[1:], [7, 8, 9, 10, 11], logits, labels)
    fitted = spec.other_symptoms
    assert [symptom.images for symptom in fitted] == [7, 8, 9, 10, 11]
    assert fitted[0].temperature == pytest.approx(1, rel=0.4)
    assert fitted[1].temperature == pytest.approx(4, rel=0.4)
    assert [symptom.temperature for symptom in fitted[2:]] == [None] * 3
    assert list(other_answers(logits, spec)) == list(SYMPTOM_IDS[1:3])


def test_a_symptom_is_scored_on_the_images_that_have_a_label_of_it():
    labels = np.full((40, 5), -1)
    labels[:10, 1] = [0, 1, 2, 3, 3] * 2
    answers = {
        SYMPTOM_IDS[2]: np.where(np.arange(40) < 10, labels[:, 1], 0),
        SYMPTOM_IDS[3]: np.zeros(40, int),
    }
    scores = score_other_symptoms(SYMPTOM_IDS[1:], labels, answers, [f"g{index % 5}" for index in range(40)])
    assert list(scores) == [SYMPTOM_IDS[2]]
    assert (scores[SYMPTOM_IDS[2]]["n"], scores[SYMPTOM_IDS[2]]["qwk"]) == (10, 1.0)
    assert scores[SYMPTOM_IDS[2]]["intervals"]["groups"] == 5
