"""Every call of Triton's client for Python over gRPC. Arguments: a unix socket, a TCP address, a model's file."""

import os
import queue
import sys

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.utils.shared_memory as memory
from tritonclient.utils import InferenceServerException

from values import TYPES, rows, same

unix, tcp, brought = sys.argv[1:]


def inputs(name, values, kind):
    tensor = grpc.InferInput(name, values.shape, kind)
    tensor.set_data_from_numpy(values)
    return [tensor]


def fails(work, *signs):
    try:
        work()
    except InferenceServerException as error:
        assert all(sign in str(error) for sign in signs), error
        return
    raise AssertionError(f"expected {signs}")


def server(client):
    assert client.is_server_live() and client.is_server_ready()
    metadata = client.get_server_metadata()
    assert metadata.name == "vaccel-agent" and "statistics" in metadata.extensions, metadata
    settings = client.get_log_settings().settings
    assert settings["log_error"].bool_param, settings
    assert client.get_trace_settings().settings["trace_level"].value == ["OFF"]
    fails(lambda: client.update_log_settings({"log_info": False}), "FAILED_PRECONDITION", "host's")
    fails(lambda: client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]}), "FAILED_PRECONDITION")
    assert not client.get_cuda_shared_memory_status().regions
    client.unregister_cuda_shared_memory()


def types(client):
    for kind in TYPES:
        for engine in ["identity", "onnx"]:
            values = rows(kind)
            result = client.infer(f"{engine}_{kind}", inputs("in", values, kind), request_id=f"{engine} {kind}")
            same(result.as_numpy("out"), values)
            response = result.get_response()
            assert response.id == f"{engine} {kind}" and response.model_version == "1", response
            assert response.outputs[0].datatype == kind, response


def typed_contents(client):
    """Elements in the fields of the message instead of raw bytes, as other clients send them."""
    from tritonclient.grpc import service_pb2 as messages
    from tritonclient.grpc import service_pb2_grpc as stubs

    stub = stubs.GRPCInferenceServiceStub(client._channel)
    fields = {
        "bool_contents": ["BOOL"], "int_contents": ["INT8", "INT16", "INT32"], "int64_contents": ["INT64"],
        "uint_contents": ["UINT8", "UINT16", "UINT32"], "uint64_contents": ["UINT64"], "fp32_contents": ["FP32"],
        "fp64_contents": ["FP64"], "bytes_contents": ["BYTES"],
    }
    for field, kinds in fields.items():
        for kind in kinds:
            values = rows(kind)
            request = messages.ModelInferRequest(model_name=f"identity_{kind}")
            tensor = request.inputs.add(name="in", datatype=kind, shape=values.shape)
            getattr(tensor.contents, field).extend(values.flatten().tolist())
            response = stub.ModelInfer(request)
            same(grpc.InferResult(response).as_numpy("out"), values)


def models(client):
    metadata = client.get_model_metadata("add")
    assert list(metadata.versions) == ["1", "2"], metadata
    assert list(metadata.inputs[0].shape) == [-1, 2] and metadata.outputs[0].datatype == "FP32", metadata
    config = client.get_model_config("add").config
    assert config.max_batch_size == 64 and config.input[0].name == "in", config
    one = np.array([[1, 2]], dtype=np.float32)
    for version, expected in [("1", one + 1), ("2", one + 2), ("", one + 2)]:
        same(client.infer("add", inputs("in", one, "FP32"), model_version=version).as_numpy("out"), expected)

    content = open(brought, "rb").read()
    client.load_model("brought", config='{"backend": "onnxruntime"}', files={"file:3/model.onnx": content})
    same(client.infer("brought", inputs("in", one, "FP32"), model_version="3").as_numpy("out"), one + 30)
    fails(lambda: client.load_model("other", files={"file:1/model.onnx": content}), "config")
    names = [model.name for model in client.get_model_repository_index().models]
    assert "brought" in names and "add" in names, names
    client.unload_model("brought")
    fails(lambda: client.infer("brought", inputs("in", one, "FP32")), "NOT_FOUND")

    assert client.is_model_ready("add") and client.is_model_ready("add", "1") and not client.is_model_ready("add", "9")
    client.unload_model("add")
    assert not client.is_model_ready("add")
    client.load_model("add")
    assert client.is_model_ready("add")


