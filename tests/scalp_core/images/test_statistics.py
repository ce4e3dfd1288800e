import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from jobs.common.images import LoadImages
from scalp_core.bundles.bundle import save_bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.model_card import render_model_card
from scalp_core.errors import UserError
from scalp_core.images import gates as image_gates
from scalp_core.images import statistics as image_statistics
from scalp_core.images.preprocess import Preprocess, decode
from scalp_core.images.statistics import STATISTICS
from scalp_core.inference.decision import REASONS, make_gradings
from scalp_core.inference.predictor import Predictor
from scalp_core.synthetic.dataset import render_jpeg
from scalp_core.synthetic.plan import SynthOptions, plan_dataset
from serving.schemas.grading import ModelResponse
from tests.support import negatives
from tests.support.sizes import SMALL

ROOT = Path(__file__).parents[3]
KINDS = [*negatives.KINDS, "blurred"]


@dataclass(frozen=True)
class Sample:
    images: int
    train: int  # microscopes that the gates are fitted on
    val: int  # that set their limit
    unseen: int
    negatives: int  # of each kind


FEW, MANY = Sample(96, 8, 3, 5, 4), Sample(350, 12, 3, 13, 15)


@cache
def _files(sample: Sample) -> dict[str, list[bytes]]:
    """Photographs by part, cut by microscope, and negatives by kind."""
    counts = {part: getattr(sample, part) for part in ("train", "val", "unseen")}
    by_device = defaultdict(list)
    for plan in plan_dataset(SynthOptions(images=sample.images, devices=sum(counts.values()), seed=11)):
        by_device[plan.device.serial].append(plan)
    devices, files = iter(sorted(by_device)), {}
    for part, count in counts.items():
        files[part] = [render_jpeg(plan) for _ in range(count) for plan in by_device[next(devices)]]
    rng = np.random.default_rng(5)
    for kind, make in negatives.KINDS.items():
        files[kind] = [negatives.as_file(make(rng)) for _ in range(sample.negatives)]
    pictures = [Image.open(BytesIO(data)) for data in files["unseen"][: 2 * sample.negatives]]
    files["blurred"] = [negatives.as_file(negatives.blurred(picture, rng)) for picture in pictures]
    return files


@pytest.fixture(scope="module")
def files():
    return _files(FEW)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((FEW, 128), id="few, 128 px"),
        pytest.param((MANY, 128), id="many, 128 px", marks=pytest.mark.slow),
        pytest.param((MANY, 224), id="many, 224 px", marks=pytest.mark.slow),
    ],
)
def fitted(request):
    """Gates, and the statistics of every part and kind, at one size of the square."""
    sample, size = request.param
    spec = Preprocess(size=size)
    statistics = {
        name: np.stack([image_statistics.measure(decode(data, spec).pixels) for data in contents])
        for name, contents in _files(sample).items()
    }
    return image_gates.fit_gates(statistics["train"], statistics["val"]), statistics


@pytest.fixture(scope="module")
def gated(bundle, files, tmp_path_factory):
    """A bundle with gates, written and read again."""
    loaded = load_bundle(str(bundle))
    spec = loaded.spec.preprocess
    train, val = (
        image_statistics.measure_all(np.stack([decode(data, spec).pixels for data in files[part]]))
        for part in ("train", "val")
    )
    folder = shutil.copytree(bundle, tmp_path_factory.mktemp("gated") / "bundle")
    save_bundle(str(folder), loaded.spec.model_copy(update={"gates": image_gates.fit_gates(train, val)}), {})
    return load_bundle(str(folder))


# --- detection by the gates --------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), KINDS], ids=[*KINDS, "all kinds"])
def test_what_is_no_sharp_scalp_is_told_from_microscopes_never_seen(fitted, kinds):
    gates, statistics = fitted
    near = image_gates.unlikeness(statistics["unseen"], gates)
    far = image_gates.unlikeness(np.concatenate([statistics[kind] for kind in kinds]), gates)
    assert roc_auc_score([0] * len(near) + [1] * len(far), [*near, *far]) >= 0.95
    assert np.mean(far > 1) >= 0.9  # and the limit lies between them


@pytest.mark.medium
def test_photographs_of_microscopes_never_seen_are_seldom_flagged(fitted):
    gates, statistics = fitted
    assert len(statistics["unseen"]) >= 20
    flagged = np.any(list(image_gates.flag_images(statistics["unseen"], gates).values()), axis=0)
    assert flagged.mean() <= 0.03


