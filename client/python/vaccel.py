"""Calls a vaccel agent from Python: numpy arrays in, numpy arrays out.

    import vaccel

    with vaccel.Guest("unix:///run/vaccel.sock") as guest:
        [labels] = guest.classify([open("digit.png", "rb").read()], best=3)
        model = guest.register("model.onnx")
        outputs = guest.run(model, {"x": numpy.zeros((1, 2), numpy.float32)})

It is the thin guest's library, ``libvaccel_guest.so``, by ctypes: its header ``vaccel_guest.h`` says how to build it
and what each call does. It is taken from ``VACCEL_GUEST_LIBRARY``, from beside this file, or from where the loader
looks.

A guest may be used by several threads; its calls go one after the other, and Python runs others meanwhile.
"""

import contextlib
import ctypes
import os
import signal
import threading
from ctypes import byref, c_char, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import NamedTuple

import numpy

__all__ = ["About", "Detection", "Error", "Guest", "Label", "Resource", "Timings"]

# The header's numbers.
_MEMORY = 32768
_ITEMS_MAX = 16
_RANK_MAX = 8
_KINDS = {"model": 1, "data": 2, "library": 3}
_TYPES = {
    "bool": 1,
    "uint8": 2,
    "int8": 3,
    "uint16": 4,
    "int16": 5,
    "uint32": 6,
    "int32": 7,
    "uint64": 8,
    "int64": 9,
    "float16": 10,
    "bfloat16": 11,
    "float32": 12,
    "float64": 13,
}
_NAMES = {number: name for name, number in _TYPES.items()}
_STRINGS = 14
# Arguments of generic operations: the number of one; of many, that and 1.
_ARGUMENTS = {
    "int8": 1,
    "int16": 3,
    "int32": 5,
    "int64": 7,
    "uint8": 9,
    "uint16": 11,
    "uint32": 13,
    "uint64": 15,
    "float32": 17,
    "float64": 19,
    "bool": 21,
}
_TEXT = 27
_BUFFER = 28
_SGEMM = 17

# Room for each output of a model that has not run yet: what is longer runs again with room for it.
_ROOM_BYTES = 64 << 10
# Things in an image, and labels of all images of one call, as the library has room for.
_DETECTIONS_MAX = 64
_LABELS_MAX = 80

_P = ctypes.POINTER


class _Bytes(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("length", c_size_t)]


class _File(ctypes.Structure):
    _fields_ = [("name", c_char_p), ("data", c_void_p), ("length", c_size_t)]


class _Resource(ctypes.Structure):
    _fields_ = [("name", c_char * 65)]


class _Label(ctypes.Structure):
    _fields_ = [("image", c_uint32), ("index", c_uint32), ("probability", c_float), ("name", c_char * 65)]


class _Detection(ctypes.Structure):
    _fields_ = [("label", _Label)] + [(side, c_float) for side in ("left", "top", "right", "bottom")]


class _Input(ctypes.Structure):
    _fields_ = [
        ("name", c_char_p),
        ("dtype", c_int),
        ("rank", c_size_t),
        ("shape", _P(c_int64)),
        ("data", c_void_p),
        ("length", c_size_t),
    ]


class _Output(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("size", c_size_t),
        ("length", c_size_t),
        ("dtype", c_int),
        ("rank", c_size_t),
        ("shape", c_int64 * _RANK_MAX),
    ]


class _Arg(ctypes.Structure):
    _fields_ = [("type", c_uint32), ("data", c_void_p), ("length", c_size_t)]


class _ArgOut(ctypes.Structure):
    _fields_ = [
        ("type", c_uint32),
        ("before", c_void_p),
        ("before_length", c_size_t),
        ("data", c_void_p),
        ("size", c_size_t),
        ("length", c_size_t),
    ]


class _Timings(ctypes.Structure):
    _fields_ = [("queue_us", c_uint64), ("run_us", c_uint64), ("batch_size", c_uint32)]