def statistics(client):
    kind = "INT32"
    before = client.get_inference_statistics(f"identity_{kind}").model_stats[0]
    for count in [1, 2]:
        client.infer(f"identity_{kind}", inputs("in", rows(kind, count), kind))
    fails(lambda: client.infer(f"identity_{kind}", inputs("in", rows("FP32"), "FP32")), "data-type")
    after = client.get_inference_statistics(f"identity_{kind}").model_stats[0]
    assert after.inference_count - before.inference_count == 3, after
    stats = after.inference_stats
    assert stats.success.count == stats.queue.count == stats.compute_infer.count, stats
    assert stats.fail.count - before.inference_stats.fail.count == 1, stats
    assert sum(batch.batch_size * batch.compute_infer.count for batch in after.batch_stats) == after.inference_count
    assert sum(batch.compute_infer.count for batch in after.batch_stats) == after.execution_count
    spent = stats.queue.ns + stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns
    assert spent <= stats.success.ns, stats


def stream(client):
    answers = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    sent = [np.array([[i, i + 0.5]], dtype=np.float32) for i in range(200)]
    for i, values in enumerate(sent):
        name = "add" if i != 100 else "nope"
        client.async_stream_infer(name, inputs("in", values, "FP32"), request_id=str(i))
    for i, values in enumerate(sent):
        result, error = answers.get(timeout=60)
        if i == 100:
            assert "Request for unknown model: 'nope' is not found" in str(error), error
            continue
        assert error is None, error
        response = result.get_response()
        assert response.id == str(i) and response.parameters["triton_final_response"].bool_param, response
        same(result.as_numpy("out"), values + 2)
    client.stop_stream()


def compressed(client):
    many = np.repeat(np.arange(2, dtype=np.float32).reshape(1, 2), 60, axis=0)
    for algorithm in ["gzip", "deflate"]:
        for values in [many, many[:1]]:
            tensors = inputs("in", values, "FP32")
            same(client.infer("add", tensors, compression_algorithm=algorithm).as_numpy("out"), values + 2)
        answers = queue.Queue()
        client.start_stream(
            callback=lambda result, error: answers.put((result, error)), compression_algorithm=algorithm
        )
        for _ in range(20):
            client.async_stream_infer("add", inputs("in", many, "FP32"))
        for _ in range(20):
            result, error = answers.get(timeout=60)
            assert error is None, error
            same(result.as_numpy("out"), many + 2)
        client.stop_stream()


def shared_memory(client):
    values = rows("FP32")
    size = values.nbytes
    key = f"/vaccel-test-{os.getpid()}"
    region = memory.create_shared_memory_region("both", key, 2 * size)
    try:
        memory.set_shared_memory_region(region, [values])
        client.register_system_shared_memory("both", key, 2 * size)
        status = client.get_system_shared_memory_status().regions
        assert status["both"].key == key and status["both"].byte_size == 2 * size, status
        tensor = grpc.InferInput("in", values.shape, "FP32")
        tensor.set_shared_memory("both", size)
        wanted = grpc.InferRequestedOutput("out")
        wanted.set_shared_memory("both", size, offset=size)
        for _ in range(3):
            result = client.infer("identity_FP32", [tensor], outputs=[wanted])
            output = result.get_output("out")
            assert output.parameters["shared_memory_region"].string_param == "both", output
            same(memory.get_contents_as_numpy(region, np.float32, values.shape, offset=size), values)
        client.unregister_system_shared_memory("both")
        client.unregister_system_shared_memory()
        fails(lambda: client.infer("identity_FP32", [tensor]), "Unable to find shared memory region: 'both'")
    finally:
        memory.destroy_shared_memory_region(region)


for url in [unix, tcp]:
    with grpc.InferenceServerClient(url) as client:
        for work in [server, types, typed_contents, models, statistics, stream, compressed]:
            work(client)
with grpc.InferenceServerClient(unix) as client:
    shared_memory(client)
