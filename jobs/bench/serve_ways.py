"""Servers of others, each as a program of its own: `python -m jobs.bench.serve_ways WAY PORT ARGUMENTS`.

They listen on loopback, take the same form and run the same bundle, and answer grade and
probabilities with the number of photographs in the forward pass as a header.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Response, UploadFile
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from jobs.bench.decoders import torchvision as decoded_by_torchvision
from jobs.bench.forwards import Forward, Way, plain_forward
from jobs.bench.load import BATCH_HEADER, PATH
from scalp_core import calibration
from scalp_core.bundle import load_bundle
from scalp_core.predictor import Hardware, Predictor, has_bf16
from scalp_core.preprocess import decode


class Arguments(BaseModel):
    """What a server is told."""

    bundle: str = Field(description="local directory of the bundle")
    device: Hardware = Field(description="where the model runs")
    cores: int = Field(description="of this machine, for all of the server's models together")
    workers: int = Field(1, description="LitServe's inference processes, which share the cores")
    max_batch_size: int = Field(16, description="photographs in one forward pass of LitServe")
    batch_timeout: float = Field(0.005, description="seconds that LitServe waits for a batch to fill")
    engine: bool = Field(False, description="decoding and the model by our engine, not by PyTorch")


@dataclass
class Model:
    """What every server runs: bytes to pixels, pixels to answers."""

    arguments: Arguments

    def __post_init__(self) -> None:
        bundle = load_bundle(self.arguments.bundle)
        self._spec, device = bundle.spec, self.arguments.device
        threads = max(1, self.arguments.cores // self.arguments.workers)
        self._forward: Forward
        if self.arguments.engine:
            predictor = Predictor(bundle, device, threads=threads)
            predictor.warm_up(self.arguments.max_batch_size)
            self._forward = predictor.logits
        else:
            import torch

            torch.set_num_threads(threads)
            way = Way("", "plain", "bf16" if has_bf16(device) else "fp32", channels_last=True)
            self._forward = plain_forward(bundle, device, way)
            for size in range(1, self.arguments.max_batch_size + 1):
                side = self._spec.preprocess.size
                self._forward(np.zeros((size, side, side, 3), np.uint8))

    def decode(self, data: bytes) -> np.ndarray:
        """uint8 (size, size, 3)."""
        if self.arguments.engine:
            return decode(data, self._spec.preprocess).pixels
        return decoded_by_torchvision(data, self._spec.preprocess.size)

    def grade(self, images: np.ndarray) -> list[dict[str, Any]]:
        """An answer for each of uint8 (N, size, size, 3)."""
        found = calibration.probabilities(self._forward(images), self._spec.temperature)
        return [{"grade": int(row.argmax()), "probabilities": row.tolist()} for row in found]


def fastapi(arguments: Arguments, port: int) -> None:
    """FastAPI as one would write it: a photograph at a time in a thread, so that the loop stays free."""
    model, free = Model(arguments), threading.Lock()

    def grade(data: bytes) -> dict[str, Any]:
        pixels = model.decode(data)
        with free:  # two passes at once would share the cores, and be late both
            return model.grade(pixels[None])[0]

    api = FastAPI()

    @api.post(PATH)
    async def graded(file: UploadFile, response: Response) -> dict[str, Any]:
        response.headers[BATCH_HEADER] = "1"
        return await run_in_threadpool(grade, await file.read())

    uvicorn.run(api, host="127.0.0.1", port=port, log_level="error", access_log=False)


def litserve(arguments: Arguments, port: int) -> None:
    """LitServe as its documentation writes batched inference of images."""
    from jobs.bench.serve_litserve import run

    run(arguments, port)


WAYS = {each.__name__: each for each in (fastapi, litserve)}

if __name__ == "__main__":
    WAYS[sys.argv[1]](Arguments.model_validate_json(sys.argv[3]), int(sys.argv[2]))
