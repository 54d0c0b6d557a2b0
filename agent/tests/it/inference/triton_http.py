"""Every call of Triton's client for Python over HTTP, and what it never sends. Arguments as in triton_grpc.py."""

import http.client
import json
import sys
import zlib

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from values import TYPES, rows, same

_, tcp, brought = sys.argv[1:]


def inputs(name, values, kind, binary=True):
    tensor = triton.InferInput(name, values.shape, kind)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return [tensor]


def fails(work, *signs):
    try:
        work()
    except InferenceServerException as error:
        assert all(sign in str(error) for sign in signs), error
        return
    raise AssertionError(f"expected {signs}")


def raw(method, path, body=None, headers={}):
    connection = http.client.HTTPConnection(tcp)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = response.status, response.read(), response.headers
    connection.close()
    return answer


def server(client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata()["name"] == "vaccel-agent"
    assert client.get_log_settings()["log_error"] is True
    assert client.get_trace_settings()["trace_level"] == ["OFF"]
    fails(lambda: client.update_log_settings({"log_info": False}), "host's")
    assert client.get_system_shared_memory_status() == [] and client.get_cuda_shared_memory_status() == []
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    fails(lambda: client.register_system_shared_memory("r", "/key", 64), "unix socket")


def types(client):
    for kind in TYPES:
        values = rows(kind)
        # This client has no words for these two in JSON.
        for binary in [True] if kind in ["FP16", "BF16"] else [True, False]:
            wanted = [triton.InferRequestedOutput("out", binary_data=binary)]
            tensors = inputs("in", values, kind, binary)
            result = client.infer(f"identity_{kind}", tensors, outputs=wanted, request_id=kind)
            got = result.as_numpy("out")
            if kind == "BYTES" and not binary:
                got = np.array([str(text).encode() for text in got.flatten()], dtype=np.object_).reshape(got.shape)
            same(got, values)
            assert result.get_response()["id"] == kind


def compressed(client):
    values = np.zeros((8, 3), dtype=np.float32)
    many = np.repeat(np.arange(2, dtype=np.float32).reshape(1, 2), 64, axis=0)
    for algorithm in ["gzip", "deflate"]:
        coding = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
        same(client.infer("identity_FP32", inputs("in", values, "FP32"), **coding).as_numpy("out"), values)
        wanted = [triton.InferRequestedOutput("out", binary_data=False)]
        result = client.infer("add", inputs("in", many, "FP32"), outputs=wanted, model_version="1", **coding)
        same(result.as_numpy("out"), many + 1)
    bomb = zlib.compress(b" " * (64 << 20))
    kind = {"Content-Encoding": "deflate", "Content-Type": "application/json"}
    assert raw("POST", "/v2/models/add/infer", bomb, kind)[0] == 413
    assert raw("POST", "/v2/models/add/infer", b"no zlib", kind)[0] == 400
    assert raw("POST", "/v2/models/add/infer", b"{}", {"Content-Encoding": "br"})[0] == 400


def models(client):
    one = np.array([[1, 2]], dtype=np.float32)
    assert client.get_model_metadata("add")["versions"] == ["1", "2"]
    assert client.get_model_metadata("add", "1")["inputs"][0]["shape"] == [-1, 2]
    assert client.get_model_config("add")["max_batch_size"] == 64
    same(client.infer("add", inputs("in", one, "FP32"), model_version="1").as_numpy("out"), one + 1)
    content = open(brought, "rb").read()
    client.load_model("brought", config='{"backend": "onnxruntime"}', files={"file:1/model.onnx": content})
    same(client.infer("brought", inputs("in", one, "FP32")).as_numpy("out"), one + 30)
    names = [model["name"] for model in client.get_model_repository_index()]
    assert "brought" in names, names
    client.unload_model("brought")
    assert not client.is_model_ready("brought") and client.is_model_ready("add", "2")
    stats = client.get_inference_statistics("add", "1")["model_stats"][0]
    assert stats["inference_stats"]["success"]["count"] == 3, stats
    fails(lambda: client.infer("nope", inputs("in", one, "FP32")), "404", "unknown model: 'nope'")
    fails(lambda: client.infer("add", inputs("x", one, "FP32")), "400", "unexpected inference input 'x'")


def by_hand():
    status, body, headers = raw("POST", "/v2/models/add/infer", b"{bad")
    assert status == 400 and "parse" in json.loads(body)["error"], (status, body)
    assert raw("GET", "/v2/nothing")[0] == 404 and raw("GET", "/v2/models/add/infer")[0] == 405
    assert raw("GET", "/v2/models/nope")[0] == 404 and raw("GET", "/v2/models/nope/ready")[0] == 400
    assert raw("GET", "/v2", headers={"Origin": "http://page"})[0] == 403
    assert json.loads(raw("GET", "/v2/health/live")[1]) == {"live": True}

    # A body that is the only input of a model.
    values = np.array([[1, 2]], dtype=np.float32)
    length = {"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"}
    status, body, headers = raw("POST", "/v2/models/add/versions/1/infer", values.tobytes(), length)
    begin = int(headers["Inference-Header-Content-Length"])
    assert status == 200 and np.frombuffer(body[begin:], dtype=np.float32).tolist() == [2, 3], (status, body)

    # Nested lists, and what does not fit.
    def infer(tensor):
        request = json.dumps({"inputs": [{"name": "in", "datatype": "FP32", "shape": [1, 2], **tensor}]})
        status, body, _ = raw("POST", "/v2/models/add/versions/1/infer", request)
        return status, json.loads(body)

    assert infer({"data": [[1, 2]]})[1]["outputs"][0]["data"] == [2, 3]
    for tensor, sign in [
        ({"data": [[1, "two"]]}, "expected elements"),
        ({"data": [1, 2, 3]}, "byte size mismatch"),
        ({}, "expected 'data'"),
        ({"parameters": {"binary_data_size": 8}}, "bytes that are left"),
        ({"shape": [1, -2], "data": [1, 2]}, "unexpected shape"),
        ({"shape": "many", "data": [1, 2]}, "parse"),
    ]:
        status, answer = infer(tensor)
        assert status == 400 and sign in answer["error"], (tensor, status, answer)
    too_long = raw("POST", "/v2/models/add/infer", b"x" * (33 << 20))
    assert too_long[0] == 413, too_long

    metrics = raw("GET", "/metrics")[1].decode()
    assert 'nv_inference_request_success{model="add",version="1"}' in metrics, metrics
    assert 'nv_inference_request_failure{model="add",version="1",reason="OTHER"}' in metrics, metrics


with triton.InferenceServerClient(tcp) as client:
    for work in [server, types, compressed, models]:
        work(client)
by_hand()
