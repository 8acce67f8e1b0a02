"""Hostile checkpoints: each is refused with its name and place, and leaves no trace; none takes time or memory."""

import base64
import copy
import io
import pickle
import re
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from madjax.interop.backdoorbench import load_backdoorbench
from madjax.interop.torch_checkpoint import load_torch_checkpoint

CANARY = "madjax_canary"
COMMAND = f"touch {CANARY}"
SYSTEM_INFO = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
LEGACY_HEAD = b"".join(pickle.dumps(item, 2) for item in (0x1950A86A20F9469CFC6C, 1001, SYSTEM_INFO))


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(*values):
    return b"(" + b"".join(map(number, values)) + b"t"


def name(dotted):
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(dotted, *arguments):
    return name(dotted) + b"(" + b"".join(arguments) + b"tR"


def storage(count, key="0", kind="torch.FloatStorage"):
    return b"(" + text("storage") + name(kind) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(count, shape, strides, offset=0):
    arguments = storage(count), number(offset), numbers(*shape), numbers(*strides), b"\x89"
    return call("torch._utils._rebuild_tensor_v2", *arguments, call("collections.OrderedDict"))


def write_zip(path, body, storages=(), **others):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", body)
        for key, data in enumerate(storages):
            archive.writestr(f"x/data/{key}", data)
        for entry, data in others.items():
            archive.writestr(f"x/{entry}", data)
    return path


def legacy(body, storages=()):
    """`storages`: float32 arrays."""
    keys = pickle.dumps([str(key) for key in range(len(storages))], 2)
    return LEGACY_HEAD + body + keys + b"".join(struct.pack("<q", len(s)) + s.tobytes() for s in storages)


SYSTEM = call("os.system", text(COMMAND))
DTYPE_U1 = call("numpy.dtype", text("u1"))
DTYPE_O = call("numpy.dtype", text("O8"), b"K\x00K\x01")
ARRAY = call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), b"K\x00\x85", text("b"))

NAMES = """
os.system os.popen os.execv posix.system nt.system subprocess.Popen subprocess.check_output builtins.eval builtins.exec
builtins.compile builtins.__import__ builtins.getattr builtins.setattr builtins.globals builtins.open builtins.object
builtins.print __builtin__.eval __builtin__.file importlib.import_module importlib.util.find_spec runpy._run_code
runpy.run_path torch.storage._load_from_bytes torch.load torch.hub.load torch.jit.load torch.serialization.load
torch._utils._rebuild_from_type_v2 torch.utils.collect_env.run numpy.load numpy.f2py.compile
numpy.testing._private.utils.runstring numpy.core.multiarray.fromfile pickle.loads _pickle.loads pickle.Unpickler
dill.loads codecs.encode codecs.decode _codecs.decode webbrowser.open pip.main pip._internal.main copyreg._reconstructor
copyreg.add_extension copy_reg.__newobj__ operator.attrgetter operator.methodcaller functools.partial types.FunctionType
types.CodeType ctypes.CDLL socket.create_connection shutil.rmtree timeit.timeit cProfile.run pdb.run pty.spawn
code.InteractiveInterpreter collections.UserDict collections.OrderedDict.__init__ numpy.ndarray.tofile
argparse.Namespace PIL.Image.open madjax.interop.torch_checkpoint._Machine
""".split()  # noqa: SIM905

