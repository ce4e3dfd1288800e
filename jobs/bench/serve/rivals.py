"""Servers of others, each as a program of its own: `python -m jobs.bench.serve.rivals WAY PORT ARGUMENTS`.

They listen on loopback, take the same form and run the same bundle, and answer grade and
probabilities with the number of photographs in the forward pass as a header.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI, Response, UploadFile
from starlette.concurrency import run_in_threadpool

from jobs.bench.serve.load import BATCH_HEADER, PATH
from jobs.bench.serve.rival_model import Arguments, Model


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
    from jobs.bench.serve.litserve import run

    run(arguments, port)


WAYS = {each.__name__: each for each in (fastapi, litserve)}

if __name__ == "__main__":
    WAYS[sys.argv[1]](Arguments.model_validate_json(sys.argv[3]), int(sys.argv[2]))
