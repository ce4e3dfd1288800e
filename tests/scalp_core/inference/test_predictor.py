import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.images.preprocess import Preprocess, decode
from scalp_core.images.statistics import STATISTICS
from scalp_core.inference.decision import make_gradings
from scalp_core.inference.predictor import Predictor, needed_part, resolve_runtime
from scalp_core.models.architecture import build_model
from tests.support.images import jpeg
from tests.support.sizes import SMALL

NO_STATISTICS = np.zeros((2, len(STATISTICS)), np.float32)  # the bundle has no gates


@pytest.fixture(scope="module")
def loaded(bundle):
    return load_bundle(str(bundle))


@pytest.fixture(scope="module")
def images():
    return np.stack([decode(jpeg(seed), Preprocess(size=SMALL)).pixels for seed in range(11)])


@pytest.mark.parametrize(
    "architecture", ["test_resnet", pytest.param("legacy_xception", marks=pytest.mark.medium)]
)
def test_fp32_logits_are_those_of_plain_timm(make_bundle, images, tmp_path, architecture):
    loaded = load_bundle(str(make_bundle(tmp_path, architecture=architecture)))
    plain = build_model(architecture).eval()
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
    (answer,) = make_gradings(logits, NO_STATISTICS[:1], loaded.spec)  # temperature 1.5
    assert answer.probabilities[1] == pytest.approx(np.exp(2) / (np.exp(2) + 3))


def test_doubtful_photographs_are_referred_with_the_reason(loaded):
    logits = np.array([[0, 20, 0, 0], [0, 6, 5.95, 4]], np.float32)
    sure, torn = make_gradings(logits, NO_STATISTICS, loaded.spec)
    assert (sure.refer, sure.refer_reasons, sure.grade_set) == (False, [], [1])
    assert (torn.refer, torn.refer_reasons) == (True, ["ambiguous_grade", "low_confidence"])
    assert torn.grade_set == [1, 2]


def test_no_photographs_give_no_answers(loaded):
    assert Predictor(loaded, "cpu").grade(np.zeros((0, SMALL, SMALL, 3), np.uint8)) == []


def test_the_thread_count_holds_on_the_thread_that_computes(loaded, images):
    before = torch.get_num_threads()
    Predictor(loaded, "cpu", threads=1, runtime="torch").logits(images)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_runtime_answers_alike(loaded, images, precision):
    by_openvino = Predictor(loaded, "cpu", precision).logits(images)
    by_torch = Predictor(loaded, "cpu", precision, runtime="torch").logits(images)
    spread = np.ptp(by_torch, axis=0).min()
    assert np.abs(by_openvino - by_torch).max() < (1e-4 if precision == "fp32" else 0.15 * spread)


def test_a_batch_of_any_size_is_answered_in_order(loaded, images):
    predictor = Predictor(loaded, "cpu", "fp32")
    many = np.concatenate([images] * 4)[:37]
    expected = np.concatenate([predictor.logits(image[None]) for image in many])
    np.testing.assert_allclose(predictor.logits(many), expected, atol=1e-5)


def test_threads_may_share_a_predictor(loaded, images):
    predictor = Predictor(loaded, "cpu", "fp32")
    expected = predictor.logits(images)
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(lambda _: predictor.logits(images), range(12)):
            np.testing.assert_array_equal(answer, expected)


def test_bundle_older_than_graphs_gives_the_same_answers(loaded, images):
    old = Bundle(loaded.spec.model_copy(update={"graphs": {}}), loaded.uri)
    expected = Predictor(loaded, "cpu", "fp32").logits(images)
    np.testing.assert_allclose(Predictor(old, "cpu", "fp32").logits(images), expected, atol=1e-5)


