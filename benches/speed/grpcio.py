"""Python's gRPC as a peer: `serve FOLDER` or `call TCP UNIX`, as the harness's own peers do it.

Payloads are bytes as they are, without a message around them: nothing but gRPC itself is measured.
"""

import os
import sys
import time
from concurrent import futures

import grpc

DOWN_BYTES_MAX = 4096
BURST_SECONDS_MAX = 0.2
# As for tonic: the default of 4 MiB is less than what is sent.
OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A unix socket's path is no host's name.
    ("grpc.default_authority", "localhost"),
]


def serve(folder):
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8), options=OPTIONS)
    methods = {
        "Cut": grpc.unary_unary_rpc_method_handler(lambda request, _: request[:DOWN_BYTES_MAX]),
        "Echo": grpc.unary_unary_rpc_method_handler(lambda request, _: request),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("speed.Speed", methods)])
    port = server.add_insecure_port("127.0.0.1:0")
    path = os.path.join(folder, "socket")
    server.add_insecure_port(f"unix:{path}")
    server.start()
    print(f"listening on tcp://127.0.0.1:{port}\nlistening on unix://{path}", flush=True)
    sys.stdin.read()
    server.stop(None)


class Caller:
    def __init__(self, target):
        channel = grpc.insecure_channel(target, options=OPTIONS)
        self.methods = {
            echo: channel.unary_unary(f"/speed.Speed/{name}") for echo, name in [("cut", "Cut"), ("echo", "Echo")]
        }

    def call(self, up, down, calls):
        method, payload = self.methods[down], b"\1" * up
        length = up if down == "echo" else min(up, DOWN_BYTES_MAX)
        times = []
        while len(times) < calls and (not times or sum(times) < BURST_SECONDS_MAX * 1e9):
            begun = time.perf_counter_ns()
            reply = method(payload, timeout=60)
            times.append(time.perf_counter_ns() - begun)
            assert len(reply) == length, f"{len(reply)} bytes came instead of {length}"
        return times


def call(tcp, unix):
    targets = {"tcp": tcp.removeprefix("tcp://"), "unix": "unix:" + unix.removeprefix("unix://")}
    callers = {}
    for line in sys.stdin:
        _, socket, up, down, calls = line.split()
        try:
            if socket not in callers:
                callers[socket] = Caller(targets[socket])
            reply = " ".join(map(str, callers[socket].call(int(up), down, int(calls))))
        except Exception as error:
            reply = "failed: " + " ".join(str(error).split())
        print(reply, flush=True)


{"serve": serve, "call": call}[sys.argv[1]](*sys.argv[2:])
