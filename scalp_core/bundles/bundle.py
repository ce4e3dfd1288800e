"""The bundle: a trained classifier as a directory, local or in S3, with all that inference needs.

    model.safetensors   weights; GPUs run them
    model.xml, .bin     the same model as an OpenVINO graph; CPUs run it
    model-int8.xml, …   the graph in int8, after `scalp quantize` has made and measured it
    bundle.json         the contract `BundleSpec`, with the sha256 of every file and of itself
    MODEL_CARD.md       intended use, metrics and training data
    ml-bom.cdx.json     bill of materials, made from the contract whenever that is written
    *.png               plots of training and evaluation

Loading checks the schema version and the hash of each file that is used. It never unpickles.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from scalp_core import storage
from scalp_core.bundles.contract import (
    GRAPH_FILES,
    READ_VERSIONS,
    WEIGHTS_FILE,
    BundleSpec,
    GraphKind,
    hash_contract,
)
from scalp_core.errors import UserError
from scalp_core.images.statistics import STATISTICS_VERSION

if TYPE_CHECKING:
    import torch  # takes seconds to import: at run time only where weights are read or written

SPEC_FILE = "bundle.json"
CARD_FILE = "MODEL_CARD.md"
BOM_FILE = "ml-bom.cdx.json"
INITIAL_FILE = "initial.safetensors"
"""Initial weights of the training, in the run directory next to the bundle."""

Part = Literal["weights", "float", "int8"]
"""The part of a bundle that a runtime executes: weights for PyTorch, a graph for OpenVINO."""


@dataclass(frozen=True)
class Graph:
    """An OpenVINO graph as IR. Input uint8 (N, size, size, 3), output float32 (N, 4 S), of S symptoms."""

    xml: bytes
    weights: bytes


class Bundle:
    """A loaded bundle: the contract, and files that are read and verified at their first use.

    A pickled bundle contains only the files read so far: call `fetch` before sending it to another process.

    Args:
        spec: Contract of the bundle.
        uri: Directory of the bundle; None if `files` holds every file that will be used.
        files: Contents of files by name; files that are read are added.
    """

    def __init__(
        self, spec: BundleSpec, uri: str | None = None, files: dict[str, bytes] | None = None
    ) -> None:
        self.spec = spec
        self.uri = uri
        self.files = dict(files or {})

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Weights by name, for `nn.Module.load_state_dict`."""
        return load_weights(self._read(WEIGHTS_FILE, self.spec.weights_sha256))

    def graph(self, kind: GraphKind) -> Graph:
        """Read the stored OpenVINO graph; older bundles have no float graph (`openvino_runtime.load_graph`).

        Raises:
            UserError: The bundle has no int8 graph that passed its comparison.
        """
        if kind == "int8" and not self.spec.offers("int8"):
            raise UserError(
                f"--precision int8: the bundle {self.spec.name} has no int8 graph; make and measure it with "
                "scalp quantize BUNDLE DATA, or use --precision auto"
            )
        record = self.spec.graphs[kind]
        xml, weights = GRAPH_FILES[kind]
        return Graph(self._read(xml, record.xml_sha256), self._read(weights, record.weights_sha256))

    def fetch(self, part: Part) -> Bundle:
        """Read and verify the files that a runtime needs, and return the bundle.

        Raises:
            UserError: A file is missing, damaged or changed, or as in `graph`.
        """
        if part == "weights" or (part == "float" and part not in self.spec.graphs):
            self._read(WEIGHTS_FILE, self.spec.weights_sha256)
        else:
            self.graph(part)
        return self

    def _read(self, name: str, expected: str) -> bytes:
        if name not in self.files:
            if self.uri is None:
                raise RuntimeError(f"{name} was not fetched")
            self.files[name] = read_file(self.uri, name, expected)
        return self.files[name]


def serialize_weights(state: dict[str, torch.Tensor]) -> bytes:
    """Serialize weights as safetensors, contiguous and on the CPU."""
    import safetensors.torch
    import torch

    # Cloned: safetensors refuses layers that share a tensor, as CoaT's do.
    contiguous = torch.contiguous_format
    return safetensors.torch.save(
        {name: value.detach().cpu().clone(memory_format=contiguous) for name, value in state.items()}
    )


