"""Initial weights of a training: random, pretrained, or a file; checked tensor by tensor.

timm's loader ignores mismatched names if the head has another size, which is always the case here. So timm
only fetches the file and renames its tensors (`checkpoint_filter_fn`); this module loads them.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from scalp_core import storage
from scalp_core.bundles.bundle import read_file
from scalp_core.bundles.contract import WEIGHTS_FILE, Head, InitialWeights
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import SCHEME
from scalp_core.errors import UserError
from scalp_core.models.architecture import first_line, head_names, timm_model, with_head
from scalp_core.models.offline_weights import OFFLINE_ARCHITECTURE, read_offline_weights
from scalp_core.models.timm_import import timm

_builder, _hub = timm.models._builder, timm.models._hub

State = dict[str, torch.Tensor]
Filter = Callable[[State, nn.Module], State]

# Wrappers of the classifier in checkpoints of Lightning, DDP, torch.compile, DINO, MoCo and SimCLR.
_PREFIXES = ("_orig_mod.", "module.", "model.", "backbone.")
_SUFFIXES = (".safetensors", ".pth")
_HEAD_STD = 0.01
_SHOWN = 3  # names of tensors in an error


def initial_model(
    architecture: str,
    weights: str,
    seed: int,
    head: Head = "softmax",
    size: int | None = None,
    keywords: Mapping[str, Any] | None = None,
    symptoms: int = 1,
) -> tuple[nn.Module, InitialWeights]:
    """Build the model that training starts from, and describe the origin of its weights.

    Args:
        architecture: timm name.
        weights: `imagenet` (pretrained, from the address that timm names), `offline` (pretrained, from a pip
            package), `none` (random), a `.safetensors` or `.pth` file, or a bundle; local or `s3://`, or
            `models://NAME[@VERSION]`. Its head is kept if its shape fits, else replaced by a new one. Of a
            bundle with other symptoms, a model of one symptom keeps the head of `grade`.
        seed: Random seed of the weights.
        head: As in `build_model`.
        size: As in `build_model`.
        keywords: As in `build_model`.
        symptoms: As in `build_model`.

    Raises:
        UserError: the weights are unavailable or do not fit. Training starts from scratch only with `none`.
    """
    torch.manual_seed(seed)
    model, rename = _model_and_filter(architecture, head, size, keywords, symptoms)
    record = InitialWeights(source=weights, tensors=len(_weights_of(model.state_dict())))
    if weights == "imagenet":
        record = _load_pretrained(model, rename, record)
    elif weights == "offline":
        record = _load_offline(model, rename, record)
    elif weights != "none":
        record = _load_file(model, rename, record, symptoms)
    return with_head(model, head), record


def _model_and_filter(
    architecture: str, head: Head, size: int | None, keywords: Mapping[str, Any] | None, symptoms: int
) -> tuple[nn.Module, Filter]:
    """Build a random model, and find the function by which timm renames and resizes tensors for it."""
    filters: list[Filter | None] = []

    def keep_filter(*_: Any, filter_fn: Filter | None = None, **__: Any) -> None:
        filters.append(filter_fn)

    # timm passes the function only to its loader; this replacement fetches nothing.
    with _replaced_loader(keep_filter):
        model = timm_model(architecture, head, size, keywords, symptoms, pretrained=True)
    return model, (filters and filters[0]) or (lambda state, _: state)


@contextmanager
def _replaced_loader(loader: Callable[..., None]) -> Iterator[None]:
    original = _builder.load_pretrained
    _builder.load_pretrained = loader
    try:
        yield
    finally:
        _builder.load_pretrained = original


def _load_pretrained(model: nn.Module, rename: Filter, record: InitialWeights) -> InitialWeights:
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    architecture: str = config["architecture"]
    hub, url = config.get("hf_hub_id") or "", config.get("url") or ""
    tag = f"{architecture}.{config['tag']}" if config.get("tag") else architecture
    place = f"{constants.ENDPOINT}/{hub}" if hub else url
    if not place:
        raise UserError(_unavailable(record.source, architecture, "timm has none for it"))
    try:
        path = _hub_file(hub) if hub else _released_file(url)
        digest = _verified_sha256(path)
        state = timm.models.load_state_dict(path, device="cpu", weights_only=True)
    except Exception as error:
        raise UserError(_unavailable(record.source, architecture, f"{place}: {first_line(error)}")) from error
    # timm's files may contain more than the classifier, such as a decoder from pretraining.
    fit = _best_fit(model, rename, state)
    record = record.model_copy(update={"tag": tag, "url": place, "sha256": digest})
    return _load(model, fit, record, fit.missing, place)


def _hub_file(hub: str) -> str:
    """Fetch the weights of a repository of the Hugging Face hub into its cache, and return their path."""
    repository, revision = _hub.hf_split(hub)
    try:
        return hf_hub_download(repository, "model.safetensors", revision=revision)
    except EntryNotFoundError:
        return hf_hub_download(repository, "pytorch_model.bin", revision=revision)


def _released_file(url: str) -> str:
    """Fetch a file that is on no hub into timm's cache, and return its path."""
    if constants.HF_HUB_OFFLINE and not _hub.check_cached_file(url, check_hash=False):
        raise OSError("HF_HUB_OFFLINE is set, and the file is not in timm's cache")
    return _hub.download_cached_file(url)