# made with fickling 0.1.12 from pickle.dumps({"state_dict": {"a": 1}}, protocol=2)
FICKLING = {
    "insert_python_eval": (
        "gAJjYnVpbHRpbnMKZXZhbAoojC5fX2ltcG9ydF9fKCdvcycpLnN5c3RlbSgndG91Y2ggbWFkamF4X2NhbmFyeScpdFJ9cQBYCgAAAHN0YXRlX2"
        "RpY3RxAX1xAlgBAAAAYXEDSwFzc3AzMjE5ODcKMDBnMzIxOTg3Ci4=",
        "builtins.eval",
    ),
    "insert_python_eval(run_first=False)": (
        "gAJjYnVpbHRpbnMKZXZhbAoojC5fX2ltcG9ydF9fKCdvcycpLnN5c3RlbSgndG91Y2ggbWFkamF4X2NhbmFyeScpdH1xAFgKAAAAc3RhdGVfZG"
        "ljdHEBfXECWAEAAABhcQNLAXNzlDBSMGc0Ci4=",
        "builtins.eval",
    ),
    "insert_python_eval(use_output_as_unpickle_result=True)": (
        "gAJjYnVpbHRpbnMKZXZhbAoojC5fX2ltcG9ydF9fKCdvcycpLnN5c3RlbSgndG91Y2ggbWFkamF4X2NhbmFyeScpdH1xAFgKAAAAc3RhdGVfZG"
        "ljdHEBfXECWAEAAABhcQNLAXNzMFIu",
        "builtins.eval",
    ),
    "insert_python_exec": (
        "gAJjYnVpbHRpbnMKZXhlYwoojBlvcGVuKCdtYWRqYXhfY2FuYXJ5JywndycpdFJ9cQBYCgAAAHN0YXRlX2RpY3RxAX1xAlgBAAAAYXEDSwFzc3"
        "AzMjE5ODcKMDBnMzIxOTg3Ci4=",
        "builtins.exec",
    ),
    "insert_python(module='os')": (
        "gAJjb3MKc3lzdGVtCiiME3RvdWNoIG1hZGpheF9jYW5hcnl0Un1xAFgKAAAAc3RhdGVfZGljdHEBfXECWAEAAABhcQNLAXNzcDMyMTk4NwowMG"
        "czMjE5ODcKLg==",
        "os.system",
    ),
    "append_python": (
        "gAJ9cQBYCgAAAHN0YXRlX2RpY3RxAX1xAlgBAAAAYXEDSwFzc2NidWlsdGlucwpleGVjCiiMGW9wZW4oJ21hZGpheF9jYW5hcnknLCd3Jyl0Ui"
        "4=",
        "builtins.exec",
    ),
    "insert_function_call_on_unpickled_object": (
        "gAJ9cQBYCgAAAHN0YXRlX2RpY3RxAX1xAlgBAAAAYXEDSwFzc2NidWlsdGlucwpleGVjCiiMOGRlZiBmKG9iaik6CiAgICBvcGVuKCdtYWRqYX"
        "hfY2FuYXJ5JywndycpCiAgICByZXR1cm4gb2JqdFIwY2J1aWx0aW5zCmV2YWwKKIwBZnRScDEKMHAyCjBnMQooZzIKdFIu",
        "builtins.eval|builtins.exec",
    ),
}
PAYLOADS = {
    **{dotted: (call(dotted, text(COMMAND)), f"names {dotted} at") for dotted in NAMES},
    **{f"fickling {how}": (base64.b64decode(data)[2:-1], f"names ({who}) at") for how, (data, who) in FICKLING.items()},
    "in a list": (b"](" + SYSTEM + b"K\x01e", "names os.system at"),
    "a dict key": (b"}" + SYSTEM + b"K\x01s", "names os.system at"),
    "a dict key, after arrays": (
        b"}" + text("a") + tensor(1, (1,), (1,)) + b"s" + SYSTEM + b"Ns",
        "names os.system at",
    ),
    "in OrderedDict's arguments": (call("collections.OrderedDict", b"](", SYSTEM, b"e"), "names os.system at"),
    "in OrderedDict's state": (call("collections.OrderedDict") + b"}" + SYSTEM + b"Nsb", "names os.system at"),
    "in a set": (b"\x8f(" + SYSTEM + b"\x90", "names os.system at"),
    "in a tensor's hooks": (
        call("torch._utils._rebuild_tensor_v2", storage(1), b"K\x00))\x89", SYSTEM),
        "names os.system at",
    ),
    "in a storage": (b"(" + text("storage") + SYSTEM + b"NNNtQ", "names os.system at"),
    "in a parameter's state": (
        call("torch._utils._rebuild_parameter_with_state", tensor(1, (1,), (1,)), b"\x89N", SYSTEM),
        "names os.system at",
    ),
    "in an object array": (
        ARRAY + b"(K\x01K\x01\x85" + DTYPE_O + b"\x89](" + SYSTEM + b"etb",
        "names os.system at",
    ),
    "as an array's class": (
        call("numpy._core.multiarray._reconstruct", name("subprocess.Popen"), b"K\x00\x85", text("b")),
        "names subprocess.Popen at",
    ),
    "an allowed name as an array's class": (
        call("numpy._core.multiarray._reconstruct", name("collections.OrderedDict"), b"K\x00\x85", text("b")),
        "asked for collections.OrderedDict, wanted numpy.ndarray",
    ),
    "an array's class as text": (
        call("numpy._core.multiarray._reconstruct", text("numpy.ndarray"), b"K\x00\x85", text("b")),
        "asked for numpy.ndarray, wanted numpy.ndarray",
    ),
    "an object scalar": (call("numpy.core.multiarray.scalar", DTYPE_O, text("x")), "scalar of object is malformed"),
    "a defaultdict's factory": (call("collections.defaultdict", name("os.getcwd")), "names os.getcwd at"),
    "an allowed name as factory": (
        call("collections.defaultdict", name("collections.OrderedDict")),
        "defaultdict of collections.OrderedDict is refused",
    ),
    "INST": (b"(" + text(COMMAND) + b"ios\nsystem\n", "names os.system at"),
    "OBJ": (b"(cos\nsystem\n" + text(COMMAND) + b"o", "names os.system at"),
    "OBJ of an allowed name": (b"(ccollections\nOrderedDict\no", "uses the opcode OBJ at"),
    "NEWOBJ": (b"cos\nsystem\n" + text(COMMAND) + b"\x85\x81", "names os.system at"),
    "NEWOBJ of an allowed name": (b"ccollections\nOrderedDict\n)\x81", "uses the opcode NEWOBJ at"),
    "NEWOBJ_EX": (b"ccollections\nOrderedDict\n)}\x92", "uses the opcode NEWOBJ_EX at"),
    "STACK_GLOBAL": (text("os") + text("system") + b"\x93" + text(COMMAND) + b"\x85R", "names os.system at"),
    "STACK_GLOBAL through the memo": (
        text("system") + b"q\x00" + text("os") + b"q\x0100h\x01h\x00\x93" + text(COMMAND) + b"\x85R",
        "names os.system at",
    ),
    "STACK_GLOBAL of a dotted attribute": (
        text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93",
        "names collections.OrderedDict.__init__.__globals__ at",
    ),
    "STACK_GLOBAL of what is no text": (b"]" + text("system") + b"\x93", "names a list.system at"),
    "EXT1": (b"\x82\x01", "uses the opcode EXT1 at"),
    "EXT2": (b"\x83\x01\x00", "uses the opcode EXT2 at"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "uses the opcode EXT4 at"),
    "PERSID": (b"Pstorage\n", "uses the opcode PERSID at"),
    "a persistent id of something else": (text("module") + b"Q", "refers to something that is no whole storage at"),
    "a buffer outside": (b"\x97", "uses the opcode NEXT_BUFFER at"),
    "BUILD on a class": (
        b"ccollections\nOrderedDict\n}" + text("__init__") + name("numpy.dtype") + b"sb",
        "sets the state of a Name at",
    ),
    "BUILD on a tensor": (tensor(1, (1,), (1,)) + b"}" + text("array") + text("x") + b"sb", "the state of a Tensor at"),
    "BUILD on a list": (b"]}b", "sets the state of a list at"),
    "a call of text": (text("os.system") + text(COMMAND) + b"\x85R", "calls os.system at"),
    "a call of an allowed name as text": (text("builtins.bytes") + b")R", "calls builtins.bytes at"),
    "a call of a class that is only a name": (call("numpy.ndarray", b"K\x01"), "calls numpy.ndarray at"),
    "a call of a storage": (call("torch.FloatStorage", b"K\x01"), "calls torch.FloatStorage at"),
    "a structured dtype": (call("numpy.dtype", text("V8"), b"K\x00K\x01"), "dtype V8 is refused"),
    "a dtype that spells a bomb": (call("numpy.dtype", text("(9999999,9)f8"), b"K\x00K\x01"), "dtype .* is refused"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the payloads leave their canary
    return tmp_path


def refusal(path, read=load_torch_checkpoint):
    with pytest.raises(ValueError, match=r"^path: ") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert not Path(CANARY).exists()
    return str(caught.value)


@pytest.mark.parametrize("container", ["zip", "legacy", "legacy's first pickle"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_is_refused_and_leaves_no_trace(folder, payload, container):
    body, offender = PAYLOADS[payload]
    body = b"\x80\x02" + body + b"."
    path, data = folder / "x.pt", body
    if container == "zip":
        write_zip(path, body, [bytes(4)])
    else:
        data = legacy(body, [np.zeros(1, np.float32)]) if container == "legacy" else body
        path.write_bytes(data)
    message = refusal(path)
    place = re.search(offender + r"( byte (\d+), which is refused; nothing was run$)?", message)
    assert place, message
    if offender.endswith(" at"):
        assert data[int(place.groups()[-1])] in b"ci\x93Ro\x81\x92\x82\x83\x84PQ\x97b"


@pytest.mark.parametrize(
    "payload", ["os.system", "fickling insert_python_eval", "STACK_GLOBAL through the memo", "INST"]
)
def test_the_payloads_do_run_elsewhere(folder, payload):
    pickle.loads(b"\x80\x04" + PAYLOADS[payload][0] + b".")
    assert Path(CANARY).exists()


@pytest.mark.parametrize("payload", ["os.system", "builtins.eval", "in an object array", "EXT1"])
def test_a_payload_in_an_attack_result(folder, payload):
    body, offender = PAYLOADS[payload]
    write_zip(folder / "attack_result.pt", b"\x80\x02}" + text("bd_test") + body + b"s.")
    assert offender in refusal(folder, load_backdoorbench)
    assert offender in refusal(folder / "attack_result.pt", load_backdoorbench)


def test_the_name_comes_on_one_line_whatever_it_holds(folder):
    path = write_zip(folder / "x.pt", text("a\nb\x1b[2J" + "c" * 9999) + text("d") + b"\x93.")
    message = refusal(path)
    assert r"a\nb\x1b[2Jccc" in message
    assert len(message) < 400


# what would fill the memory or the stack: (pickle, bytes of storage 0, message)
BOMBS = {
    "a long": (b"\x8b\xff\xff\xff\x7f", "no whole torch checkpoint"),
    "a text": (b"X\xff\xff\xff\xff", "no whole torch checkpoint"),
    "a text of 8 bytes": (b"\x8d" + b"\xff" * 7 + b"\x00", "no whole torch checkpoint"),
    "bytes": (b"\x8e" + b"\xff" * 7 + b"\x00", "no whole torch checkpoint"),
    "a bytearray": (b"\x96" + b"\xff" * 7 + b"\x00", "no whole torch checkpoint"),
    "digits": (b"I" + b"9" * 10**5 + b"\n", "no whole torch checkpoint"),
    "bytearray(count)": (call("builtins.bytearray", number(2**40)), "no whole torch checkpoint"),
    "a storage": (storage(2**40), "storage 0 of 1099511627776 float32 has 4 bytes"),
    "a storage of negative size": (storage(-1), "malformed storage"),
    "a tensor of stride 0": (tensor(1, (2**20, 2**20), (0, 0)), "unfolds to more than 8 times its size"),
    "many tensors of stride 0": (b"](" + tensor(1, (2**17,), (0,)) * 20 + b"e", "unfolds to more than 8 times"),
    "a tensor beyond its storage": (tensor(1, (2,), (1,)), "reaches beyond its storage"),
    "a tensor that starts beyond": (tensor(1, (1,), (1,), 1), "reaches beyond its storage"),
    "a tensor of negative offset": (tensor(1, (1,), (1,), -1), "malformed shape, strides or offset"),
    "a tensor of negative stride": (tensor(1, (1,), (-1,)), "malformed shape, strides or offset"),
    "a tensor of shapes beyond 64 bits": (tensor(1, (0, 2**63), (1, 1)), "malformed shape, strides or offset"),
    "an array without its bytes": (
        ARRAY + b"(K\x01" + numbers(2**40) + call("numpy.dtype", text("f8"), b"K\x00K\x01") + b"\x89C\x00tb",
        "does not have the bytes",
    ),
    "texts from one": (text("x" * 10**5) + b"q\x000](" + call("_codecs.encode", b"h\x00", text("latin1")) * 999 + b"e",
                       "unfolds to more than 8 times"),
    **{
        f"{kind}s from one list": (
            b"](" + b"".join(map(number, range(10**3))) + b"eq\x000](" + call(kind, b"h\x00") * 999 + b"e",
            "unfolds to more than 8 times",
        )
        for kind in ("builtins.set", "builtins.frozenset", "torch.Size")
    },
    "frozensets from one set": (
        b"\x8f(" + b"".join(map(number, range(10**3))) + b"\x90q\x000]("
        + call("builtins.frozenset", b"h\x00") * 999 + b"e",
        "unfolds to more than 8 times",
    ),
    "object arrays from one list": (
        b"](" + b"N" * 10**4 + b"eq\x000]("
        + (ARRAY + b"(K\x01" + numbers(10**4) + DTYPE_O + b"\x89h\x00tb") * 199 + b"e",
        "unfolds to more than 8 times",
    ),
    "arrays from one text": (
        text("x" * 10**5) + b"q\x000(K\x01" + number(10**5) + b"\x85" + DTYPE_U1 + b"\x89h\x00tq\x010]("
        + (ARRAY + b"h\x01b") * 999 + b"e",
        "unfolds to more than 8 times",
    ),
    "arrays of text from one content": (
        b"B" + struct.pack("<I", 4 * 10**5) + b"a\0\0\0" * 10**5 + b"q\x000(K\x01K\x01\x85"
        + call("numpy.dtype", text("U100000")) + b"\x89h\x00tq\x010](" + (ARRAY + b"h\x01b") * 99 + b"e",
        "unfolds to more than 8 times",
    ),
    "sets": (b"](" + b"\x8f" * 2**16 + b"e", "unfolds to more than 8 times"),
    "dicts": (b"](" + b"}" * 2**18 + b"e", "unfolds to more than 8 times"),
    "dicts by calls": (
        name("collections.OrderedDict") + b"q\x000](" + b"h\x00)R" * 2**18 + b"e", "unfolds to more than 8 times"
    ),
    "places in the memo": (b"N" + b"\x94" * 2**19, "unfolds to more than 8 times"),
    "tensors of nothing": (
        storage(1) + b"q\x000(h\x00K\x00))\x89Ntq\x010" + name("torch._utils._rebuild_tensor_v2") + b"q\x020]("
        + b"h\x02h\x01R" * 2**15 + b"e",
        "unfolds to more than 8 times",
    ),
    "marks": (b"(" * 2**20, "nested deeper than 100 levels"),
    "arguments from one tuple": (
        b"(" + text("u1") + b"N" * 10**4 + b"tq\x000" + name("numpy.dtype") + b"q\x010](" + b"h\x01h\x00R" * 999 + b"e",
        "unfolds to more than 8 times",
    ),
    "states from one tuple": (
        b"(K\x03" + text("|") + b"N" * 10**4 + b"tq\x000" + DTYPE_U1 + b"h\x00b" * 999, "unfolds to more than 8 times"
    ),
    "a long tuple as a key": (b"}(" + b"N" * 17 + b"tNs", "a tuple stands as a dict key"),
    "a tuple in a tuple as a key": (b"})\x85Ns", "a tuple stands as a dict key"),
    "many tuples as keys": (
        b"\x8f(" + b"".join(number(n) + b"\x85" for n in range(4097)) + b"\x90", "more than 4096 tuples stand as dict"
    ),
    "many tuples as keys by calls": (
        name("builtins.set") + b"](" + b"".join(number(n) + b"\x85" for n in range(4097)) + b"e\x85R",
        "more than 4096 tuples stand as dict",
    ),
    "a number of 65 bits as a key": (b"}" + number(2**64) + b"Ns", "a int stands as a dict key"),
    "a negative number of 65 bits in a set": (b"\x8f(" + number(-(2**63) - 1) + b"\x90", "a int stands as a dict key"),
    "a number of 65 bits in a tuple": (b"}" + number(2**64) + b"\x85Ns", "a tuple stands as a dict key"),
    "a long text as a key": (b"}" + text("x" * 4097) + b"Ns", "a str stands as a dict key"),
    "a complex number as a key": (
        b"}" + call("numpy.core.multiarray.scalar", call("numpy.dtype", text("c8")), b"C\x08" + bytes(8)) + b"Ns",
        "a complex64 stands as a dict key",
    ),
    "a long text as a storage's": (storage(1, "0" * 4097), "a str stands as a dict key"),
    "a scalar of no character": (
        call("numpy.core.multiarray.scalar", call("numpy.dtype", text("U1")), b"C\x04" + b"\xff" * 4), "is no character"
    ),
    "an array of no character": (
        ARRAY + b"(K\x01K\x01\x85" + call("numpy.dtype", text("U1")) + b"\x89C\x04" + b"\xff" * 4 + b"tb",
        "is no character",
    ),
    "nested lists": (b"]" * 30000 + b"a" * 29999, "nested deeper than 100 levels"),
    "nested tuples": (b")" + b"\x85" * 30000, "nested deeper than 100 levels"),
    "nested dicts": (b"}" + b"K\x00}" * 10**4 + b"s" * 10**4, "nested deeper than 100 levels"),
    "a list in itself": (b"]q\x00h\x00a", "or contains itself"),
    "a deep tuple as a key": (b"})" + b"\x85" * 30000 + b"Ns", "a tuple stands as a dict key"),
    "a deep tuple in a set": (b"\x8f()" + b"\x85" * 30000 + b"\x90", "a tuple stands as a dict key"),
    "a deep tuple as a device": (call("torch.device", b")" + b"\x85" * 30000), "has a tuple where a str belongs"),
    "a deep tuple as a dtype": (
        call("torch._utils._rebuild_tensor_v3", storage(1), b"K\x00))\x89N)" + b"\x85" * 30000),
        "a tensor of a tuple is refused",
    ),
    "two sizes of one storage": (storage(1) + b"0" + storage(2), "storage 0 is declared twice"),
    "a missing storage": (storage(1, "9"), "no whole torch checkpoint"),
    "a mark left over": (b"((", "no whole torch checkpoint"),
    "a dict of odd length": (b"(K\x00d", "no whole torch checkpoint"),
    "a memo never written": (b"j\xff\xff\xff\xff", "no whole torch checkpoint"),
}  # fmt: skip


@pytest.fixture
def frugal():
    """Fails where a test had more than 64 MiB at a time."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_takes_memory(folder, frugal, bomb):
    body, problem = BOMBS[bomb]
    assert problem in refusal(write_zip(folder / "x.pt", b"\x80\x02" + body + b".", [bytes(4)]))


def test_small_objects_of_an_honest_file(folder):
    """They may be many, and be keys."""
    honest = [{"index": n, n: (n, 1), (n % 99, "x"): {n, None, 2.5, "y"}} for n in range(4096)] + [[]] * 9
    honest += [(n, {}) for n in range(10**5)]
    loaded = load_torch_checkpoint(write_zip(folder / "x.pt", pickle.dumps(honest, 2)))
    assert loaded == honest


@pytest.mark.parametrize(
    ("error", "problem"), [(MemoryError(), "takes more memory than there is"), (PermissionError("no"), r"\(no\)")]
)
def test_what_the_machine_cannot_read(folder, monkeypatch, error, problem):
    def read_bytes(path):
        raise error

    (folder / "x.pt").touch()
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert re.search(problem, refusal(folder / "x.pt"))


def test_a_high_memo_index_costs_nothing(folder, frugal):
    assert load_torch_checkpoint(write_zip(folder / "x.pt", b"\x80\x02}r\xff\xff\xff\xff.")) == {}


def test_shared_lists_stay_shared(folder, frugal):
    """A billion laughs: 60 levels of ten references each are 60 lists."""
    levels = b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(60))
    loaded = load_torch_checkpoint(write_zip(folder / "x.pt", b"\x80\x02]q\x00" + levels + b"."))
    assert loaded[0] is loaded[9]


def patched(path, change):
    """The archive with its directory changed, which is written last."""
    with zipfile.ZipFile(path, "a") as archive:
        change(archive.filelist)
        archive._didModify = True
    return path


def grow(entries):
    entries += [copy.copy(entries[1]) for _ in range(9)]
    for number, entry in enumerate(entries[2:]):
        entry.filename = f"x/data/{number + 1}"


def encrypt(entries):
    entries[0].flag_bits |= 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda entries: entries.append(copy.copy(entries[0])), "two entries of one name"),
        (grow, "declares"),
        (encrypt, "compressed or encrypted"),
        (lambda entries: entries.pop(0), "wanted one data.pkl in the archive, got 0"),
        (lambda entries: setattr(entries[1], "filename", "y/data.pkl"), "wanted one data.pkl in the archive, got 2"),
        (lambda entries: setattr(entries[1], "file_size", 2**50), "declares"),
        (lambda entries: setattr(entries[0], "compress_type", 99), "compressed or encrypted"),
    ],
)
def test_the_directory_of_the_archive(folder, frugal, change, problem):
    path = write_zip(folder / "x.pt", tensor(250, (250,), (1,)) + b".", [bytes(1000)])
    assert problem in refusal(patched(path, change))


def test_a_zip_bomb(folder, frugal):
    with zipfile.ZipFile(folder / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", storage(2**24) + b".")
        archive.writestr("x/data/0", bytes(2**20))
    assert "compressed or encrypted" in refusal(folder / "x.pt")


def test_big_endian_files(folder):
    assert "big-endian" in refusal(write_zip(folder / "x.pt", b"}.", byteorder="big"))
    head = LEGACY_HEAD.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    assert head != LEGACY_HEAD
    (folder / "y.pt").write_bytes(head + b"}.]." * 2)
    assert "big-endian" in refusal(folder / "y.pt")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [(["0", "0"], "lists a storage twice"), ([], "cut off"), (["1"], "no whole torch"), ([["0"]], "a list stands")],
)
def test_the_storages_of_a_legacy_file(folder, keys, problem):
    tail = struct.pack("<q", 1) + bytes(4)
    (folder / "x.pt").write_bytes(LEGACY_HEAD + tensor(1, (1,), (1,)) + b"." + pickle.dumps(keys, 2) + tail * 2)
    assert problem in refusal(folder / "x.pt")


def honest(container):
    values = np.arange(6, dtype=np.float32)
    body = b"\x80\x02}" + text("w") + tensor(6, (2, 3), (3, 1)) + b"s"
    for key, value in {"array": np.arange(3), "scalar": np.float64(2), "names": np.array(["a", None], object)}.items():
        body += text(key) + pickle.dumps(value, 2)[2:-1] + b"s"
    if container == "legacy":
        return legacy(body + b".", [values])
    file = io.BytesIO()
    write_zip(file, body + b".", [values.tobytes()], byteorder="little")
    return file.getvalue()


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_the_honest_file_loads_and_none_of_its_beginnings(folder, container):
    whole, path = honest(container), folder / "x.pt"
    path.write_bytes(whole)
    loaded = load_torch_checkpoint(path)
    np.testing.assert_array_equal(loaded["w"], np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(loaded["array"], np.arange(3))
    assert loaded["scalar"] == 2
    assert loaded["names"].tolist() == ["a", None]
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        refusal(path)


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
def test_damaged_bytes_are_refused_or_harmless(folder, container):
    rng, whole, path = np.random.default_rng(0), honest("legacy" if container == "legacy" else "zip"), folder / "x.pt"
    if container == "pickle":  # without the checksums of the archive in the way
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            whole = archive.read("x/data.pkl")
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] = rng.integers(256)
        if container == "pickle":
            write_zip(path, bytes(data), [bytes(24)])
        else:
            path.write_bytes(data)
        try:
            load_torch_checkpoint(path)
            outcomes.add("read")
        except ValueError as error:
            assert str(error).startswith("path: ")  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            outcomes.add("refused")
    assert "refused" in outcomes
    assert not Path(CANARY).exists()
