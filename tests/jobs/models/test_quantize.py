"""`scalp quantize`: the refusal above the limit, other files in the bundle, and concurrent runs."""

import shutil
from types import SimpleNamespace

import pytest

from jobs.common.console import SUMMARY_FILE
from jobs.models.quantize import quantize
from scalp_core.bundles.bundle import BOM_FILE, save_bundle, serialize_bom
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.evaluation import noninferiority
from scalp_core.storage import lease, outputs
from tests.support.sources import audited_jpegs


@pytest.mark.parametrize("text", ["[]", '{"kind": "evaluate"}', "my notes"])
def test_summary_of_another_program_is_refused_and_kept(bundle, tmp_path, text):
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    (copy / SUMMARY_FILE).write_text(text)
    with pytest.raises(UserError, match=f"{copy}/{SUMMARY_FILE} was not written by scalp quantize; move it"):
        quantize(str(copy), str(tmp_path / "data"))
    assert (copy / SUMMARY_FILE).read_text() == text


@pytest.mark.parametrize("verb", ["train", None], ids=["in a run", "alone"])
def test_a_bundle_in_use_is_refused(bundle, tmp_path, monkeypatch, verb):
    """`scalp train` also writes the bundle of a run."""
    run = tmp_path / "run"
    if verb:
        outputs.claim_output(str(run), verb)
    copy = shutil.copytree(bundle, run / "bundle")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(manifest, "read_spec", lambda _: SimpleNamespace(sha256="0" * 64))
    with (
        lease.hold(str(run if verb else copy), verb or "quantize"),
        pytest.raises(UserError, match=f"is in use by scalp {verb or 'quantize'}"),
    ):
        quantize(str(copy), str(tmp_path / "data"))
    kept = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert {path: data for path, data in kept.items() if lease.FOLDER not in path.parts} == before


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared set of 48 images."""
    return audited_jpegs(tmp_path_factory.mktemp("quantize"), ratio="2:7:1").data


@pytest.fixture
def trained(bundle, data, tmp_path):
    """A copy of the untrained bundle that was trained on `data` according to its contract."""
    loaded = load_bundle(str(bundle))
    training = loaded.spec.training.model_copy(update={"data_sha256": manifest.read_spec(data).sha256})
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    metrics = {"val": {"n": 33, "qwk": 0.9, "top1": 0.9, "macro_f1": 0.9, "mae": 0.1}}
    save_bundle(str(copy), loaded.spec.model_copy(update={"training": training, "metrics": metrics}), {})
    return copy


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def attempts(monkeypatch):
    """Replace quantization by a graph of fixed size; the list has `careful` of each attempt."""
    attempts = []
    monkeypatch.setattr(
        "scalp_core.inference.openvino_runtime.quantize",
        lambda graph, _, careful: attempts.append(careful) or graph,
    )
    return attempts


def losses(monkeypatch, *bounds):
    """Replace the comparison's upper bound of the loss of kappa, one per attempt."""
    compare, left = noninferiority.compare, list(bounds)

    def measured(*arguments):
        update = {"qwk_drop_bound": left.pop(0), "coverage_drop_bound": 0.0}
        return compare(*arguments).model_copy(update=update)

    monkeypatch.setattr(noninferiority, "compare", measured)


@pytest.mark.promise("README: int8 above the limit is refused")
def test_int8_above_the_limit_is_refused_and_the_bundle_stays(trained, data, attempts, monkeypatch):
    before = files(trained)
    losses(monkeypatch, 0.0101, 0.0101)
    with pytest.raises(
        UserError, match=r"may be as large as 0.0101 .*accepted is 0.01; .*keeps only bf16 and fp32"
    ):
        quantize(str(trained), data)
    assert attempts == [False, True]  # with quick ranges, then with careful ones
    assert files(trained) == before
    assert not load_bundle(str(trained)).spec.offers("int8")


@pytest.mark.medium
def test_int8_at_the_limit_is_added(trained, data, attempts, monkeypatch):
    losses(monkeypatch, 0.0101, 0.0100)
    summary = quantize(str(trained), data)
    assert attempts == [False, True]
    assert load_bundle(str(trained)).spec.graphs["int8"].comparison.qwk_drop_bound == 0.01
    assert summary["comparison"]["confidence"] == pytest.approx(0.975)  # of each of two attempts
    assert (trained / BOM_FILE).read_bytes() == serialize_bom(load_bundle(str(trained)).spec)


def test_a_larger_limit_accepts_a_larger_loss(trained, data, attempts, monkeypatch):
    losses(monkeypatch, 0.03)
    quantize(str(trained), data, max_drop=0.03)
    assert attempts == [False]
    assert load_bundle(str(trained)).spec.offers("int8")


def test_few_validation_images_are_refused_even_with_equal_answers(trained, data, attempts):
    """Chance can hide a loss of 0.01 in so few images."""
    with pytest.raises(UserError, match=r"the loss of kappa is 0.0000, and may be as large as 0\.0[2-9]"):
        quantize(str(trained), data)