def _verified_sha256(path: str) -> str:
    """Compute the SHA-256 of a downloaded file, and compare it with that in the file's name, if there is one.

    The hub's cache names a file by its SHA-256; the name of a release ends with the first digits.
    """
    file = Path(path).resolve()
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    named = re.fullmatch(r"([0-9a-f]{64})", file.name) or re.search(r"-([0-9a-f]{8,})\.", file.name)
    if named and not digest.startswith(named[1]):
        raise OSError(f"the SHA-256 of {path} is {digest}, not {named[1]}, so remove it")
    return digest


def _load_offline(model: nn.Module, rename: Filter, record: InitialWeights) -> InitialWeights:
    package = read_offline_weights(_architecture(model))
    fit = _best_fit(model, rename, package.state)
    record = record.model_copy(update={"url": package.url, "sha256": package.sha256})
    return _load(model, fit, record, fit.missing + fit.unexpected, package.url)


def _architecture(model: nn.Module) -> str:
    return model.pretrained_cfg["architecture"]  # type: ignore[index,return-value]


def _load_file(model: nn.Module, rename: Filter, record: InitialWeights, symptoms: int) -> InitialWeights:
    file, architecture = record.source, _architecture(model)
    suffix, in_file = Path(file).suffix, symptoms
    if suffix in _SUFFIXES:
        data = storage.read(storage.absolute(file))
    else:
        suffix, (data, in_file) = ".safetensors", _read_bundle(file)
    try:
        # timm reads from a path; it unpickles with weights_only.
        with tempfile.NamedTemporaryFile(suffix=suffix) as copy:
            copy.write(data)
            copy.flush()
            state = timm.models.load_state_dict(copy.name, device="cpu", weights_only=True)
    except Exception as error:
        raise UserError(_unavailable(file, architecture, first_line(error))) from error
    if symptoms == 1 < in_file:
        state = _keep_head_of_grade(state, model, in_file)
    fit = _best_fit(model, rename, state)
    record = record.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
    return _load(model, fit, record, fit.missing + fit.unexpected, f"--weights {file}")


