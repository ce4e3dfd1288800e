"""Grade images by the clients of KServe; `kserve_calls.py ORIGIN GRPC_ADDRESS IMAGE...` prints JSON.

It runs in an environment of its own, which has kserve and nothing of scalp.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

MODEL = "scalp"


def request(images: list[bytes]) -> InferRequest:
    tensor = InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=object), binary_data=True)
    return InferRequest(MODEL, [tensor])


def outputs(response: Any) -> dict[str, Any]:
    found = {tensor.name: tensor.as_numpy().tolist() for tensor in response.outputs}
    return found | {"model_version": response.model_version}


async def main(origin: str, address: str, files: list[str]) -> None:
    images = [Path(file).read_bytes() for file in files]
    rest = InferenceRESTClient(RESTConfig(protocol="v2"))
    found = {
        "rest_ready": [
            await rest.is_server_live(origin),
            await rest.is_server_ready(origin),
            await rest.is_model_ready(origin, MODEL),
        ],
        "rest": outputs(await rest.infer(origin, request(images), MODEL)),
    }
    await rest.close()
    grpc = InferenceGRPCClient(address)
    found["grpc_ready"] = [
        await grpc.is_server_live(),
        await grpc.is_server_ready(),
        await grpc.is_model_ready(MODEL),
    ]
    found["grpc"] = outputs(await grpc.infer(request(images)))
    await grpc.close()
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
