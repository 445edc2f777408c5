"""Files of PyTorch are read without PyTorch, and none of them can do anything but be read."""

import builtins
import collections
import os
import pickle
import shutil
import struct
import zipfile
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from clip_jax.weights import WeightsError
from clip_jax.weights.tensor_files import read_tensors
from clip_jax.weights.torch_file import TorchFileError, read_torch_file, write_torch_file

DTYPES = ("float16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", ml_dtypes.bfloat16)


class Call(NamedTuple):
    """A function's name, as ``module name``, and what the pickle asks to call it with."""

    name: str
    arguments: tuple


class Object(NamedTuple):
    """An object of a class of TorchScript with these attributes."""

    name: str
    attributes: dict


class Storage(NamedTuple):
    kind: str
    key: str
    length: int


def opcodes(value) -> bytes:
    """As PyTorch pickles a value, but for whatever the types above ask for."""
    match value:
        case Call():
            return f"c{value.name}\n".replace(" ", "\n").encode() + opcodes(value.arguments) + b"R"
        case Object():
            return f"c{value.name}\n".replace(" ", "\n").encode() + b")\x81" + opcodes(value.attributes) + b"b"
        case Storage():
            kind = f"ctorch\n{value.kind}\n".encode()
            return b"(" + opcodes("storage") + kind + b"".join(map(opcodes, (value.key, "cpu", value.length))) + b"tQ"
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        case int():
            return b"\x8a\x20" + value.to_bytes(32, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case dict():
            return b"}(" + b"".join(opcodes(part) for item in value.items() for part in item) + b"u"
    raise TypeError(value)


def tensor(key="0", offset=0, shape=(2, 3), strides=(3, 1), kind="FloatStorage", length=6):
    hooks = Call("collections OrderedDict", ())
    return Call("torch._utils _rebuild_tensor_v2", (Storage(kind, key, length), offset, shape, strides, False, hooks))


def archive(path, program, members=None, compression=zipfile.ZIP_STORED):
    """A file of PyTorch with this pickle, and six float32 from 0 as the storage "0"."""
    members = {"data/0": np.arange(6, dtype="<f4").tobytes(), **(members or {})}
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("any/data.pkl", program)
        for name, content in members.items():
            file.writestr(f"any/{name}", content)
    return path


def saved(path, value, **members):
    return archive(path, b"\x80\x02" + opcodes(value) + b".", members)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pt"


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(actual[name], array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(file, dtype):
    numbers = np.random.default_rng(0).integers(-100, 100, 24)
    tensors = {
        "matrix": numbers.reshape(4, 6).astype(dtype),
        "transposed": numbers.reshape(4, 6).astype(dtype).T,
        "strided": numbers.reshape(2, 3, 4).astype(dtype)[:, ::-1, ::2],
        "scalar": numbers[0].astype(dtype),
        "empty": np.zeros((0, 3), dtype),
        "nothing": np.zeros(0, dtype),
        "a name.of any ✓ kind": numbers[:5].astype(dtype),
    }
    write_torch_file(file, tensors)
    assert_same(read_torch_file(file), tensors)
    assert_same(read_torch_file(str(file)), tensors)


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_torch_file(tmp_path / name, {"a": np.arange(3)})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_is_replaced_whole_or_not_at_all(file):
    class Torn:
        dtype, shape, size, ndim = np.dtype("float32"), (2,), 2, 1

        def __array__(self, *_, **__):
            raise OSError("the disk is full")

    write_torch_file(file, {"a": np.arange(3)})
    with pytest.raises(OSError, match="the disk is full"):
        write_torch_file(file, {"a": np.zeros(9), "b": Torn()})
    with pytest.raises(TypeError, match="b is complex64, which is not written"):
        write_torch_file(file, {"b": np.zeros(9, np.complex64)})
    assert_same(read_torch_file(file), {"a": np.arange(3)})
    assert list(file.parent.iterdir()) == [file]
    write_torch_file(file, {"c": np.arange(4)})
    assert_same(read_torch_file(file), {"c": np.arange(4)})


NUMBERS = np.arange(6, dtype=np.float32)
OTHER_THINGS = {
    "epoch": 3,
    "name": "run",
    "best": 0.5,
    "done": False,
    "device": Call("torch device", ("cpu",)),
    "scheduler": {"milestones": Call("collections Counter", ({3: 1},)), "size": Call("torch Size", ((2, 3),))},
    "optimizer": {"state": {0: {"step": tensor(shape=(), strides=()), "exp_avg": tensor()}}, "param_groups": [{}]},
}


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_the_state_dict_of_a_training_checkpoint_is_found(file, key):
    parameter = Call("torch._utils _rebuild_parameter", (tensor(), True, Call("collections OrderedDict", ())))
    state = {"a.weight": parameter, "b": tensor(), "_extra_state": None}
    expected = {"a.weight": NUMBERS.reshape(2, 3), "b": NUMBERS.reshape(2, 3)}
    assert_same(read_torch_file(saved(file, {**OTHER_THINGS, key: state})), expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.clip."])
def test_the_prefixes_of_wrappers_that_all_names_share_are_removed(file, prefix):
    path = saved(file, {f"{prefix}a": tensor(), f"{prefix}b": tensor()})
    assert list(read_tensors(path)[0]) == ["a", "b"]


def test_a_prefix_that_only_some_names_have_stays(file):
    assert list(read_tensors(saved(file, {"model.a": tensor(), "b": tensor()}))[0]) == ["model.a", "b"]


def test_wrapped_towers_and_a_temperature_beside_them_are_read(file):
    names = ["visual.module.a", "transformer._orig_mod.b", "text.module._orig_mod.c", "logit_scale"]
    unwrapped = ["visual.a", "transformer.b", "text.c", "logit_scale"]
    assert list(read_tensors(saved(file, {name: tensor() for name in names}))[0]) == unwrapped
    held = {f"model.{name}": tensor() for name in names[:3]} | {"logit_scale": tensor()}
    assert list(read_tensors(saved(file, held))[0]) == unwrapped


def test_a_compiled_part_is_read_by_its_own_names_unless_both_are_there(file):
    assert list(read_tensors(saved(file, {"a._orig_mod.b": tensor()}))[0]) == ["a.b"]
    with pytest.raises(WeightsError, match="with and without"):
        read_tensors(saved(file, {"a._orig_mod.b": tensor(), "a.b": tensor()}))


def test_other_tensors_of_a_checkpoint_are_not_even_read(file):
    state = {"optimizer": {"a": tensor("missing")}, "noise": tensor("missing"), "state_dict": {"b": tensor()}}
    assert list(read_torch_file(saved(file, state))) == ["b"]


def test_the_attributes_of_torchscript_become_dotted_names(file):
    layer = Object("__torch__.torch.nn.modules.linear Linear", {"weight": tensor(), "bias": None, "training": True})
    stored = {
        "width": 7,
        "sizes": Call("torch.jit._pickle build_intlist", ([1, 2],)),
        "kept": Call("torch.jit._pickle build_tensorlist", ([tensor()],)),
        "tag": Call("torch.jit._pickle restore_type_tag", ({"a": tensor()}, "Dict[str, Tensor]")),
        "scale": tensor(shape=(), strides=(), offset=5),
        "blocks": Object("__torch__.torch.nn.modules.container.___torch_mangle_3 ModuleList", {"0": layer, "1": layer}),
    }
    square = NUMBERS.reshape(2, 3)
    expected = {"scale": np.float32(5), "blocks.0.weight": square, "blocks.1.weight": square}
    assert_same(read_torch_file(saved(file, Object("__torch__ Model", stored))), expected)


def test_views_of_one_storage_are_read_as_they_lie_in_it(file):
    views = {
        "all": tensor(shape=(6,), strides=(1,)),
        "transposed": tensor(shape=(3, 2), strides=(1, 3)),
        "part": tensor(shape=(2,), strides=(2,), offset=1),
        "repeated": tensor(shape=(4, 2), strides=(0, 1), offset=4),
        "overlapping": tensor(shape=(4, 3), strides=(1, 1)),
    }
    expected = {
        "all": NUMBERS,
        "transposed": NUMBERS.reshape(2, 3).T,
        "part": NUMBERS[1:5:2],
        "repeated": np.tile(NUMBERS[4:], (4, 1)),
        "overlapping": np.lib.stride_tricks.sliding_window_view(NUMBERS, 3),
    }
    assert_same(read_torch_file(saved(file, views)), expected)


def refusal(file) -> str:
    """What the reader says; one line that starts with the file."""
    with pytest.raises(TorchFileError) as caught:
        read_torch_file(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and message.isprintable() and len(message) < len(str(file)) + 300
    return message


class Attack:
    """Pickled as a call of a function; ``trace`` would be there had it been called."""

    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


@pytest.fixture
def trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "trace").exists()


@pytest.mark.usefixtures("trace")
@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (Attack(os.system, "touch trace"), f"{os.name}.system"),
        (Attack(builtins.eval, "open('trace', 'w')"), "__builtin__.eval"),
        (Attack(builtins.exec, "open('trace', 'w')"), "__builtin__.exec"),
        (Attack(shutil.copytree, ".", "trace"), "shutil.copytree"),
        (Attack(getattr, Attack(__import__, "os"), "system"), "__builtin__.getattr"),
        (Attack(open, "trace", "w"), f"{open.__module__}.open"),  # "_io" from Python 3.13 on
    ],
)
def test_a_call_of_anything_else_is_refused(file, attack, name):
    nested = {"state_dict": {"a": 1}, "optimizer": {"state": [(1, {"a": attack})]}}
    for value in (attack, nested):
        message = refusal(archive(file, pickle.dumps(value, protocol=2)))
        assert f"refused: it asks to call {name}, and only tensors are read; " in message
        for protocol in (0, 1, 3, 4, 5):
            refusal(archive(file, pickle.dumps(value, protocol=protocol)))


@pytest.mark.usefixtures("trace")
@pytest.mark.parametrize(
    "program",
    [
        b"(S'touch trace'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch trace'\no.",
        b"cos\nsystem\n.",
        b"ctorch.storage\n_load_from_bytes\n(X\x01\x00\x00\x00atR.",
        b"ctorch._utils\n__builtins__\n.",
        b"ctorch\nload\n.",
        b"ctorch.hub._os\nsystem\n.",
        b"ccollections\n__builtins__\n.",
        b"ccollections\nOrderedDict.fromkeys\n.",
        b"cnumpy.core.multiarray\n_reconstruct\n.",
        b"\x82\x01.",
        b"\x83\x01\x00.",
        b"\x8c\x02os\x8c\x06system\x93.",
        b"X\x09\x00\x00\x00os.systemX\x01\x00\x00\x00a\x85R.",
        b"X\x0c\x00\x00\x00posix.system)\x81.",
        b")(X\x01\x00\x00\x00atR.",
        b"ctorch.jit._pickle\nbuild_x\ncos\nsystem\n\x85R.",
        b"cposix\\x0a\nsystem\\x1b[2J\n.",  # the name with a line break and an escape sequence
    ],
)
def test_other_ways_to_call_are_refused(file, program):
    assert "refused: " in refusal(archive(file, b"\x80\x02" + program))


@pytest.mark.parametrize(
    "program",
    [
        b"ccollections\nOrderedDict\n}X\x05\x00\x00\x00itemsK\x01sb.",  # attributes for a class
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
        b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",  # or for an object
        b"K\x01Q.",  # storages that are none
        b"(X\x07\x00\x00\x00storage)))K\x01tQ.",
        b"(X\x07\x00\x00\x00storageX\x01\x00\x00\x00a)X\x01\x00\x00\x00aX\x01\x00\x00\x00atQ.",
        b"K\x01K\x02a.",
        b"]K\x02K\x03s.",
        b"(t(t(t.",
        b"tttt.",
        b"ssss.",
        b".",
        b"0.",
        b"h\x05.",
        b"r\xff\xff\xff\x7f.",
        b"]r\xff\xff\xff\x7f.",  # Python's own reader takes gigabytes for such a number
        b"X\xff\xff\xff\xffa.",
        b"\x8b\xff\xff\xff\x7fa.",
        b"L1" + b"0" * 10_000 + b"L\n.",
        b"(" * 100_000 + b"t" * 100_000 + b".",
        b"]q\x00" + b"h\x00a" * 10 + b".",  # a list that holds itself
        b"}q\x00X\x05\x00\x00\x00modelh\x00s.",
        b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00K\x01s.",  # a key whose hash takes 2^60 steps
        b")q\x00"
        + b"h\x00h\x00\x86q\x00" * 60  # and the same as the key of a storage
        + b"}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor\n((NX\x01\x00\x00\x00bh\x00NK\x06tQK\x00))tRs.",
        b"}(K\x01u.",
        b"ccollections\nOrderedDict\n.",
        b"N.",
        b"}.",
        b"",
    ],
)
def test_a_pickle_of_no_sense_is_refused(file, program):
    refusal(archive(file, b"\x80\x02" + program))


@pytest.mark.parametrize(
    ("attribute", "loops"),
    [("own", 1), ("a" * 500, 1), ("own", 2)],
)
def test_modules_that_hold_themselves_are_refused(file, attribute, loops):
    program = b"c__torch__\nA\n)\x81q\x00}("
    for number in range(loops):
        program += opcodes(f"{attribute}{number}") + b"h\x00"
    assert "nest without end" in refusal(archive(file, b"\x80\x02" + program + b"ub."))


@pytest.mark.parametrize(
    "forged",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**70},
        {"offset": None},
        {"offset": 0.0},
        {"shape": (3, 3)},
        {"shape": (-2, -3)},
        {"shape": (2, 2**70)},
        {"shape": (2**40, 2**40), "strides": (0, 0)},
        {"shape": (2**20,), "strides": (0,)},
        {"shape": (2, True)},
        {"shape": (2, "3")},
        {"shape": (2,)},
        {"shape": 6},
        {"shape": (0, 2**62, 2**62), "strides": (1, 1, 1)},
        {"shape": (1,) * 65, "strides": (1,) * 65},
        {"shape": (2**250,) * 5_000, "strides": (1,) * 5_000},
        {"strides": (4, 1)},
        {"strides": (-3, 1)},
        {"strides": (2**62, 1)},
        {"strides": (2**63, 0)},
        {"length": 5},
        {"length": 7},
        {"length": -1},
        {"length": 2**63},
        {"length": "6"},
        {"kind": "DoubleStorage"},
        {"kind": "ComplexFloatStorage"},
        {"kind": "NoSuchStorage"},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"key": "../../../../etc/passwd"},
        {"key": "/etc/passwd"},
        {"key": ""},
    ],
)
def test_a_forged_tensor_never_reaches_outside_of_its_data(file, forged):
    refusal(saved(file, {"a": tensor(**forged)}))