class _Info(ctypes.Structure):
    _fields_ = [
        ("version", c_char * 33),
        ("tenant", c_char * 129),
        ("operations", c_char * 1025),
        ("engines", c_char * 129),
        ("message_bytes_max", c_uint64),
        ("session_lease_ms", c_uint64),
    ]


# What each function returns, and takes behind the guest.
_METHODS = {
    "set_token": (None, [c_char_p]),
    "set_deadline_ms": (None, [c_uint32]),
    "set_repeatable": (None, [c_int]),
    "set_sigpipe_ignored": (None, [c_int]),
    "choose": (None, [c_char_p, c_char_p]),
    "wish": (None, [c_uint32]),
    "set_awake": (None, [c_int]),
    "set_reply_type": (None, [c_int]),
    "set_shared_bytes": (None, [c_size_t]),
    "open": (c_int, []),
    "close": (c_int, []),
    "renew": (c_int, []),
    "attend": (None, []),
    "about": (c_int, [_P(_Info)]),
    "noop": (c_int, [_P(_Timings)]),
    "classify": (c_int, [_P(_Resource), _P(_Bytes), c_size_t, _P(_Label), c_size_t, _P(c_size_t), _P(_Timings)]),
    "detect": (c_int, [_P(_Resource), _P(_Bytes), c_float, _P(_Detection), c_size_t, _P(c_size_t), _P(_Timings)]),
    "run": (c_int, [_P(_Resource), _P(_Input), c_size_t, _P(c_char_p), c_size_t, _P(_Output), c_size_t, _P(_Timings)]),
    "genop": (c_int, [_P(_Arg), c_size_t, _P(_ArgOut), c_size_t, _P(_Timings)]),
    "register": (c_int, [c_int, _P(_File), c_size_t, _P(_Resource)]),
    "unregister": (c_int, [_P(_Resource)]),
    "reason": (c_char_p, []),
    "message": (c_char_p, []),
    "may_have_run": (c_int, []),
    "session_lost": (c_int, []),
    "retry_after_ms": (c_uint32, []),
}


def _load():
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "libvaccel_guest.so")
    named = os.environ.get("VACCEL_GUEST_LIBRARY")
    name = named or (beside if os.path.exists(beside) else "libvaccel_guest.so")
    try:
        library = ctypes.CDLL(name)
    except OSError as error:
        raise ImportError(f"{error}: build it as vaccel_guest.h says, and name it in VACCEL_GUEST_LIBRARY") from error
    library.vaccel_guest_init.restype = c_void_p
    library.vaccel_guest_init.argtypes = [c_void_p, c_size_t, c_char_p]
    for name, (result, arguments) in _METHODS.items():
        function = getattr(library, f"vaccel_guest_{name}")
        function.restype, function.argtypes = result, [c_void_p, *arguments]
    return library


_LIBRARY = _load()


class Timings(NamedTuple):
    """Where the agent spent the time of a call."""

    queue_us: int
    run_us: int
    batch_size: int


class About(NamedTuple):
    """What the agent is, and who it takes this guest for."""

    version: str
    tenant: str
    operations: list
    engines: list
    message_bytes_max: int
    session_lease_ms: int


class Label(NamedTuple):
    """A class that an image may show."""

    name: str
    probability: float
    index: int


class Detection(NamedTuple):
    """A thing in an image, and where it is: in pixels, from the image's upper left corner."""

    label: Label
    left: float
    top: float
    right: float
    bottom: float


class Resource(NamedTuple):
    """What a session holds, by its name, which is made from its content; or a model of the host's by its own."""

    name: str


class Error(Exception):
    """A call failed: ``reason`` is one of the agent's, such as ``"BAD_ARGUMENT"``."""

    def __init__(self, reason, message, errno, may_have_run=False, session_lost=False, retry_after_ms=0):
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
        self.errno = errno
        #: Whether the agent may have done it all the same.
        self.may_have_run = may_have_run
        #: Whether the session is lost, and with it the resources that it held.
        self.session_lost = session_lost
        #: When the agent asks to try again; 0 when it does not.
        self.retry_after_ms = retry_after_ms


