import hashlib

import pytest
import safetensors.torch
import timm
import torch

from jobs.train.initial_state import InitialState, load_initial_state, save_initial_state
from jobs.tune.driver import _Inputs
from scalp_core import storage
from scalp_core.bundles.bundle import serialize_weights
from scalp_core.bundles.contract import WEIGHTS_FILE, InitialWeights
from scalp_core.bundles.registry import ENVIRONMENT, Registry
from scalp_core.errors import UserError
from scalp_core.images.preprocess import Preprocess
from scalp_core.models import initial_weights
from scalp_core.models.architecture import build_model
from scalp_core.models.initial_weights import initial_model
from scalp_core.models.recipe import DEFAULT_ARCHITECTURE, Recipe

SMALL = "test_resnet"


@pytest.fixture(scope="module")
def imagenet_like():
    """Weights for a thousand classes, as on the hub."""
    torch.manual_seed(1)
    return timm.create_model(SMALL, num_classes=1000).state_dict()


@pytest.fixture
def file(tmp_path):
    def write(state):
        (tmp_path / "weights.safetensors").write_bytes(serialize_weights(state))
        return str(tmp_path / "weights.safetensors")

    return write


def same_body(model, state):
    own = model.state_dict()
    return all(torch.equal(own[name], state[name]) for name in own if not name.startswith("fc."))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_are_taken_and_the_head_is_new(imagenet_like, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    save = torch.save if suffix == ".pth" else safetensors.torch.save_file
    save(imagenet_like, path)
    model, record = initial_model(SMALL, str(path), seed=0)
    assert model.get_classifier().out_features == 4
    assert same_body(model, imagenet_like)
    assert (record.source, record.head_kept, record.tensors - record.taken) == (str(path), False, 2)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_in_object_storage_are_taken(imagenet_like, s3):
    uri = "s3://scalp/weights/resnet.safetensors"
    storage.write(uri, serialize_weights(imagenet_like))
    assert same_body(initial_model(SMALL, uri, seed=0)[0], imagenet_like)


@pytest.mark.parametrize("prefix", ["backbone.", "module.", "model.", "model.backbone.", "encoder.net."])
def test_prefixes_of_other_trainers_are_removed(imagenet_like, file, prefix):
    path = file({prefix + name: value for name, value in imagenet_like.items()})
    assert same_body(initial_model(SMALL, path, seed=0)[0], imagenet_like)


def test_prefix_of_all_but_the_head_is_removed(imagenet_like, file):
    body = {f"model.backbone.{name}": value for name, value in imagenet_like.items() if "fc." not in name}
    head = {f"model.{name}": value for name, value in imagenet_like.items() if "fc." in name}
    assert same_body(initial_model(SMALL, file(body | head), seed=0)[0], imagenet_like)


def test_weights_at_another_size_are_resized_as_timm_does(file):
    vit = timm.create_model("test_vit", num_classes=1000)
    model, record = initial_model("test_vit", file(vit.state_dict()), seed=0, size=96)
    assert model.pos_embed.shape != vit.pos_embed.shape
    assert record.tensors - record.taken == 2
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 4)


@pytest.mark.promise("README: weights that do not fit are refused")
@pytest.mark.parametrize(
    ("state", "fit"),
    [
        (lambda: timm.create_model("test_convnext").state_dict(), "0 of"),
        (lambda: {"nothing": torch.zeros(1)}, "0 of"),
        (lambda: dict(list(build_model(SMALL).state_dict().items())[::2]), "of"),
        (lambda: build_model(SMALL).state_dict() | {"layer9.weight": torch.zeros(1)}, "layer9.weight"),
    ],
    ids=["another architecture", "one unrelated tensor", "every other tensor", "one tensor too many"],
)
def test_a_file_that_does_not_fit_is_refused(file, state, fit):
    path = file(state())
    with pytest.raises(UserError, match=r"not fit test_resnet: \d+ of \d+ tensors fit.*--weights none") as e:
        initial_model(SMALL, path, seed=0)
    assert path in str(e.value)
    assert fit in str(e.value)


@pytest.mark.parametrize("head", ["softmax", "corn"])
def test_the_head_of_an_earlier_bundle_is_kept(file, head):
    earlier = build_model(SMALL, head).state_dict()
    model, record = initial_model(SMALL, file(earlier), seed=9, head=head)
    assert record.head_kept
    assert record.taken == record.tensors
    for name, value in earlier.items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.medium
@pytest.mark.parametrize("head", ["softmax", "corn"])
def test_a_model_of_one_symptom_keeps_the_head_of_grade_of_a_bundle_of_six(make_bundle, tmp_path, head):
    folder = str(make_bundle(tmp_path / "bundle", head=head, symptoms=6))
    six, whole = initial_model(SMALL, folder, seed=0, head=head, symptoms=6)
    one, record = initial_model(SMALL, folder, seed=0, head=head)
    assert whole.head_kept and record.head_kept
    images = torch.randn(2, 3, 64, 64)
    assert torch.allclose(one.eval()(images), six.eval()(images)[:, :4], rtol=1e-4, atol=1e-4)


