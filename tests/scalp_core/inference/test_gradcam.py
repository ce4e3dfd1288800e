import io
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from PIL import Image

from scalp_core.bundles.bundle import Bundle, serialize_weights, sha256
from scalp_core.bundles.contract import WEIGHTS_FILE, BundleSpec, Conformal, InitialWeights, Training
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.images.preprocess import decode
from scalp_core.inference.explainer import make_explainer
from scalp_core.inference.heatmaps import Explainer
from scalp_core.inference.overlay import heat_colors, overlay, png
from scalp_core.models.architecture import build_model, normalize, preprocess_for
from tests.support.images import jpeg
from tests.support.sizes import SMALL

_TOY, _PATCH = 160, 64  # pixels; a cell of the map is 32


def bundle_of(model: torch.nn.Module, architecture: str, size: int) -> Bundle:
    """A bundle in memory."""
    weights = serialize_weights(model.state_dict())
    training = Training(
        recipe={},
        initial_weights=InitialWeights(source="none"),
        workers=1,
        best_epoch=1,
        data_sha256="",
        grade_counts=[1] * 4,
    )
    spec = BundleSpec(
        name="toy",
        created_at=datetime.now(UTC),
        architecture=architecture,
        preprocess=preprocess_for(model, size),
        temperature=1.0,
        conformal=Conformal(coverage=0.9, quantile=0.8),
        training=training,
        metrics={},
        versions={},
        git_revision=None,
        weights_sha256=sha256(weights),
    )
    return Bundle(spec, files={WEIGHTS_FILE: weights})


def random_bundle(architecture: str, size: int, seed: int = 0) -> Bundle:
    torch.manual_seed(seed)
    return bundle_of(build_model(architecture), architecture, size)


def with_state(bundle: Bundle, state: dict[str, torch.Tensor]) -> Bundle:
    """The bundle with other weights, and no graph of the former ones."""
    weights = serialize_weights(state)
    spec = bundle.spec.model_copy(update={"weights_sha256": sha256(weights), "graphs": {}})
    return Bundle(spec, files={WEIGHTS_FILE: weights})


def photographs(count: int, size: int) -> np.ndarray:
    spec = preprocess_for(build_model("test_resnet"), size)
    return np.stack([decode(jpeg(seed), spec).pixels for seed in range(count)])


def with_patch(place: tuple[int, int] | None, seed: int) -> np.ndarray:
    """Noise with a bright patch whose corner is at `place`."""
    image = np.random.default_rng(seed).integers(60, 140, (_TOY, _TOY, 3)).astype(np.uint8)
    if place is not None:
        image[place[0] : place[0] + _PATCH, place[1] : place[1] + _PATCH] = 250
    return image