def _encoded(text):
    """A text of C's."""
    if text is not None and "\0" in text:
        raise ValueError(f"expected a text without zeros, not {text!r}")
    return None if text is None else text.encode("utf-8", "surrogateescape")


def _decoded(text):
    return text.decode("utf-8", "replace")


def _address(array):
    return array.ctypes.data if array.nbytes else None


def _bytes(content):
    """Content that stays where it is for a call, with its address."""
    return numpy.frombuffer(content, numpy.uint8)


def _little(array):
    """The elements dense, row-major and little-endian, as they travel; copied only if they are not."""
    array = numpy.ascontiguousarray(array)
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _strings(array):
    """The encoding of an array of texts or bytes."""
    elements = [text.encode() if isinstance(text, str) else text for text in array.ravel().tolist()]
    for element in elements:
        if not isinstance(element, bytes):
            raise TypeError(f"expected texts or bytes in an array of objects, not {element!r}")
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def _tensor(value):
    """An array's type, shape and data for the wire."""
    array = numpy.asarray(value)
    shape = array.shape
    if array.dtype.kind in "OSU":
        return _STRINGS, shape, _bytes(_strings(array))
    dtype = _TYPES.get(array.dtype.name)
    if dtype is None:
        raise TypeError(f"expected elements of {', '.join(_TYPES)} or texts, not {array.dtype}")
    return dtype, shape, _little(array)


def _array(output, place):
    """The array that came out; numbers of bfloat16 are float32 here, which holds them all."""
    # A place that was too large is not kept for as long as the array.
    data = place if output.length == place.nbytes else place[: output.length].copy()
    shape = tuple(output.shape[: output.rank])
    if output.dtype == _STRINGS:
        elements, content, end = [], data.tobytes(), 0
        while end < len(content):
            begin = end + 4
            end = begin + int.from_bytes(content[end:begin], "little")
            elements.append(content[begin:end])
        array = numpy.empty(len(elements), object)
        array[:] = elements
        return array.reshape(shape)
    if output.dtype == _TYPES["bfloat16"]:
        return (data.view("<u2").astype(numpy.uint32) << 16).view(numpy.float32).reshape(shape)
    return data.view(numpy.dtype(_NAMES[output.dtype]).newbyteorder("<")).reshape(shape)


def _argument(value):
    """An argument of a generic operation, as its type and data."""
    if isinstance(value, str):
        return _TEXT, _bytes(value.encode() + b"\0")
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _BUFFER, _bytes(value)
    # Numbers of Python's own are vAccel's widest.
    array = numpy.asarray(value)
    number = _ARGUMENTS.get(array.dtype.name)
    if number is None:
        raise TypeError(f"expected text, bytes, or elements of {', '.join(_ARGUMENTS)}, not {array.dtype}")
    return number + (array.ndim > 0), _little(array)


def _resource(model):
    """A resource for the library: none for the agent's own."""
    if model is None:
        return None
    name = model.name if isinstance(model, Resource) else model
    encoded = _encoded(name)
    if not 0 < len(encoded) <= 64:
        raise ValueError(f"expected a model's name of 1 to 64 bytes, not {name!r}")
    return byref(_Resource(encoded))