def test_compressed_members_are_refused(file):
    program = b"\x80\x02" + opcodes({"a": tensor()}) + b"."
    assert "data.pkl in it is compressed" in refusal(archive(file, program, compression=zipfile.ZIP_DEFLATED))
    archive(file, program, {"data/1": b""})
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("any/data.pkl", program)
        zipped.writestr("any/data/0", bytes(10**6), zipfile.ZIP_DEFLATED)
    assert "data/0 in it is compressed" in refusal(file)


def test_parts_that_lie_over_each_other_are_refused(file):
    archive(file, b"\x80\x02" + opcodes({"a": tensor()}) + b".", {"data/1": bytes(5_000)})
    content = file.read_bytes()
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    count, length = 3 + 10, end - start
    last = content[content.rindex(b"PK\x01\x02") : end]
    directory = content[start:end] + 10 * last
    ending = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, length + 10 * len(last), start, 0)
    file.write_bytes(content[:start] + directory + ending)
    assert "parts are larger than the whole" in refusal(file)


def test_the_byte_order_is_heeded(file):
    assert "big-endian" in refusal(saved(file, {"a": tensor()}, byteorder=b"big"))
    assert list(read_torch_file(saved(file, {"a": tensor()}, byteorder=b"little"))) == ["a"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"<HTML>", "web page"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2), "before 1.6"),
        (b"storages".ljust(257, b"\0") + b"ustar\x0000", "before 1.6"),
        (struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}', "safetensors"),
        (pickle.dumps({"a": 1}, 4), "bare pickle"),
        (b"\x89PNG\r\n", "not a file of torch.save"),
        (b"PK\x03\x04", "damaged or cut short"),
        (b"P", "not a file of torch.save"),
    ],
)
def test_other_files_are_recognised(file, content, expected):
    file.write_bytes(content)
    assert expected in refusal(file)


def test_other_zips_and_contents_are_recognised(file):
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr("a.npy", b"")
    assert "none of PyTorch's" in refusal(file)
    assert "it holds epoch, state_dict instead of a state dict" in refusal(saved(file, {"epoch": 1, "state_dict": {}}))
    assert "it holds something else instead" in refusal(saved(file, [tensor()]))
    assert "it holds something else instead" in refusal(saved(file, tensor()))
    assert "asks to call clip.model.CLIP" in refusal(saved(file, Object("clip.model CLIP", {})))


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    assert "a folder" in refusal(tmp_path)
    with pytest.raises(FileNotFoundError, match="none"):
        read_torch_file(tmp_path / "none.pt")


@pytest.fixture(scope="module")
def small():
    return {"a.weight": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.array(3)}


def test_a_file_cut_anywhere_is_refused(file, small):
    write_torch_file(file, small)
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        refusal(file)


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(file, small):
    write_torch_file(file, small)
    content = file.read_bytes()
    outcomes = collections.Counter()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(flipped)
        try:
            assert_same(read_torch_file(file), small)
            outcomes["harmless"] += 1
        except TorchFileError:
            refusal(file)
            outcomes["noticed"] += 1
    assert outcomes["noticed"] > outcomes["harmless"] > 0