@pytest.fixture(scope="module")
def patch_bundle() -> Bundle:
    """A model trained for seconds: grade 3 with a bright patch, grade 0 without."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = build_model("test_resnet")
    spec = preprocess_for(model, _TOY)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(20):
        places = [tuple(rng.integers(0, _TOY - _PATCH, 2)) if index % 2 else None for index in range(8)]
        images = np.stack([with_patch(place, 1000 * step + index) for index, place in enumerate(places)])
        labels = torch.tensor([0 if place is None else 3 for place in places])
        loss = torch.nn.functional.cross_entropy(model(normalize(torch.from_numpy(images), spec)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1  # it learned it, or its heatmaps mean nothing
    return bundle_of(model, "test_resnet", _TOY)


@pytest.fixture(scope="module")
def patch_finder(patch_bundle) -> Explainer:
    return make_explainer(patch_bundle, "cpu")


@pytest.mark.medium
@pytest.mark.parametrize("place", [(0, 0), (0, 96), (96, 0), (96, 96), (30, 60), (60, 30)])
def test_the_heat_is_where_what_drives_the_grade_is(patch_finder, place):
    heat = patch_finder.heatmap(with_patch(place, seed=7), grade=3)
    peak = np.unravel_index(heat.argmax(), heat.shape)
    for found, corner in zip(peak, place, strict=True):
        assert corner <= found < corner + _PATCH
    inside = heat[place[0] : place[0] + _PATCH, place[1] : place[1] + _PATCH].mean()
    assert inside > 3 * heat.mean()


@pytest.mark.medium
def test_each_grade_has_a_heatmap_of_its_own_and_the_likeliest_is_the_default(patch_finder):
    image = with_patch((32, 64), seed=7)
    np.testing.assert_allclose(patch_finder.heatmap(image), patch_finder.heatmap(image, 3), atol=1e-5)
    assert np.abs(patch_finder.heatmap(image, 0) - patch_finder.heatmap(image, 3)).max() > 0.5
    plain = with_patch(None, seed=7)
    np.testing.assert_allclose(patch_finder.heatmap(plain), patch_finder.heatmap(plain, 0), atol=1e-5)


@pytest.mark.medium
def test_shuffled_weights_give_other_heatmaps(patch_bundle, patch_finder):
    """The sanity check of Adebayo et al.: a map that outlives the weights shows edges, not the model."""
    places = [(19 * number, 95 - 19 * number) for number in range(6)]
    images = np.stack([with_patch(place, seed) for seed, place in enumerate(places)])

    def found(explainer: Explainer) -> float:
        """Share of images whose maximum heat is inside the patch."""
        hits = []
        for heat, place in zip(explainer.heatmaps(images, [3] * len(images)), places, strict=True):
            peak = np.unravel_index(heat.argmax(), heat.shape)
            hits.append(all(edge <= at < edge + _PATCH for at, edge in zip(peak, place, strict=True)))
        return float(np.mean(hits))

    assert found(patch_finder) == 1
    torch.manual_seed(0)
    after = []
    for _ in range(8):  # one shuffle may find the patch by chance: it is what is bright
        shuffled = {
            name: value.flatten()[torch.randperm(value.numel())].reshape(value.shape)
            for name, value in patch_bundle.state.items()
        }
        after.append(found(make_explainer(with_state(patch_bundle, shuffled), "cpu")))
    assert np.mean(after) < 0.7


@pytest.mark.medium
@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("legacy_xception", 96),
        pytest.param("xception41p", 64, marks=pytest.mark.slow),
        ("resnet18", 64),
        ("efficientnet_b0", 96),
        ("convnext_atto", 64),
        pytest.param("densenet121", 64, marks=pytest.mark.slow),
        ("mobilenetv3_small_050", 96),
    ],
)
def test_convolutional_architectures_have_heatmaps(architecture, size):
    explainer = make_explainer(random_bundle(architecture, size), "cpu")
    images = photographs(3, size)
    assert explainer.cells == (size // 32, size // 32)
    by_grade = [explainer.heatmaps(images, [grade] * 3) for grade in range(4)]
    for heat in by_grade:
        assert heat.shape == (3, size, size)
        assert heat.dtype == np.float32
        assert heat.min() >= 0
        peaks = heat.max(axis=(1, 2))
        assert set(np.round(peaks, 5)) <= {0, 1}  # each scaled to its own peak, NaN nowhere
    assert np.any(by_grade)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("architecture", "size", "reason"),
    [
        ("vit_tiny_patch16_224", 224, "no convolutional feature map"),
        ("mixer_s32_224", 224, "no convolutional feature map"),
        ("swin_tiny_patch4_window7_224", 224, "no convolutional feature map"),
        ("resnet18", 32, "at 32 px has a feature map of one cell"),
    ],
)
def test_what_has_no_map_of_the_picture_is_refused_with_the_reason(architecture, size, reason):
    with pytest.raises(UserError, match=reason) as refusal:
        make_explainer(random_bundle(architecture, size), "cpu")
    assert architecture in str(refusal.value)


def test_a_heatmap_is_the_same_each_time_and_in_any_batch(bundle):
    explainer, images = make_explainer(load_bundle(str(bundle)), "cpu"), photographs(10, SMALL)
    grades = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    together = explainer.heatmaps(images, grades)
    np.testing.assert_array_equal(together, explainer.heatmaps(images, grades))
    alone = [explainer.heatmap(image, grade) for image, grade in zip(images, grades, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-3)
    assert explainer.heatmaps(images[:0]).shape == (0, SMALL, SMALL)


def test_where_nothing_speaks_for_the_grade_there_is_no_heat(bundle):
    loaded = load_bundle(str(bundle))
    state = {
        name: torch.zeros_like(value) if name.startswith("fc.") else value
        for name, value in loaded.state.items()
    }
    heat = make_explainer(with_state(loaded, state), "cpu").heatmaps(photographs(2, SMALL), [1, 2])
    np.testing.assert_array_equal(heat, 0)


@pytest.mark.medium
def test_a_grade_that_there_is_not_is_refused(patch_finder):
    for grade in (-1, 4):
        with pytest.raises(UserError, match=f"grade {grade} does not exist"):
            patch_finder.heatmap(with_patch(None, 0), grade)


def test_the_photograph_stays_where_there_is_no_heat_and_takes_its_color_where_there_is():
    image = photographs(1, SMALL)[0]
    heat = np.zeros((SMALL, SMALL), np.float32)
    np.testing.assert_array_equal(overlay(image, heat), image)
    heat[10:20, 10:20] = 1
    shown = overlay(image, heat)
    np.testing.assert_array_equal(shown[30:], image[30:])
    half = (image[10:20, 10:20].astype(float) + heat_colors()[255]) / 2
    assert np.abs(shown[10:20, 10:20] - half).max() <= 1
    assert (overlay(image, heat, opacity=1.0)[10:20, 10:20] == heat_colors()[255]).all()


def test_a_png_holds_the_pixels_and_no_metadata():
    image = photographs(1, SMALL)[0]
    with Image.open(io.BytesIO(png(image))) as read:
        np.testing.assert_array_equal(np.asarray(read), image)
        assert (read.format, read.info) == ("PNG", {})
