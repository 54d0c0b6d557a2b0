"""An agent by gRPC's own library for Python: as much of the contract as a guest needs, read and written by hand.

Arguments: a unix socket, and the milliseconds after which it says goodbye to a connection, 0 for never.
"""

import hashlib
import sys
import threading
from concurrent import futures

import grpc

SESSION = b"0123456789abcdef" * 2
MESSAGE_BYTES_MAX = 24 << 20
files, resources, busy = {}, {}, []


def varint(value):
    encoded = b""
    while value >= 0x80:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def number(message, at):
    value = shift = 0
    while True:
        byte = message[at]
        at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            return value, at


def fields(message):
    """The fields of a message, in order; the contract's requests have numbers and lengths only."""
    at, found = 0, []
    while at < len(message):
        tag, at = number(message, at)
        value, at = number(message, at)
        if tag & 7 == 2:
            assert at + value <= len(message)
            value, at = message[at : at + value], at + value
        found.append((tag >> 3, value))
    return found


def one(message, wanted, default=b""):
    return next((value for number, value in fields(message) if number == wanted), default)


def refuse(context, code, reason, text, more=b""):
    any_ = lambda kind, message: field(3, field(1, b"type.googleapis.com/google.rpc." + kind) + field(2, message))
    details = any_(b"ErrorInfo", field(1, reason) + field(2, b"vaccel.v1"))
    if more:
        details += any_(b"RetryInfo", more)
    status = field(1, code.value[0]) + field(2, text.encode()) + details
    context.set_trailing_metadata((("grpc-status-details-bin", status),))
    context.abort(code, text)


def classify(request, context):
    top_k = one(request, 2, 0)
    if top_k == 97 and not busy:
        busy.append(True)
        refuse(context, grpc.StatusCode.UNAVAILABLE, b"OVERLOADED", "busy", field(1, field(2, 20_000_000)))
    if top_k == 98:
        refuse(context, grpc.StatusCode.INVALID_ARGUMENT, b"BAD_ARGUMENT", "100 % \u00e9")
    if top_k == 99:
        left = threading.Event()
        context.add_callback(left.set)
        left.wait()
    label = lambda index: field(1, field(1, index) + field(2, b"class %d" % index) + b"\x1d\0\0\0\x3f")
    labels = b"".join(label(index) for index in range(top_k))
    images = [value for number, value in fields(request) if number == 3]
    return field(17, b"".join(field(1, labels) for _ in images))


def run(request, context):
    assert one(request, 1) == SESSION
    timings = field(1, field(1, 1) + field(2, 2) + field(3, 3))
    for number, operation in fields(request):
        if number == 16:
            return timings + field(16, b"")
        if number == 17:
            return timings + classify(operation, context)
        if number == 18:
            assert one(operation, 1).decode() in resources
            outputs = b"".join(field(1, value) for number, value in fields(operation) if number == 3)
            return timings + field(18, outputs)
    raise ValueError("no operation")


def register(request, context):
    wanted = [value for number, value in fields(request) if number == 3]
    hashes = [one(file, 3) for file in wanted]
    missing = [field(2, field(1, hash)) for hash in hashes if hash not in files]
    name = hashlib.sha256(b"".join(hashes)).hexdigest()
    resources[name] = hashes
    return b"".join(missing) if missing else field(1, name.encode())


def upload(requests, context):
    content, first = b"", next(requests)
    hash = one(first, 2)
    for message in [first, *requests]:
        content += one(message, 5)
    assert hashlib.sha256(content).digest() == hash and one(first, 3, 0) == len(content)
    files[hash] = content
    return field(1, len(content)) if content else b""


def unregister(request, context):
    del resources[one(request, 2).decode()]
    return b""


METHODS = {
    "/vaccel.v1.Agent/Info": lambda request, context: field(1, b"interop"),
    "/vaccel.v1.Sessions/Open": lambda request, context: field(1, SESSION) + field(2, 1000),
    "/vaccel.v1.Sessions/Renew": lambda request, context: field(1, 1000),
    "/vaccel.v1.Sessions/Close": lambda request, context: b"",
    "/vaccel.v1.Resources/Register": register,
    "/vaccel.v1.Resources/Unregister": unregister,
    "/vaccel.v1.Operations/Run": run,
}


class Agent(grpc.GenericRpcHandler):
    def service(self, call):
        if call.method == "/vaccel.v1.Resources/Upload":
            return grpc.stream_unary_rpc_method_handler(upload)
        method = METHODS.get(call.method)
        return method and grpc.unary_unary_rpc_method_handler(method)


def main(path, age_ms):
    options = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", -1),
    ]
    if int(age_ms):
        options += [("grpc.max_connection_age_ms", int(age_ms)), ("grpc.max_connection_age_grace_ms", 10_000)]
    server = grpc.server(futures.ThreadPoolExecutor(8), [Agent()], options=options)
    server.add_insecure_port("unix:" + path)
    server.start()
    server.wait_for_termination()


main(*sys.argv[1:])
