"""Reads files of PyTorch's zip format without PyTorch and without running the code in them, and writes such files.

Such a file is a zip: ``<archive>/data.pkl`` is a pickle that describes tensors, ``<archive>/data/<key>`` are the bytes
of their storages. A pickle is a program, and Python's own reader lets it call functions. The reader here supports the
few opcodes that PyTorch writes, imports nothing, and calls nothing. It can only build plain types and the types below.
"""

import math
import os
import pathlib
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from clip_jax.files import atomic_path

STORAGE_DTYPES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
KNOWN_NAMES = re.compile(
    r"collections\.(OrderedDict|Counter)|torch\.(\w+Storage|Size|device|b?float\d+|u?int\d+|bool)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch\.jit\._pickle\.(build_\w+|restore_type_tag)|__torch__\..+"
)
PLAIN_OPCODES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
ITEMS_TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
TOO_OLD = "saved by a PyTorch before 1.6; load and save it again with a newer one"
NOT_A_ZIP = tuple(
    (re.compile(beginning, re.DOTALL | re.IGNORECASE), meaning)
    for beginning, meaning in (
        (rb"version https://git-lfs", "a Git LFS pointer, not the weights; run `git lfs pull` in its repository"),
        (rb"\s*<(!doctype|html|\?xml)", "a web page, not weights; check the address and download it again"),
        (rb"\x80.\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19|.{257}ustar", TOO_OLD),
        (rb".{8}\{", "a safetensors file; rename it to end in .safetensors"),
        (rb"\x80", "a bare pickle, which is not read; load it where you trust it and save it with torch.save"),
        (rb"", "not a file of torch.save or torch.jit.save; check that it is the one you mean"),
    )
)
MAX_SHARING = 8  # times the file's size: each tensor counts in full, also if several share a storage
MAX_ATTRIBUTES, MAX_NAME_LENGTH = 100_000, 1_000  # a forged TorchScript archive can nest its modules without end


class TorchFileError(ValueError):
    """A file that is refused or damaged; the message is one line: which file, what is wrong, the fix."""


class _Storage(NamedTuple):
    kind: str
    key: str
    length: int


class _Tensor(NamedTuple):
    """A view of a storage, counted in elements, as in the pickle. Nothing is checked yet."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Module(dict):
    """The attributes of a TorchScript object."""


def read_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a state dict, of a training checkpoint that contains one, or of a TorchScript archive, by name.

    Names are those of ``state_dict()``. Dtypes and shapes are those in the file. The arrays may be read-only. Tensors
    that share a storage in the file share memory.

    Raises:
      FileNotFoundError: there is no such file.
      TorchFileError: it is another kind of file, is damaged, or calls functions that do not build tensors.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise TorchFileError(f"{path}: a folder; name a file in it")
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        try:
            return _read(file)
        except TorchFileError as error:
            raise TorchFileError(f"{path}: {error}") from None
        except Exception as error:  # zipfile and pickletools raise many kinds for damaged bytes
            reason = f"{type(error).__name__}: {_shown(str(error))}"
            raise TorchFileError(f"{path}: damaged or cut short ({reason}); copy or download it again") from None


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    head = file.read(512)
    if not head:
        raise TorchFileError("empty; copy or download it again")
    if not head.startswith(b"PK\x03\x04"):
        raise TorchFileError(next(meaning for beginning, meaning in NOT_A_ZIP if beginning.match(head)))
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        # With overlapping members, a small file could fill any memory.
        if sum(member.compress_size for member in archive.infolist()) > size:
            raise TorchFileError("damaged: its parts are larger than the whole; copy or download it again")
        folders = [name.removesuffix("data.pkl") for name in archive.namelist() if re.fullmatch("[^/]+/data.pkl", name)]
        if len(folders) != 1:
            raise TorchFileError("a zip, but none of PyTorch's; check that it is the one you mean")
        folder = folders[0]
        if f"{folder}byteorder" in archive.namelist() and _member(archive, f"{folder}byteorder") != b"little":
            raise TorchFileError("saved on a big-endian machine; load and save it again on a little-endian one")
        tensors = _choose(_unpickle(_member(archive, f"{folder}data.pkl")))
        storages = {key: _member(archive, f"{folder}data/{key}") for key in {t.storage.key for t in tensors.values()}}
    arrays = {name: _array(name, tensor, storages[tensor.storage.key], size) for name, tensor in tensors.items()}
    # A stride of 0 repeats an element. The arrays are views, but copies of them could fill any memory.
    if sum(array.nbytes for array in arrays.values()) > MAX_SHARING * size:
        raise TorchFileError("refused: its tensors are many times as large as the file; save them anew")
    return arrays


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise TorchFileError(f"refused: {_shown(name)} in it is compressed; load and save it again with PyTorch")
    return archive.read(member)


def _shown(text: str) -> str:
    """The beginning of a text from a file, with escapes for line breaks and control characters."""
    return ascii(text[:100])[1:-1]


def _unpickle(program: bytes) -> Any:
    """What a pickle describes, in plain types and those above. Dicts keep only the entries with a string as key."""
    stack, outer_stacks, memo = [], [], {}
    for opcode, value, _ in pickletools.genops(program):
        if opcode.name in ITEMS_TAKEN:
            start = len(stack) - ITEMS_TAKEN[opcode.name]
            items = stack[start:]
            del stack[start:]
        elif opcode.name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, outer_stacks.pop()
        match opcode.name:
            case "PROTO":
                if value != 2:
                    raise TorchFileError(f"pickled by protocol {value}; save it again with torch.save's own, 2")
            case "STOP":
                return stack.pop()
            case "MARK":
                outer_stacks.append(stack)
                stack = []
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                pairs = zip(items[::2], items[1::2], strict=True)
                stack[-1].update((name, item) for name, item in pairs if isinstance(name, str))
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(PLAIN_OPCODES[opcode.name])
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if opcode.name == "EMPTY_LIST" else {})
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(value.replace(" ", "."))
                if not KNOWN_NAMES.fullmatch(stack[-1]):
                    raise _refusal(stack[-1])
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_make(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Module) and isinstance(state, dict):
                    stack[-1].update(state)
            case "BINPERSID":
                _, kind, key, _, length = stack.pop()
                if not (isinstance(kind, str) and isinstance(key, str)):
                    raise ValueError("a storage without a type or a key")
                stack.append(_Storage(kind, key, length))
            case _:
                raise TorchFileError(f"refused: its pickle has {opcode.name}, which PyTorch never writes; save it anew")


def _refusal(name: object) -> TorchFileError:
    return TorchFileError(
        f"refused: it asks to call {_shown(str(name))}, and only tensors are read; "
        "if you trust it, load it with PyTorch and save its state_dict() alone"
    )


def _make(name: object, arguments: tuple) -> Any:
    match name:
        case "collections.OrderedDict" | "collections.Counter":
            return {}
        case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
            return _Tensor(*arguments[:4])
        case "torch.Size" | "torch.device":
            return None
        case str() if name.startswith("__torch__."):
            return _Module()
        case str() if name.startswith(("torch._utils._rebuild_parameter", "torch.jit._pickle.")):
            return arguments[0]
    raise _refusal(name if isinstance(name, str) else type(name).__name__)


def _choose(root: object) -> dict[str, _Tensor]:
    """The model's tensors by name, out of everything that was saved with it."""
    if isinstance(root, _Module):
        tensors = _tensors_of(root)
    else:
        root = root if isinstance(root, dict) else {}
        dicts = [root[key] for key in STATE_DICT_KEYS if isinstance(root.get(key), dict)] + [root]
        flat = ({name: item for name, item in held.items() if isinstance(item, _Tensor)} for held in dicts)
        tensors = next(filter(None, flat), {})
    if not tensors:
        held = _shown(", ".join(root)) or "something else"
        raise TorchFileError(f"it holds {held} instead of a state dict; save the model's state_dict()")
    return tensors


