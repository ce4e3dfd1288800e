"""`scalp export`: export the OpenVINO model for other programs, checked against the bundle on images."""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np

from jobs.common.console import SUMMARY_FILE, now, progress_bar, show, write_json
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle, Graph, GraphKind, graph_files
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import locations as datasets_locations
from scalp_core.errors import ImageError, UserError
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.images.preprocess import decode
from scalp_core.inference.openvino_runtime import OpenVinoRuntime, load_graph
from scalp_core.inference.predictor import Predictor
from scalp_core.storage import outputs

KIND = "export"
_CONTRACT_FILE = "contract.json"
_MAX_DIFFERENCE = 1e-3
_CHUNK_SIZE = 32


def export(
    bundle: str,
    photographs: str,
    out: str,
    kind: GraphKind = "float",
    format_: Literal["openvino"] = "openvino",
) -> dict[str, Any]:
    """Export the OpenVINO graph with its contract, and compare the exported files with the bundle on images.

    Args:
        bundle: Directory of the bundle, local or `s3://`.
        photographs: Folder, `.zip` or prefix of images for the comparison.
        out: Output directory for the model's two files, `contract.json` and `summary.json`, local or `s3://`.
        kind: float, which runs in bf16 or fp32, or int8.
        format_: Format of the model.

    Returns:
        The summary.

    Raises:
        UserError: There are no images for the comparison, the float graph differs from the weights, or `out`
            overlaps with the images, holds other files, or is in use.
    """
    out = storage.absolute(out)
    outputs.check_output(out, KIND, [photographs])
    loaded = load_bundle(bundle)
    files = graph_files(kind, load_graph(loaded, kind))
    with outputs.open_output(out, KIND, [photographs]):
        summary = _write(loaded, files, kind, format_, photographs, out)
    show("export", summary | {"files": ", ".join([*files, _CONTRACT_FILE]), "folder": out})
    return summary


def _write(
    loaded: Bundle, files: dict[str, bytes], kind: GraphKind, format_: str, photographs: str, out: str
) -> dict[str, Any]:
    """Write the files, compare them with the bundle, and write the summary."""
    for name, data in files.items():
        storage.write(storage.join(out, name), data)
    storage.write(storage.join(out, _CONTRACT_FILE), _contract(loaded, kind).encode())
    written = Graph(*(storage.read(storage.join(out, name)) for name in files))
    exported, reference = _compute_logits(loaded, written, kind, photographs)
    difference = float(np.abs(exported - reference).max())
    summary = {
        "kind": "export",
        "date": now(),
        "model_version": loaded.spec.version_in(kind),
        "format": format_,
        "photographs": len(exported),
        "max_logit_difference": difference,
        "grade_agreement": float(np.mean(exported.argmax(axis=1) == reference.argmax(axis=1))),
    }
    if not (difference < _MAX_DIFFERENCE or (kind == "int8" and np.isfinite(difference))):
        raise UserError(
            f"{out}: logits differ by {difference} from those of the bundle's weights; do not use this export"
        )
    write_json(storage.join(out, SUMMARY_FILE), summary)
    return summary


def _contract(bundle: Bundle, kind: GraphKind) -> str:
    spec = bundle.spec
    size = spec.preprocess.size
    content = {
        "model_version": spec.version_in(kind),
        "input": f"uint8 (N, {size}, {size}, 3): RGB, upright, resized as `preprocess` says, not normalized",
        "output": "float32 (N, 4) logits; probabilities are softmax(logits / temperature)",
        **spec.model_dump(
            mode="json",
            include={"grade_names", "preprocess", "temperature", "conformal", "referral", "weights_sha256"},
        ),
        "intended_use": "Research and screening support. Not a diagnosis.",
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _compute_logits(
    bundle: Bundle, graph: Graph, kind: GraphKind, source: str
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the logits of the graph and of the weights for all images that can be decoded."""
    locations = datasets_locations.list_images(source).images
    runtime = OpenVinoRuntime(graph, "int8" if kind == "int8" else "fp32")
    weights = Predictor(bundle, "cpu", "fp32", runtime="torch")
    pairs = []
    with progress_bar("comparing", len(locations)) as (progress, task):
        for start in range(0, len(locations), _CHUNK_SIZE):
            chunk = list(datasets_locations.read_images(locations[start : start + _CHUNK_SIZE], MAX_BYTES))
            images = [image for data in chunk if (image := _decode(data, bundle)) is not None]
            if images:
                pairs.append((runtime.logits(np.stack(images)), weights.logits(np.stack(images))))
            progress.update(task, advance=len(chunk))
    if not pairs:
        raise UserError(f"no image of {source} can be decoded; give images for the comparison")
    exported, reference = (np.concatenate(logits) for logits in zip(*pairs, strict=True))
    return exported, reference


def _decode(data: bytes | ImageError, bundle: Bundle) -> np.ndarray | None:
    try:
        return None if isinstance(data, ImageError) else decode(data, bundle.spec.preprocess).pixels
    except ImageError:
        return None
