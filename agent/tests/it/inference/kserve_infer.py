"""KServe's clients for Python. Arguments as in triton_grpc.py."""

import asyncio
import sys

from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

from values import rows, same

unix, tcp, _ = sys.argv[1:]


def request():
    values = rows("FP32")
    tensor = InferInput(name="in", shape=list(values.shape), datatype="FP32")
    tensor.set_data_from_numpy(values, binary_data=True)
    return InferRequest(model_name="identity_FP32", infer_inputs=[tensor])


async def main():
    for url in [unix, tcp]:
        client = InferenceGRPCClient(url=url)
        assert await client.is_server_live() and await client.is_server_ready()
        assert await client.is_model_ready("identity_FP32")
        response = await client.infer(request())
        same(response.outputs[0].as_numpy(), rows("FP32"))
        await client.close()

    client, url = InferenceRESTClient(RESTConfig(protocol="v2")), f"http://{tcp}"
    assert await client.is_server_live(url) and await client.is_server_ready(url)
    assert await client.is_model_ready(url, "identity_FP32")
    response = await client.infer(url, request(), model_name="identity_FP32")
    same(response.outputs[0].as_numpy(), rows("FP32"))
    await client.close()


asyncio.run(main())