class Guest:
    """A guest of an agent: one connection, one session.

    ``address`` is ``vsock://CID:PORT``, ``unix://PATH``, ``unix://@NAME`` or ``tcp://IP:PORT``; if it is not given,
    ``VACCEL_RPC_ADDRESS``. Nothing is sent before the first call.

    ``token`` is what an agent on TCP may want. ``deadline`` is how long each call may take, in seconds. ``engine`` and
    ``device`` are the session's, of the agent's choice if not given, and ``hints`` vAccel's bits of plugin types. Calls
    that are not ``repeatable`` are not made twice when the connection breaks under them. With ``reply_type``
    ``"float16"`` or ``"bfloat16"`` outputs of float32 are sent at half their length. ``shared_bytes`` is how much
    memory this guest and an agent of this machine may have together, 0 for none. ``awake`` says whether calls that
    always took the same time are awaited awake.
    """

    def __init__(
        self,
        address=None,
        *,
        token=None,
        deadline=60.0,
        engine=None,
        device=None,
        hints=0,
        repeatable=True,
        reply_type=None,
        shared_bytes=None,
        awake=True,
    ):
        self._guest = None
        self._lock = threading.Lock()
        self._repeatable = bool(repeatable)
        # How long outputs were, by model and names.
        self._lengths = {}
        self._memory = ctypes.create_string_buffer(_MEMORY)
        address = address or os.environ.get("VACCEL_RPC_ADDRESS")
        if not address:
            raise ValueError("expected an address, as an argument or in VACCEL_RPC_ADDRESS")
        self._guest = _LIBRARY.vaccel_guest_init(self._memory, _MEMORY, _encoded(address))
        if not self._guest:
            raise ValueError(f"expected vsock://CID:PORT, unix://PATH, unix://@NAME or tcp://IP:PORT, not {address!r}")
        if reply_type not in (None, "float16", "bfloat16"):
            raise ValueError(f"expected float16 or bfloat16, not {reply_type!r}")
        if not 0 < deadline <= 0xFFFFFFFF / 1e3:
            raise ValueError(f"expected a deadline in seconds, not {deadline!r}")
        self._call("set_token", _encoded(token))
        self._call("set_deadline_ms", max(1, round(deadline * 1e3)))
        self._call("choose", _encoded(engine), _encoded(device))
        self._call("wish", hints)
        self._call("set_repeatable", self._repeatable)
        self._call("set_awake", awake)
        self._call("set_reply_type", _TYPES.get(reply_type, 0))
        # Python's own choice, unless a program makes another one.
        self._call("set_sigpipe_ignored", signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN)
        if shared_bytes is not None:
            self._call("set_shared_bytes", shared_bytes)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # What broke the block is what its caller is told.
        with contextlib.suppress(Error) if kind else contextlib.nullcontext():
            self.close()

    def __del__(self):
        # Whoever collects it has no time for an agent that does not answer.
        with contextlib.suppress(Exception):
            self._call("set_deadline_ms", 1000)
            self.close()

    def _call(self, name, *arguments):
        """Calls a function of the library, with nobody else in it."""
        with self._lock:
            return self._locked(name, *arguments)

    def _locked(self, name, *arguments):
        if not self._guest:
            raise ValueError("the guest is closed")
        result = getattr(_LIBRARY, f"vaccel_guest_{name}")(self._guest, *arguments)
        if _METHODS[name][0] is c_int and result != 0:
            raise Error(
                _decoded(_LIBRARY.vaccel_guest_reason(self._guest)),
                _decoded(_LIBRARY.vaccel_guest_message(self._guest)),
                result,
                bool(_LIBRARY.vaccel_guest_may_have_run(self._guest)),
                bool(_LIBRARY.vaccel_guest_session_lost(self._guest)),
                _LIBRARY.vaccel_guest_retry_after_ms(self._guest),
            )
        return result

    def _timed(self, name, *arguments):
        """The same for what says how long it took."""
        timings = _Timings()
        self._call(name, *arguments, byref(timings))
        #: Of the last call that computed something.
        self.timings = Timings(timings.queue_us, timings.run_us, timings.batch_size)
        return self.timings

    def open(self):
        """Opens the session; calls that need one do so by themselves."""
        self._call("open")

    def close(self):
        """Ends the session and closes the connection. A guest that is closed takes no more calls."""
        with self._lock:
            if self._guest:
                try:
                    self._locked("close")
                finally:
                    self._guest = None

    def renew(self):
        """Starts the session's lease anew; every other call does so, too."""
        self._call("renew")

    def attend(self):
        """Answers what the agent has asked between calls: more often than every 20 seconds it keeps the connection."""
        self._call("attend")

    def about(self):
        """What the agent is."""
        info = _Info()
        self._call("about", byref(info))
        return About(
            _decoded(info.version),
            _decoded(info.tenant),
            _decoded(info.operations).split(),
            _decoded(info.engines).split(),
            info.message_bytes_max,
            info.session_lease_ms,
        )

    def noop(self):
        """Does nothing, all the way to the agent's scheduler and back; returns its timings."""
        return self._timed("noop")

    def classify(self, images, model=None, best=1):
        """Classifies PNG or JPEG files, at most 16: for each a list of its ``best`` labels, best first.

        Without a model it is the agent's own.
        """
        held = [_bytes(image) for image in images]
        given = (_Bytes * len(held))(*((_address(image), image.nbytes) for image in held))
        if best < 1 or best * len(held) > _LABELS_MAX:
            raise ValueError(f"expected 1 to {_LABELS_MAX} labels of all images together, not {best} of {len(held)}")
        labels, found = (_Label * (best * len(held)))(), c_size_t()
        self._timed("classify", _resource(model), given, len(given), labels, len(labels), byref(found))
        classified = [[] for _ in held]
        for label in labels[: found.value]:
            classified[label.image].append(_label(label))
        return classified

    def detect(self, image, model=None, threshold=0.0, most=_DETECTIONS_MAX):
        """Finds things in a PNG or JPEG file, the most probable first: ``most`` of them at most, up to 64.

        Those less probable than ``threshold``, or with 0 than the model says, are none. Without a model it is the
        agent's own for this, if it has one.
        """
        if not 1 <= most <= _DETECTIONS_MAX:
            raise ValueError(f"expected 1 to {_DETECTIONS_MAX} things at most, not {most}")
        held = _bytes(image)
        given, places, found = _Bytes(_address(held), held.nbytes), (_Detection * most)(), c_size_t()
        self._timed("detect", _resource(model), byref(given), threshold, places, most, byref(found))
        return [
            Detection(_label(place.label), place.left, place.top, place.right, place.bottom)
            for place in places[: found.value]
        ]

    def register(self, files, kind="model"):
        """Makes the session hold a resource, and returns it: a path, paths, or a dict of contents by their labels.

        ``kind`` is ``"model"``, ``"data"`` or ``"library"``. Only what the agent lacks is sent.
        """
        if kind not in _KINDS:
            raise ValueError(f"expected a kind of {', '.join(_KINDS)}, not {kind!r}")
        if isinstance(files, (str, os.PathLike)):
            files = [files]
        if not isinstance(files, dict):
            paths = {os.path.basename(path): path for path in map(os.fspath, files)}
            if len(paths) < len(files):
                raise ValueError(f"expected files of different names, not {files!r}")
            files = {name: numpy.fromfile(path, numpy.uint8) for name, path in paths.items()}
        held = {_encoded(name): _bytes(content) for name, content in files.items()}
        given = (_File * len(held))(*((name, _address(file), file.nbytes) for name, file in held.items()))
        resource = _Resource()
        self._call("register", _KINDS[kind], given, len(given), byref(resource))
        return Resource(_decoded(resource.name))

    def unregister(self, resource):
        """Lets a resource go."""
        self._call("unregister", _resource(resource))

    def run(self, model, inputs, outputs=None):
        """Runs a model: a resource, or the name by which the host's repository has one.

        ``inputs`` is a dict of arrays by their names, or a list of them by their places; texts travel as strings.
        ``outputs`` are the names of those wanted; without, all. Returns a list of arrays in that order.

        An output that is longer than any before finds no place, and the model runs again with room for it, if calls are
        repeatable.
        """
        named = inputs.items() if isinstance(inputs, dict) else [("", value) for value in inputs]
        tensors = [(name, *_tensor(value)) for name, value in named]
        shapes = [(c_int64 * max(1, len(shape)))(*shape) for _, _, shape, _ in tensors]
        given = (_Input * len(tensors))(
            *(
                (_encoded(name), dtype, len(shape), sizes, _address(data), data.nbytes)
                for (name, dtype, shape, data), sizes in zip(tensors, shapes)
            )
        )
        wanted = [_encoded(name) for name in outputs or ()]
        names = (c_char_p * len(wanted))(*wanted)
        resource, key = _resource(model), (str(getattr(model, "name", model)), *wanted)
        if resource is None:
            raise ValueError("expected a model")
        unknown = [_ROOM_BYTES] * (len(wanted) or _ITEMS_MAX)
        lengths = self._lengths.get(key, unknown)
        while True:
            held = [numpy.empty(length, numpy.uint8) for length in lengths]
            places = (_Output * len(held))(*((_address(place), place.nbytes) for place in held))
            try:
                self._timed("run", resource, given, len(given), names, len(names), places, len(places))
                break
            except Error as error:
                longer = [max(place.length, length) for place, length in zip(places, lengths)]
                # All that came found a place: there are more of them than there were before.
                longer = longer if longer != lengths else [*lengths, *unknown[len(lengths) :]]
                is_room = error.reason == "BAD_ARGUMENT" and error.may_have_run and longer != lengths
                if not is_room or not self._repeatable:
                    raise
                lengths = longer
        came = [place for place in places if place.dtype != 0]
        known = key in self._lengths
        self._lengths[key] = [max(place.length, length * known) for place, length in zip(came, lengths)]
        return [_array(place, data) for place, data in zip(came, held)]

    def genop(self, operation, read=(), write=()):
        """Runs any operation by vAccel's number, with the arguments that vAccel's generic operation has.

        Those read are texts, bytes, arrays, and numbers, of which ``numpy.float32(2)`` is an argument of that type, and
        those of Python int64 and float64. Those written are arrays, which hold what they are before the operation and
        then what it wrote. Returns how many elements of each that was.
        """
        given = [_argument(value) for value in (numpy.uint8(operation), *read)]
        ask = (_Arg * len(given))(*((kind, _address(data), data.nbytes) for kind, data in given))
        places = [_argument(array) for array in write]
        for array, (_, place) in zip(write, places):
            if not isinstance(array, numpy.ndarray) or _address(array) != _address(place) or not array.flags.writeable:
                raise TypeError("expected arrays to write that are writeable, dense, row-major and little-endian")
        before = [place.copy() for _, place in places]
        answer = (_ArgOut * len(places))(
            *(
                (kind, _address(old), old.nbytes, _address(place), place.nbytes)
                for (kind, place), old in zip(places, before)
            )
        )
        self._timed("genop", ask, len(ask), answer, len(answer))
        return [part.length // place.itemsize for part, (_, place) in zip(answer, places)]

    def sgemm(self, a, b, c=None, alpha=1.0, beta=0.0):
        """``alpha`` times the product of two matrices of float32, and ``beta`` times ``c``."""
        a, b = (numpy.asarray(matrix, numpy.float32) for matrix in (a, b))
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise ValueError(f"expected shapes (m, k) and (k, n), not {a.shape} and {b.shape}")
        (m, k), n = a.shape, b.shape[1]
        product = numpy.zeros((m, n), numpy.float32) if c is None else numpy.array(c, numpy.float32, order="C")
        if product.shape != (m, n):
            raise ValueError(f"expected c of shape {(m, n)}, not {product.shape}")
        alpha, beta = numpy.float32(alpha), numpy.float32(beta)
        self.genop(_SGEMM, [m, n, k, alpha, a, k, b, n, beta, n], [product])
        return product


def _label(label):
    return Label(_decoded(label.name), label.probability, label.index)
