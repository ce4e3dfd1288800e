"""LitServe around the model of `rival_model`.

LitServe reads annotations at run time: no `from __future__ import annotations` here.
"""

from typing import Any

import litserve
import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse

from jobs.bench.load import BATCH_HEADER, PATH
from tests.benchmarks.serve.rival_model import Arguments, Model


class GradeAPI(litserve.LitAPI):
    """LitServe API: decode, batch, predict, unbatch, encode.

    Args:
        arguments: Arguments of the server.
    """

    def __init__(self, arguments: Arguments) -> None:
        super().__init__(arguments.max_batch_size, arguments.batch_timeout, api_path=PATH)
        self._arguments = arguments

    def setup(self, device: str) -> None:  # noqa: ARG002
        self._model = Model(self._arguments)

    def decode_request(self, request: Request) -> np.ndarray:
        # For a form, LitServe passes its fields, whatever the annotation.
        return self._model.decode(request["file"].file.read())

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> list[dict[str, Any]]:
        return [answer | {"batch": len(x)} for answer in self._model.grade(x)]

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> JSONResponse:
        return JSONResponse(output, headers={BATCH_HEADER: str(output.pop("batch"))})


def run(arguments: Arguments, port: int) -> None:
    """Serve until the process is ended."""
    server = litserve.LitServer(
        GradeAPI(arguments), accelerator=arguments.device, workers_per_device=arguments.workers
    )
    server.run(
        host="127.0.0.1",
        port=port,
        log_level="error",
        generate_client_file=False,
        access_log=False,
    )
