"""Rival servers, each a separate program: `python -m tests.benchmarks.serve.rivals WAY PORT ARGUMENTS`.

They listen on loopback, accept the same form, run the same bundle, and answer with grade, probabilities and,
in a header, the number of images in the forward pass.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, Response, UploadFile
from starlette.concurrency import run_in_threadpool

from jobs.bench.load import BATCH_HEADER, PATH
from tests.benchmarks.serve.rival_model import Arguments, Model


def fastapi(arguments: Arguments, port: int) -> None:
    """Plain FastAPI: one image at a time in a thread, so that the event loop is not blocked."""
    model, free = Model(arguments), threading.Lock()

    def grade(data: bytes) -> dict[str, Any]:
        pixels = model.decode(data)
        with free:  # concurrent passes would share the cores, and both take longer
            return model.grade(pixels[None])[0]

    api = FastAPI()

    @api.post(PATH)
    async def graded(file: UploadFile, response: Response) -> dict[str, Any]:
        response.headers[BATCH_HEADER] = "1"
        return await run_in_threadpool(grade, await file.read())

    uvicorn.run(api, host="127.0.0.1", port=port, log_level="error", access_log=False)


def litserve(arguments: Arguments, port: int) -> None:
    """LitServe, as in its documentation of batched inference."""
    from tests.benchmarks.serve.litserve import run

    run(arguments, port)


WAYS = {way.__name__: way for way in (fastapi, litserve)}

if __name__ == "__main__":
    WAYS[sys.argv[1]](Arguments.model_validate_json(sys.argv[3]), int(sys.argv[2]))