def _tensors_of(root: _Module) -> dict[str, _Tensor]:
    tensors, modules, attributes = {}, [("", root)], 0
    for prefix, module in modules:
        for name, value in module.items():
            attributes += 1
            if attributes > MAX_ATTRIBUTES or len(prefix) + len(name) > MAX_NAME_LENGTH:
                raise TorchFileError("refused: its modules nest without end; save the model's state_dict()")
            if isinstance(value, _Module):
                modules.append((f"{prefix}{name}.", value))
            elif isinstance(value, _Tensor):
                tensors[f"{prefix}{name}"] = value
    return tensors


def _array(name: str, tensor: _Tensor, storage: bytes, most_bytes: int) -> np.ndarray:
    (kind, _, length), offset, shape, strides = tensor
    if kind not in STORAGE_DTYPES:
        raise TorchFileError(f"{_shown(name)} is a {_shown(kind)}, which is not read; save it in another dtype")
    dtype = STORAGE_DTYPES[kind]
    whole = len(shape) == len(strides) <= 64  # before any arithmetic, which is slow for forged numbers
    whole = whole and all(type(number) is int and 0 <= number < 2**63 for number in (length, offset, *shape, *strides))
    if whole and 0 not in shape:
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        # A stride of 0 repeats an element, and a copy of such a view could fill any memory.
        whole = last < length and length * dtype.itemsize <= len(storage) and math.prod(shape) <= most_bytes
    if not whole:
        raise TorchFileError(f"damaged: {_shown(name)} reaches outside of its data; copy or download it again")
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.ndarray(shape, dtype, storage, offset * dtype.itemsize, [stride * dtype.itemsize for stride in strides])


def write_torch_file(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file that ``torch.load`` reads as an OrderedDict of contiguous CPU tensors; after an error, no file.

    Raises:
      TypeError: a dtype is not in STORAGE_DTYPES.
    """
    program = b"\x80\x02ccollections\nOrderedDict\n)R"
    for key, (name, tensor) in enumerate(tensors.items()):
        program += _pickled_entry(name, str(key), tensor)
    with atomic_path(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), program + b".")
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
        for key, tensor in enumerate(tensors.values()):
            flat = np.ascontiguousarray(tensor).reshape(-1)
            archive.writestr(zipfile.ZipInfo(f"archive/data/{key}"), flat.view(np.uint8))
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")


def _pickled_entry(name: str, key: str, tensor: np.ndarray) -> bytes:
    """The opcodes that add a tensor under its name to the dict on top of the stack."""
    kind = next((kind for kind, dtype in STORAGE_DTYPES.items() if dtype == tensor.dtype), None)
    if kind is None:
        raise TypeError(f"{name} is {tensor.dtype}, which is not written; convert it to a dtype like float32 first")

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def integers(*values: int) -> bytes:
        return b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values)

    storage = text("storage") + f"c{kind.replace('.', chr(10))}\n".encode() + text(key) + text("cpu")
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)]
    view = b"(" + storage + integers(tensor.size) + b"tQ" + integers(0)
    view += b"(" + integers(*tensor.shape) + b"t(" + integers(*strides) + b"t\x89ccollections\nOrderedDict\n)R"
    return text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"tRs"