@pytest.mark.medium
def test_cpu_grades_without_pytorch_and_telemetry(bundle, tmp_path):
    program = f"""
import sys, numpy as np
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.bundle import Bundle
from scalp_core.inference.predictor import Predictor, needed_part, resolve_runtime
Predictor(load_bundle({str(bundle)!r})).grade(np.zeros((2, {SMALL}, {SMALL}, 3), np.uint8))
assert "torch" not in sys.modules, "PyTorch takes seconds and half a gigabyte"
assert sys.modules["openvino_telemetry"] is None
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []  # telemetry keeps an identity in the home directory


@pytest.mark.medium
def test_a_containers_limit_of_cpu_time_bounds_the_threads(bundle):
    """One core by the cgroup's quota, as Kubernetes sets it; all cores of the node can be scheduled on."""
    program = f"""
import builtins, io, os
from unittest import mock
from scalp_core.bundles.loading import load_bundle
from scalp_core.inference.openvino_runtime import OpenVinoRuntime

graph = load_bundle({str(bundle)!r}).graph("float")
limits, exists, opened = "/sys/fs/cgroup/cpu.max", os.path.exists, builtins.open
with (
    mock.patch("os.path.exists", lambda path: path == limits or exists(path)),
    mock.patch("builtins.open", lambda path, *rest, **options: (
        io.StringIO("100000 100000") if path == limits else opened(path, *rest, **options))),
):
    model = OpenVinoRuntime(graph, "fp32").requests[0].get_compiled_model()
assert model.get_property("INFERENCE_NUM_THREADS") == 1, model.get_property("INFERENCE_NUM_THREADS")
assert not model.get_property("ENABLE_CPU_PINNING") or len(os.sched_getaffinity(0)) == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_parallel_passes_give_the_same_logits(loaded):
    predictor = Predictor(loaded, "cpu", "fp32", threads=2)
    size = loaded.spec.preprocess.size
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    np.testing.assert_allclose(
        predictor.in_streams(2).logits(images), predictor.logits(images), rtol=1e-4, atol=1e-4
    )


def test_incompatible_arguments_are_refused_with_advice(loaded):
    with pytest.raises(UserError, match="scalp quantize"):
        Predictor(loaded, "cpu", "int8")
    with pytest.raises(UserError, match="use --device cpu"):
        Predictor(loaded, "cpu", "int8", runtime="torch")
    with pytest.raises(UserError, match="--runtime auto"):
        needed_part("cuda", "auto", "openvino")
    with pytest.raises(UserError, match="torch-compile runs on GPUs; use --device cuda, or --runtime auto"):
        Predictor(loaded, "cpu", runtime="torch-compile")


def test_compiling_is_for_long_runs_on_gpus():
    assert resolve_runtime("auto", "cpu", math.inf) == "openvino"
    assert resolve_runtime("auto", "cuda", 1000) == "torch"
    assert resolve_runtime("auto", "cuda", math.inf) == "torch-compile"
    assert resolve_runtime("torch", "cuda", math.inf) == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_is_refused_with_advice(loaded):
    with pytest.raises(UserError, match="use --device cpu or auto"):
        Predictor(loaded, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["torch", "torch-compile"])
def test_the_gpu_gives_the_answers_of_the_cpu(loaded, images, runtime):
    many = np.concatenate([images] * 30)  # 330: full and padded graphs, both slots several times
    on_cpu = Predictor(loaded, "cpu", "fp32").logits(many)
    on_gpu = Predictor(loaded, "cuda", "fp32", runtime=runtime)
    on_gpu.warm_up(128)
    assert np.abs(on_cpu - on_gpu.logits(many)).max() < 1e-2
    for count in (1, 7, 8, 33):  # answers do not mix with what an earlier batch left behind
        assert np.abs(on_cpu[:count] - on_gpu.logits(many[:count])).max() < 1e-2


@pytest.mark.gpu
def test_bf16_on_the_gpu_gives_the_same_grades(loaded, images):
    on_cpu = Predictor(loaded, "cpu", "fp32").logits(images)
    on_gpu = Predictor(loaded, "cuda", "bf16").logits(images)
    assert np.abs(on_cpu - on_gpu).max() < 0.1 * np.ptp(on_cpu)