def test_a_head_of_another_loss_is_replaced(file):
    corn = build_model(SMALL, "corn").state_dict()
    model, record = initial_model(SMALL, file(corn), seed=0)
    assert not record.head_kept
    assert model.fc.out_features == 4
    assert same_body(model, corn)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="four ways"):
        initial_model(SMALL, str(tmp_path / "evil.pth"), seed=0)


@pytest.mark.medium
def test_pretrained_weights_are_recorded_with_tag_address_and_hash(monkeypatch, tmp_path):
    state = timm.create_model(DEFAULT_ARCHITECTURE, num_classes=1000).state_dict()
    path = tmp_path / "xception.pth"
    torch.save(state, path)
    monkeypatch.setattr(initial_weights._hub, "download_cached_file", lambda *_, **__: str(path))
    model, record = initial_model(DEFAULT_ARCHITECTURE, "imagenet", seed=0)
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert record.tag == "legacy_xception.tf_in1k"
    assert record.url.endswith("/xception-43020ad28.pth")
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"{record.taken} of {record.tensors} tensors, a new head" in str(record)


@pytest.mark.parametrize(
    ("architecture", "module", "fetch", "address"),
    [
        (DEFAULT_ARCHITECTURE, initial_weights._hub, "download_cached_file", "https://github.com/"),
        (SMALL, initial_weights, "hf_hub_download", "https://huggingface.co/timm/test_resnet"),
    ],
)
def test_unreachable_address_is_reported_with_alternatives(monkeypatch, architecture, module, fetch, address):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(module, fetch, unreachable)
    with pytest.raises(
        UserError, match=rf"{address}.*no route.*--weights FILE.*s3://.*offline.*weights none"
    ):
        initial_model(architecture, "imagenet", seed=0)


def test_a_missing_file_and_an_unknown_architecture_are_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        initial_model(SMALL, str(tmp_path / "none.safetensors"), seed=0)
    with pytest.raises(UserError, match="no architecture 'xceptoin'"):
        build_model("xceptoin")
    with pytest.raises(UserError, match=r"tagged 'mine'.* legacy_xception\.tf_in1k"):
        build_model("legacy_xception.mine")


@pytest.mark.medium
def test_deprecated_timm_name_is_resolved():
    assert (
        build_model("xception", size=64).state_dict().keys()
        == build_model(DEFAULT_ARCHITECTURE).state_dict().keys()
    )


def test_random_weights_depend_on_the_seed():
    first, second, third = (initial_model(SMALL, "none", seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.equal(first.fc.weight, third.fc.weight)


def test_resumed_run_loads_its_saved_initial_state(tmp_path):
    record = InitialWeights(source="imagenet", tensors=9, taken=7, url="https://example.org/w.pth")
    start = InitialState(b"weights", record, Preprocess(size=64), True, ["has no heatmaps"])
    assert load_initial_state(str(tmp_path)) is None
    save_initial_state(str(tmp_path), start)
    assert load_initial_state(str(tmp_path)) == start
    (tmp_path / "initial.safetensors").write_bytes(b"damaged")
    assert load_initial_state(str(tmp_path)) is None


def test_resumed_search_loads_its_saved_initial_states(tmp_path, monkeypatch):
    start = InitialState(b"weights", InitialWeights(source="imagenet"), Preprocess(size=64), True, [])
    recipe = Recipe(architecture="test_resnet", size=64)
    inputs = _Inputs(str(tmp_path), {}, [recipe], None, None, at_once=1)
    save_initial_state(inputs.initial_folder(recipe), start)
    monkeypatch.setattr("jobs.train.initial_state.make_initial_state", lambda _: pytest.fail("fetched again"))
    assert inputs.initial_state(recipe) == inputs.initial_state(recipe.model_copy()) == start


def test_a_bundle_gives_its_weights_and_its_head(make_bundle, tmp_path, monkeypatch):
    folder = make_bundle(tmp_path / "bundle")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "registry"))
    Registry(str(tmp_path / "registry")).add(str(folder), "scalp")
    state = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    for address in (str(folder), "models://scalp@1"):
        model, record = initial_model(SMALL, address, seed=0)
        own = model.state_dict()
        assert all(torch.equal(own[name], state[name]) for name in own)
        assert (record.source, record.head_kept, record.taken) == (address, True, record.tensors)
    with pytest.raises(UserError, match=r"has no such version of scalp; did you mean scalp@1\?"):
        initial_model(SMALL, "models://scalp@2", seed=0)
