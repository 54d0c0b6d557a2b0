"""Calls every method of client/python on a real agent, and ends with an error at the first line that does not hold.

    python.py ADDRESS HEADER ADD_MODEL ECHO_MODEL IMAGE IMAGE SEEING_MODEL THINGS

The host has models "both", with outputs of what comes in and of that and 1 and 2, and "strings", which changes nothing.

It writes "restart" and waits for a line when the agent shall be killed and started again.
"""

import re
import sys
import threading

import ml_dtypes
import numpy

import vaccel

address, header, add_file, echo_file, *image_files, seeing_file, things_file = sys.argv[1:]
images = [open(file, "rb").read() for file in image_files]
x = numpy.array([[1, 2], [3, 4], [5, 6]], numpy.float32)


def refuses(kind, call, *said):
    try:
        call()
    except kind as error:
        assert all(text in str(error) for text in said), error
        return error
    raise AssertionError(f"expected {kind.__name__} with {said}")


def the_module_has_what_the_header_declares():
    text = re.sub(r"/\*.*?\*/", "", open(header).read(), flags=re.DOTALL)
    declared = set(re.findall(r"vaccel_guest_(\w+)\(", text))
    # What moves bytes is C's business; memory that the agent has, too, would not be safe to have as an array.
    assert declared - {"init", "init_io", "share"} == set(vaccel._METHODS), declared ^ set(vaccel._METHODS)
    numbers = {name: int(number) for name, number in re.findall(r"VACCEL_GUEST_(\w+)(?: =)? (\d+)", text)}
    names = {"BOOL": "bool", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    whole = (("U", "uint"), ("I", "int"))
    names |= {f"{short}{bits}": f"{long}{bits}" for bits in (8, 16, 32, 64) for short, long in whole}
    assert vaccel._TYPES == {name: numbers[number] for number, name in names.items()}
    assert vaccel._KINDS == {name: numbers[name.upper()] for name in ("model", "data", "library")}
    assert vaccel._ARGUMENTS == {name: numbers[f"ARG_{name.upper()}"] for name in vaccel._ARGUMENTS}
    assert all(numbers[f"ARG_{name.upper()}_ARRAY"] == number + 1 for name, number in vaccel._ARGUMENTS.items())
    known = [vaccel._STRINGS, vaccel._TEXT, vaccel._BUFFER, vaccel._MEMORY, vaccel._ITEMS_MAX, vaccel._RANK_MAX]
    wanted = ["BYTES", "ARG_STRING", "ARG_BUFFER", "MEMORY", "ITEMS_MAX", "RANK_MAX"]
    assert known == [numbers[name] for name in wanted]


def what_is_no_guest_is_refused():
    for none in ("", "tcp://localhost:1", "http://1.2.3.4:5", "unix://"):
        refuses(ValueError, lambda: vaccel.Guest(none), "expected")
    for name, value in (("reply_type", "float64"), ("deadline", 0), ("deadline", float("nan"))):
        refuses(ValueError, lambda: vaccel.Guest(address, **{name: value}), "expected")
    with vaccel.Guest("unix:///nobody", deadline=0.1) as guest:
        error = refuses(vaccel.Error, guest.noop, "UNREACHABLE: ")
        assert (error.reason, error.errno, error.may_have_run) == ("UNREACHABLE", 111, False)
    refuses(ValueError, guest.noop, "closed")
    guest.close()


def the_agent_tells_what_it_is(guest):
    about = guest.about()
    assert about.version == "0.1.0" and about.tenant and "tract" in about.engines, about
    assert "model_run" in about.operations and about.session_lease_ms == 30000, about
    timings = guest.noop()
    assert timings == guest.timings and timings.batch_size == 1, timings
    guest.open()
    guest.renew()
    guest.attend()


def images_get_labels(guest):
    labels = guest.classify(images, best=3)
    assert [len(of_one) for of_one in labels] == [3, 3]
    assert [of_one[0].name for of_one in labels] == ["two", "six"], labels
    assert all(one.probability >= next.probability for of_one in labels for one, next in zip(of_one, of_one[1:]))
    assert guest.classify([bytearray(images[1])])[0][0].index == 6
    refuses(vaccel.Error, lambda: guest.classify([b"no image"]), "BAD_ARGUMENT: images[0]")
    refuses(vaccel.Error, lambda: guest.classify([b""]), "BAD_ARGUMENT: images[0]")
    refuses(vaccel.Error, lambda: guest.classify([]), "BAD_ARGUMENT: expected 1 to 16 images")
    refuses(ValueError, lambda: guest.classify(images, best=41), "expected 1 to 80 labels")
    refuses(vaccel.Error, lambda: guest.classify(images, model=vaccel.Resource("0" * 64)), "NOT_FOUND")


def things_in_images_have_places(guest):
    seeing, things = guest.register(seeing_file), open(things_file, "rb").read()
    found = guest.detect(things, seeing)
    places = {thing.label.name: thing[1:] for thing in found}
    assert places == {"red": (16, 8, 24, 16), "green": (0, 24, 8, 32)}, found
    assert guest.detect(things, seeing, most=1) == found[:1]
    refuses(vaccel.Error, lambda: guest.detect(things, seeing, threshold=2), "BAD_ARGUMENT: threshold")
    refuses(vaccel.Error, lambda: guest.detect(b"no image", seeing), "BAD_ARGUMENT: image")
    refuses(ValueError, lambda: guest.detect(things, seeing, most=0), "expected 1 to 64")


def resources_are_held(guest):
    model = guest.register(add_file)
    assert model == guest.register({"add.onnx": open(add_file, "rb").read()})
    guest.unregister(model)
    guest.unregister(model)
    refuses(vaccel.Error, lambda: guest.unregister(model), "NOT_FOUND")
    assert guest.register([add_file, echo_file], kind="data") != model
    refuses(ValueError, lambda: guest.register(add_file, kind="modell"), "expected a kind of model")
    refuses(vaccel.Error, lambda: guest.register({}), "expected 1 to 8 files")
    refuses(ValueError, lambda: guest.register([add_file, add_file]), "different names")
    refuses(ValueError, lambda: guest.register({"model\0.onnx": b"content"}), "without zeros")
    refuses(FileNotFoundError, lambda: guest.register(add_file + "-absent"))
    return guest.register(add_file)


def models_run(guest, model):
    expected = x + numpy.array([1, 2], numpy.float32)
    [y] = guest.run(model, {"x": x})
    assert y.dtype == numpy.float32 and (y == expected).all(), y
    [y] = guest.run(model, [x[::-1]], ["y"])
    assert (y == expected[::-1]).all(), "rows that do not lie one behind the other"
    [y] = guest.run(model, [x.astype(">f4")])
    assert (y == expected).all(), "numbers of the other byte order"
    [y] = guest.run(model, [numpy.asarray(x, ml_dtypes.bfloat16)])
    assert y.dtype == numpy.float32 and (y == expected).all()
    # An output far longer than the last: it finds a place all the same.
    many = numpy.arange(200_000, dtype=numpy.float32).reshape(-1, 2)
    for inputs in (many, x, many):
        [y] = guest.run(model, [inputs])
        assert (y == inputs + numpy.array([1, 2], numpy.float32)).all()
    assert y.flags.writeable
    refuses(vaccel.Error, lambda: guest.run(model, {"x": x}, ["z"]), "BAD_ARGUMENT")
    refuses(vaccel.Error, lambda: guest.run(model, {"x": x[0]}), "inputs[0].shape")
    refuses(TypeError, lambda: guest.run(model, {"x": x.astype(complex)}), "complex")
    refuses(ValueError, lambda: guest.run(None, {"x": x}), "expected a model")
    for none in ("", "n" * 65):
        refuses(ValueError, lambda: guest.run(none, {"x": x}), "1 to 64 bytes")
    refuses(vaccel.Error, lambda: guest.run("absent", {"x": x}), "NOT_FOUND")
    with vaccel.Guest(address, reply_type="bfloat16", shared_bytes=0, engine="tract") as other:
        [y] = other.run(other.register(add_file), {"x": x})
        assert y.dtype == numpy.float32 and (y == expected).all()
    with vaccel.Guest(address, reply_type="float16", repeatable=False, awake=False) as other:
        model = other.register(add_file)
        [y] = other.run(model, {"x": x})
        assert y.dtype == numpy.float16 and (y == expected).all()
        error = refuses(vaccel.Error, lambda: other.run(model, {"x": many}), "outputs[0]: expected a place for")
        assert error.may_have_run
    with vaccel.Guest(address, hints=2) as other:
        refuses(vaccel.Error, other.open)


def models_of_the_host_go_by_their_names(guest):
    more = x + numpy.array([1, 2], numpy.float32)
    for name, wanted in ((None, [x, more]), (["more", "same"], [more, x]), (["more"], [more])):
        for rows in (1, 3, 2):
            came = guest.run(vaccel.Resource("both"), {"x": x[:rows]}, name)
            assert len(came) == len(wanted) and all((y == z[:rows]).all() for y, z in zip(came, wanted)), came


def texts_are_elements():
    with vaccel.Guest(address, engine="onnxruntime") as other:
        texts = numpy.array([["one", b"two"], ["", "zwölf"]], object)
        for given in (texts, numpy.array([["one", "two"], ["three", "four"]])):
            [came] = other.run("strings", {"in": given})
            wanted = [[text.encode() if isinstance(text, str) else text for text in row] for row in given.tolist()]
            assert came.dtype == object and came.tolist() == wanted, came
        refuses(TypeError, lambda: other.run("strings", {"in": numpy.array([[1, "one"]], object)}), "expected texts")
        refuses(vaccel.Error, lambda: other.run("strings", {"in": numpy.array([[b"\xff", "one"]], object)}), "UTF-8")


def operations_go_by_number(guest):
    a, b, c = (numpy.array(numbers, numpy.float32) for numbers in ([1, 2, 3, 4], [5, 6, 7, 8], [0] * 4))
    assert guest.genop(21, [a, b], [c]) == [4] and (c == a + b).all(), c
    square = numpy.arange(9, dtype=numpy.float32).reshape(3, 3)
    assert (guest.sgemm(square, square) == square @ square).all()
    wide, tall = square[:2], square[:, :1]
    assert (guest.sgemm(wide, tall, c=[[1], [2]], alpha=2, beta=3) == 2 * (wide @ tall) + [[3], [6]]).all()
    assert (guest.sgemm(square.T, square) == square.T @ square).all()
    refuses(ValueError, lambda: guest.sgemm(square, wide), "(3, 3) and (2, 3)")
    refuses(ValueError, lambda: guest.sgemm(square, square, c=wide), "expected c of shape")
    refuses(vaccel.Error, lambda: guest.genop(24), "UNKNOWN_OPERATION")
    refuses(vaccel.Error, lambda: guest.genop(21, ["text", b"bytes", 1, 2.0], [c]), "BAD_ARGUMENT")
    refuses(TypeError, lambda: guest.genop(21, [a, b], [c[::2]]), "dense")
    refuses(TypeError, lambda: guest.genop(21, [a, b], [[0.0] * 4]), "expected arrays to write")


def threads_take_turns(guest, model):
    wrong = []

    def call(number):
        for _ in range(50):
            [y] = guest.run(model, {"x": x * number})
            if not (y == x * number + numpy.array([1, 2], numpy.float32)).all():
                wrong.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def an_agent_that_was_restarted_knows_no_session(guest, model):
    print("restart", flush=True)
    sys.stdin.readline()
    error = refuses(vaccel.Error, lambda: guest.run(model, {"x": x}))
    assert error.session_lost, error
    assert guest.run(guest.register(add_file), {"x": x})[0].shape == (3, 2)


the_module_has_what_the_header_declares()
what_is_no_guest_is_refused()
with vaccel.Guest(address, token="nobody asks for it", deadline=30) as guest:
    the_agent_tells_what_it_is(guest)
    images_get_labels(guest)
    things_in_images_have_places(guest)
    model = resources_are_held(guest)
    models_run(guest, model)
    models_of_the_host_go_by_their_names(guest)
    texts_are_elements()
    operations_go_by_number(guest)
    threads_take_turns(guest, model)
    an_agent_that_was_restarted_knows_no_session(guest, model)
print("everything holds")