def _keep_head_of_grade(state: State, model: nn.Module, symptoms: int) -> State:
    """Reduce the head of a model of several symptoms to the outputs of the first one."""
    heads = tuple(f"{head}." for head in head_names(model))
    return {
        name: value[: len(value) // symptoms] if name.startswith(heads) else value
        for name, value in state.items()
    }


def _read_bundle(address: str) -> tuple[bytes, int]:
    """Read the weights of a bundle, and the number of symptoms that it grades."""
    try:
        bundle = load_bundle(address)
    except UserError as error:
        if address.startswith(SCHEME) or error.__cause__:  # of the registry or of storage
            raise
        raise UserError(
            f"--weights {address}: give imagenet, offline, none, a .safetensors or .pth file, or a bundle"
        ) from None
    weights = read_file(str(bundle.uri), WEIGHTS_FILE, bundle.spec.weights_sha256)
    return weights, bundle.spec.symptoms


@dataclass(frozen=True)
class _Fit:
    """Tensors of a file compared with those of the model.

    Args:
        taken: Tensors with the name and shape of one in the model.
        missing: Weights of the model that the file lacks, without those of the head.
        unexpected: Weights of the file that the model lacks or has in another shape, without the head's.
    """

    taken: State
    missing: list[str]
    unexpected: list[str]


def _best_fit(model: nn.Module, rename: Filter, state: Any) -> _Fit:
    """Compare the file's tensors under every stack of prefixes, and return the best match."""
    tensors = {
        name: value for name, value in dict(state).items() if isinstance(value, torch.Tensor)
    }  # checkpoints may hold counters too
    fits = [_fit(model, rename, candidate) for candidate in _without_prefixes(tensors)]
    return max(fits, key=lambda fit: len(fit.taken))


def _without_prefixes(state: State) -> Iterator[State]:
    """Yield the tensors under their names, then repeatedly with one prefix removed."""
    yield state
    first_parts = {name.partition(".")[0] + "." for name in state}
    shared = tuple(first_parts) if len(first_parts) == 1 else ()
    for prefix in dict.fromkeys((*_PREFIXES, *shared)):
        shorter = {name.removeprefix(prefix): value for name, value in state.items()}
        if shorter.keys() != state.keys() and len(shorter) == len(state) and "" not in shorter:
            yield from _without_prefixes(shorter)
            return


def _fit(model: nn.Module, rename: Filter, state: State) -> _Fit:
    try:
        state = dict(rename(dict(state), model))
    except Exception:  # the function expects names of its architecture; this file has others
        state = dict(state)
    heads = head_names(model)
    for head in heads:  # a bundle with the head `corn` has its layer one level below
        if not isinstance(model.get_submodule(head), nn.Sequential):
            state = {_replace_prefix(name, f"{head}.0.", f"{head}."): value for name, value in state.items()}
    of_model = model.state_dict()
    taken = {
        name: value
        for name, value in state.items()
        if name in of_model and of_model[name].shape == value.shape
    }
    of_heads = tuple(f"{head}." for head in heads)
    return _Fit(
        taken,
        [name for name in _weights_of(of_model) if name not in taken and not name.startswith(of_heads)],
        [name for name in _weights_of(state) if name not in taken and not name.startswith(of_heads)],
    )


def _replace_prefix(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _weights_of(state: State) -> list[str]:
    """Names of the weights, without integer tensors (counters, index tables), which models create."""
    return [name for name, value in state.items() if value.is_floating_point()]


def _load(
    model: nn.Module, fit: _Fit, record: InitialWeights, mismatches: list[str], place: str
) -> InitialWeights:
    taken = len(_weights_of(fit.taken))
    if mismatches:
        architecture = _architecture(model)
        by_kind = {
            "missing": fit.missing,
            "unexpected": [name for name in fit.unexpected if name in mismatches],
        }
        problems = "; ".join(f"{kind}: {_names(names)}" for kind, names in by_kind.items() if names)
        raise UserError(
            f"{place} does not fit {architecture}: {taken} of {record.tensors} tensors fit, {problems}; give "
            f"weights of {architecture} by timm's names, set the file's architecture, or use --weights none"
        )
    of_heads = tuple(f"{head}." for head in head_names(model))
    heads = [name for name in _weights_of(model.state_dict()) if name.startswith(of_heads)]
    kept = bool(heads) and all(name in fit.taken for name in heads)
    if not kept:
        _draw_small_head(model)
    state = fit.taken if kept else {name: fit.taken[name] for name in fit.taken if name not in heads}
    model.load_state_dict(state, strict=False)
    return record.model_copy(update={"taken": len(_weights_of(state)), "head_kept": kept})


def _draw_small_head(model: nn.Module) -> None:
    """Draw new heads with small weights; with some of timm's own, the first loss is 5 instead of 1.4."""
    for head in head_names(model):
        for parameter in model.get_submodule(head).parameters():
            nn.init.normal_(parameter, std=_HEAD_STD)


def _names(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _unavailable(weights: str, architecture: str, reason: str) -> str:
    return (
        f"cannot get {weights} weights for {architecture} ({reason}); four ways: --weights FILE (a local "
        ".safetensors or .pth), --weights s3://BUCKET/FILE, --weights offline with --set "
        f"architecture={OFFLINE_ARCHITECTURE}, or --weights none to train from scratch"
    )