@pytest.mark.medium
@pytest.mark.parametrize(
    ("kind", "flag"), [("blurred", "blurred"), ("black", "too_dark"), ("white", "too_bright")]
)
def test_the_reason_is_named(fitted, kind, flag):
    gates, statistics = fitted
    assert image_gates.flag_images(statistics[kind], gates)[flag].mean() >= 0.9


# --- measuring ---------------------------------------------------------------------------------------------


def test_statistics_mean_what_their_names_say():
    gray = np.full((64, 64, 3), 128, np.uint8)  # small enough that every pixel is in the grid
    stripes, half_red = gray.copy(), gray.copy()
    stripes[:, ::4] = 0
    half_red[:, :32, 1:] = 0
    found = {
        name: dict(zip(STATISTICS, image_statistics.measure(picture).tolist(), strict=True))
        for name, picture in {"gray": gray, "stripes": stripes, "red": half_red, "black": gray * 0}.items()
    }
    assert found["gray"]["luma_mean"] == pytest.approx(128 / 255)
    assert (found["gray"]["flat_share"], found["gray"]["dark_share"]) == (1, 0)
    assert found["black"]["dark_share"] == 1
    assert found["stripes"]["dark_share"] == 0.25
    assert found["stripes"]["sharpness_1"] > found["gray"]["sharpness_1"] + 3
    assert found["red"]["red_green"] == pytest.approx(np.log(129 / 65))
    assert found["red"]["red_green_std"] == pytest.approx(np.log(65))
    assert found["red"]["saturation"] > 0.4


@pytest.mark.medium
@pytest.mark.parametrize("size", [96, 128, 224, 225, 512])
def test_the_grid_of_pixels_is_as_light_and_colored_as_the_whole(files, size):
    for data in files["unseen"][:10]:
        pixels = decode(data, Preprocess(size=size)).pixels
        found = dict(zip(STATISTICS, image_statistics.measure(pixels).tolist(), strict=True))
        luma = pixels @ [0.25, 0.625, 0.125]
        red, green, _ = pixels.reshape(-1, 3).mean(axis=0) + 1
        assert found["luma_mean"] == pytest.approx(luma.mean() / 255, abs=0.01)
        assert found["luma_std"] == pytest.approx(np.log(luma.std() + 1), abs=0.05)
        assert found["dark_share"] == pytest.approx((luma < 16).mean(), abs=0.02)
        assert found["red_green"] == pytest.approx(np.log(red / green), abs=0.01)


def _stripes(width, first=0):
    light = (np.arange(128) - first) // width % 2 * 200
    return np.broadcast_to(light.astype(np.uint8)[None, :, None], (128, 128, 3)).copy()


def test_edges_are_seen_at_their_own_size_and_in_their_direction_wherever_they_lie():
    finest, wide = (
        dict(zip(STATISTICS, image_statistics.measure(_stripes(width)), strict=True)) for width in (1, 16)
    )
    assert finest["sharpness_1"] > wide["sharpness_1"] + 2
    assert wide["sharpness_4"] > finest["sharpness_4"] + 6
    assert wide["coarse_std"] > 4 > 1 > finest["coarse_std"]
    for first in range(16):
        found = dict(zip(STATISTICS, image_statistics.measure(_stripes(8, first)), strict=True))
        assert found["coherence"] > 0.95 and found["axis_share"] > 0.95


@pytest.mark.medium
def test_a_picture_turned_on_its_side_has_the_same_statistics(files):
    pixels = decode(files["unseen"][0], Preprocess(size=224)).pixels
    assert (
        image_statistics.measure(pixels.transpose(1, 0, 2)).tobytes()
        == image_statistics.measure(pixels).tobytes()
    )


@pytest.mark.parametrize("size", [32, 33, 63, 224, 1024])
def test_any_size_and_picture_has_finite_statistics(size):
    rng = np.random.default_rng(size)
    for picture in (
        np.zeros((size, size, 3)),
        np.full((size, size, 3), 255),
        rng.integers(0, 256, (size, size, 3)),
    ):
        found = image_statistics.measure(picture.astype(np.uint8))
        assert found.dtype == np.float32 and found.shape == (len(STATISTICS),)
        assert np.isfinite(found).all()


@pytest.mark.medium
def test_bulk_and_online_measure_the_same(files, tmp_path):
    spec = Preprocess(size=224)
    (tmp_path / "bad.jpg").write_bytes(b"no photograph")
    for index, data in enumerate(files["unseen"][:5]):
        (tmp_path / f"{index}.jpg").write_bytes(data)
    uris = [str(path) for path in sorted(tmp_path.iterdir())]
    rows = LoadImages(spec)({"uri": np.array(uris), "member": np.full(len(uris), "")})
    online = image_statistics.measure_all(
        np.stack([decode(data, spec).pixels for data in files["unseen"][:5]])
    )
    assert rows["statistics"][:5].tobytes() == online.tobytes()
    assert rows["error_code"][5] and not rows["statistics"][5].any()


