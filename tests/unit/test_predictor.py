import numpy as np
import pytest
import torch

from scalp_core.bundle import load_bundle
from scalp_core.errors import UserError
from scalp_core.grading import gradings
from scalp_core.model import build_model
from scalp_core.predictor import Predictor
from scalp_core.preprocess import Preprocess, decode
from tests.conftest import SMALL, jpeg


@pytest.fixture(scope="module")
def loaded(bundle):
    return load_bundle(str(bundle))


@pytest.fixture(scope="module")
def images():
    return np.stack([decode(jpeg(seed), Preprocess(size=SMALL)) for seed in range(11)])


def test_fp32_logits_are_those_of_plain_timm(loaded, images):
    plain = build_model("legacy_xception").eval()
    plain.load_state_dict(loaded.state)
    with torch.inference_mode():
        expected = plain(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() / 127.5 - 1)
    logits = Predictor(loaded, "cpu", "fp32").logits(images)
    assert np.abs(logits - expected.numpy()).max() < 1e-4
    assert np.ptp(logits, axis=0).min() > 0.1  # the photographs differ, so the comparison means something


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_photographs_answer_does_not_depend_on_its_batch(loaded, images, precision):
    predictor = Predictor(loaded, "cpu", precision)
    together = predictor.grade(images)
    alone = [predictor.grade(images[index : index + 1])[0] for index in range(len(images))]
    for one, other in zip(together, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_an_answer_is_consistent_with_itself(loaded, images):
    for answer in Predictor(loaded, "cpu").grade(images):
        assert sum(answer.probabilities) == pytest.approx(1)
        assert answer.grade == int(np.argmax(answer.probabilities))
        assert answer.grade in answer.grade_set
        assert answer.expected_severity == pytest.approx(
            sum(grade * share for grade, share in enumerate(answer.probabilities))
        )
        assert answer.refer == bool(answer.refer_reasons)


def test_the_temperature_of_the_bundle_is_applied(loaded):
    logits = np.array([[0.0, 3.0, 0.0, 0.0]], np.float32)
    (answer,) = gradings(logits, loaded.spec)  # temperature 1.5
    assert answer.probabilities[1] == pytest.approx(np.exp(2) / (np.exp(2) + 3))


def test_doubtful_photographs_are_referred_with_the_reason(loaded):
    sure, torn = gradings(np.array([[0, 20, 0, 0], [0, 6, 5.95, 4]], np.float32), loaded.spec)
    assert (sure.refer, sure.refer_reasons, sure.grade_set) == (False, [], [1])
    assert (torn.refer, torn.refer_reasons) == (True, ["ambiguous_grade", "low_confidence"])
    assert torn.grade_set == [1, 2]


def test_no_photographs_give_no_answers(loaded):
    assert Predictor(loaded, "cpu").grade(np.zeros((0, SMALL, SMALL, 3), np.uint8)) == []


def test_the_thread_count_holds_on_the_thread_that_computes(loaded, images):
    before = torch.get_num_threads()
    Predictor(loaded, "cpu", threads=1).logits(images)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_is_refused_with_a_way_out(loaded):
    with pytest.raises(UserError, match="use --device cpu or auto"):
        Predictor(loaded, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_gpu_gives_the_answers_of_the_cpu(loaded, images):
    on_cpu = Predictor(loaded, "cpu", "fp32").logits(images)
    on_gpu = Predictor(loaded, "cuda", "fp32").logits(images)
    assert np.abs(on_cpu - on_gpu).max() < 1e-2