def load_weights(data: bytes) -> dict[str, torch.Tensor]:
    """Deserialize the output of `serialize_weights`."""
    import safetensors.torch

    return safetensors.torch.load(data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def graph_files(kind: GraphKind, graph: Graph) -> dict[str, bytes]:
    """Return the files of a graph, by their names in a bundle."""
    return dict(zip(GRAPH_FILES[kind], (graph.xml, graph.weights), strict=True))


def save_bundle(uri: str, spec: BundleSpec, files: dict[str, bytes]) -> None:
    """Write a bundle or add files to it; `bundle.json` is written last, so its presence means complete."""
    for name, data in (files | {BOM_FILE: serialize_bom(spec)}).items():
        storage.write(storage.join(uri, name), data)
    storage.write(storage.join(uri, SPEC_FILE), serialize_spec(spec))


def serialize_bom(spec: BundleSpec) -> bytes:
    """Serialize the bill of materials of a contract, which has the hashes of the files and of the contract.

    The contract has no hash of the bill, which would be circular. So nothing reads the bill to load a bundle.
    """
    from scalp_core.bundles.ml_bom import make_ml_bom  # imports Jinja

    return json.dumps(make_ml_bom(spec), indent=2, ensure_ascii=False).encode()


def serialize_spec(spec: BundleSpec) -> bytes:
    """Serialize a contract as the content of `bundle.json`."""
    content = spec.model_dump(mode="json")
    text = json.dumps({**content, "spec_sha256": hash_contract(content)}, indent=2, ensure_ascii=False)
    return text.encode()


def read_file(uri: str, name: str, expected: str) -> bytes:
    """Read one file of the bundle at `uri`, and verify its sha256.

    Raises:
        UserError: The file is missing, damaged or changed.
    """
    data = storage.read(storage.join(uri, name))
    if sha256(data) != expected:
        raise _damaged(uri, name, "does not match its sha256")
    return data


def open_bundle(uri: str) -> Bundle:
    """Open a bundle, or a run directory that holds one; large files are read at their first use.

    Raises:
        UserError: The bundle is missing, damaged, changed, or has an unsupported schema version.
    """
    uri = storage.absolute(uri)
    if not storage.exists(storage.join(uri, SPEC_FILE)) and storage.exists(
        storage.join(uri, "bundle", SPEC_FILE)
    ):
        uri = storage.join(uri, "bundle")
    if not storage.exists(storage.join(uri, SPEC_FILE)):
        raise UserError(
            f"{uri} is not a bundle: it has no {SPEC_FILE}; give a directory that `scalp train` wrote"
        )
    return Bundle(read_spec(uri), uri)


def read_spec(uri: str) -> BundleSpec:
    """Read and verify the contract of the bundle at `uri`.

    Raises:
        UserError: As in `open_bundle`.
    """
    content, _ = _read_contract(uri)
    version = content["schema_version"]
    if version not in READ_VERSIONS:
        raise UserError(
            f"{uri} has bundle schema {version}, this scalp reads {' and '.join(map(str, READ_VERSIONS))}; "
            "use the scalp version that wrote it, or train again"
        )
    gates = content.get("gates")
    if gates and gates.get("statistics_version", 1) != STATISTICS_VERSION:
        raise UserError(
            f"{uri} has gates of image statistics that this scalp does not measure; "
            "use the scalp version that wrote it, or train again"
        )
    try:
        return BundleSpec.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(uri, SPEC_FILE, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_fingerprint(uri: str) -> str:
    """Read the hash of the contract of the bundle at `uri`, as it was written.

    `BundleSpec.fingerprint` is equal in the version of scalp that wrote it. A later one, whose contract has
    more fields, computes another.

    Raises:
        UserError: The contract cannot be read, or was changed.
    """
    _, recorded = _read_contract(uri)
    return recorded


def _read_contract(uri: str) -> tuple[dict[str, Any], str]:
    """Read the content of a contract, and its verified hash."""
    try:
        content = json.loads(storage.read(storage.join(uri, SPEC_FILE)))
        recorded = content.pop("spec_sha256")
        content["schema_version"]
    except (ValueError, KeyError, AttributeError):
        raise _damaged(uri, SPEC_FILE, "cannot be read") from None
    if recorded != hash_contract(content):
        raise _damaged(uri, SPEC_FILE, "does not match its sha256")
    return content, str(recorded)


def _damaged(uri: str, file: str, problem: str) -> UserError:
    return UserError(f"{uri}: {file} {problem}; the copy is damaged or was changed: copy the bundle again")