# --- the bundle --------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_a_bundle_with_gates_comes_back_as_it_was_saved(gated, files):
    spec = gated.spec.preprocess
    train, val = (
        image_statistics.measure_all(np.stack([decode(data, spec).pixels for data in reversed(files[part])]))
        for part in ("train", "val")
    )
    assert gated.spec.gates == image_gates.fit_gates(train, val)  # whatever the order of the photographs
    luma = gated.spec.gates.profile["luma_mean"]
    assert luma.mean == pytest.approx(train[:, 0].mean(), abs=1e-6)
    assert luma.quantiles[3] == pytest.approx(np.median(train[:, 0]), abs=1e-6)


@pytest.mark.medium
def test_a_black_photograph_is_referred_and_scalps_of_unseen_microscopes_seldom_flagged(gated, files):
    spec = gated.spec.preprocess
    scalps = [decode(data, spec).pixels for data in files["unseen"]]
    black, *known = Predictor(gated, "cpu").grade(np.stack([np.zeros_like(scalps[0]), *scalps]))
    assert black.refer and {"too_dark", "unlike_training"} <= set(black.refer_reasons)
    assert black.unlikeness > max(answer.unlikeness for answer in known) > 0
    flags = {"blurred", "too_dark", "too_bright", "unlike_training"}
    assert np.mean([bool(flags & set(answer.refer_reasons)) for answer in known]) <= 0.1
    assert set(black.refer_reasons) <= set(REASONS)


@pytest.mark.medium
def test_a_sure_grade_of_something_else_is_referred_all_the_same(gated):
    sure = np.array([[0, 20, 0, 0]], np.float32)
    (answer,) = make_gradings(
        sure, image_statistics.measure_all(np.zeros((1, SMALL, SMALL, 3), np.uint8)), gated.spec
    )
    assert (answer.grade_set, answer.refer) == ([1], True)


@pytest.mark.medium
def test_a_bundle_from_before_gates_grades_and_says_that_it_has_none(bundle, gated, tmp_path):
    old = json.loads((bundle / "bundle.json").read_text())
    del old["gates"], old["spec_sha256"]
    spec = type(gated.spec).model_validate(old)
    (answer,) = make_gradings(np.array([[0, 20, 0, 0]], np.float32), np.zeros((1, len(STATISTICS))), spec)
    assert (answer.unlikeness, answer.refer) == (None, False)
    reached = {"val": {"n": 80, "qwk": 0.876, "top1": 0.75, "macro_f1": 0.7, "mae": 0.3}}
    cards = [render_model_card(each.model_copy(update={"metrics": reached})) for each in (spec, gated.spec)]
    assert "It has no gates" in cards[0]
    assert f"unlike the {gated.spec.gates.photographs} training images" in cards[1]
    predictor = Predictor(load_bundle(str(bundle)), "cpu", "fp32")
    has_gates = [ModelResponse.of(each, predictor, None).gates for each in (spec, gated.spec)]
    assert has_gates == [False, True]


@pytest.mark.medium
def test_gates_of_other_statistics_are_refused(gated, tmp_path):
    now = dict(gated.spec.gates)
    before = {
        name: value for name, value in now.items() if name != "statistics_version"
    }  # it was not recorded
    for values in (before, now | {"statistics_version": 1}):
        gates = image_gates.Gates.model_construct(**values)
        save_bundle(str(tmp_path), gated.spec.model_copy(update={"gates": gates}), {})
        with pytest.raises(UserError, match="gates of image statistics .* or train again"):
            load_bundle(str(tmp_path))


@pytest.mark.medium
def test_gates_must_name_the_statistics_that_are_measured(gated):
    profile = dict(gated.spec.gates.profile)
    profile["another"] = profile.pop("saturation")
    with pytest.raises(ValueError, match="other statistics than this version"):
        image_gates.Gates.model_validate(gated.spec.gates.model_dump() | {"profile": profile})


def test_every_reason_is_explained_on_the_page_and_in_the_docs():
    pages = [(ROOT / "serving" / "web" / f"{name}.js").read_text() for name in ("english", "korean")]
    docs = (ROOT / "docs" / "gates.md").read_text()
    for name in REASONS:
        assert all(f'"reason.{name}": ' in page for page in pages)
        assert f"`{name}`" in docs
    for name in STATISTICS:
        assert f"`{name}`" in docs
