"""What PyTorch itself saves is read, to the bit, and what we write is loaded by it. Needs the peers."""

import collections

import ml_dtypes
import numpy as np
import pytest

from clip_jax.weights.torch_file import TorchFileError, read_torch_file, write_torch_file

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402


class Small(nn.Module):
    """Nested modules with parameters, buffers of several dtypes, and attributes that are no tensors."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2, bias=False)))
        self.projection = nn.Parameter(torch.randn(2, 5))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mask", torch.randn(4, 6).t())
        self.register_buffer("flags", torch.tensor([True, False]))
        self.width, self.title, self.sizes, self.rate = 7, "small", [1, 2], 0.5

    def forward(self, x):
        return self.scale * (self.blocks(x) @ self.projection)


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Small()
    model(torch.randn(8, 3))  # moves the running statistics
    return model


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pt"


def to_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same(actual, state_dict):
    assert set(actual) == set(state_dict)
    for name, tensor in state_dict.items():
        expected = to_numpy(tensor)
        assert (actual[name].dtype, actual[name].shape) == (expected.dtype, expected.shape)
        assert actual[name].tobytes() == expected.tobytes()


DTYPES = ("float16", "bfloat16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_each_dtype_and_layout(file, dtype):
    base = torch.arange(24).sub(9).reshape(4, 6).to(getattr(torch, dtype))
    state_dict = {
        "base": base,
        "transposed": base.t(),
        "part": base[1:3, ::2],
        "column": base[:, 5],
        "expanded": base[:1].expand(3, 6),
        "channels_last": base.reshape(1, 2, 3, 4).clone().contiguous(memory_format=torch.channels_last),
        "scalar": base[2, 3],
        "empty": base[:0],
        "alone": torch.zeros(0, dtype=base.dtype),
    }
    torch.save(state_dict, file)
    assert_same(read_torch_file(file), state_dict)


def test_a_state_dict_with_parameters_and_shared_storages(file, small):
    torch.save(small.state_dict(), file)
    assert_same(read_torch_file(file), small.state_dict())
    marked = nn.Parameter(torch.randn(3))
    marked.no_decay = True  # pickled with its attributes
    parameters = {**dict(small.named_parameters()), "tied": small.projection, "marked": marked}
    torch.save(collections.OrderedDict(parameters), file)
    assert_same(read_torch_file(file), parameters)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_training_checkpoint(file, small, key):
    model = torch.compile(nn.DataParallel(small), backend="eager")
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3, amsgrad=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    small(torch.randn(8, 3)).sum().backward()
    optimizer.step()
    assert all(name.startswith("_orig_mod.module.") for name in model.state_dict())
    checkpoint = {
        "epoch": 3,
        "name": "run",
        "best": None,
        key: model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "random": torch.get_rng_state(),
        "precision": torch.bfloat16,
        "device": torch.device("cpu"),
        "shape": torch.zeros(2, 3).size(),
    }
    torch.save(checkpoint, file)
    assert_same(read_torch_file(file), model.state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "compiled", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(8, 3))], ids=["script", "trace"]
)
def test_an_archive_of_torchscript(file, small, compiled, dtype):
    module = compiled(small.eval()).to(dtype)
    torch.jit.save(module, file)
    assert_same(read_torch_file(file), module.state_dict())
    assert set(module.state_dict()) == set(small.state_dict())


def test_what_is_no_state_dict_is_refused(file, small):
    torch.save(small, file)
    with pytest.raises(TorchFileError, match=r"asks to call .*Small, and only tensors are read"):
        read_torch_file(file)
    torch.save(small.state_dict(), file, _use_new_zipfile_serialization=False)
    with pytest.raises(TorchFileError, match=r"before 1\.6"):
        read_torch_file(file)
    torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, file)
    with pytest.raises(TorchFileError, match=r"a is a torch\.ComplexFloatStorage"):
        read_torch_file(file)


@pytest.mark.parametrize("options", [{}, {"weights_only": True}, {"weights_only": False}, {"mmap": True}])
def test_what_we_write_is_loaded_by_torch(file, options):
    numbers = np.random.default_rng(0).integers(-100, 100, (2, 3, 4))
    arrays = {}
    for dtype in (*DTYPES[2:], "float16", ml_dtypes.bfloat16):
        array = numbers.astype(dtype)
        kinds = {"plain": array, "transposed": array.T, "scalar": array[0, 0, 0], "empty": array[:0], "one": array[:1]}
        arrays |= {f"{kind} {array.dtype} ✓": value for kind, value in kinds.items()}
    write_torch_file(file, arrays)
    loaded = torch.load(file, **options)
    assert isinstance(loaded, collections.OrderedDict)
    assert list(loaded) == list(arrays)
    assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in loaded.values())
    assert not any(tensor.requires_grad for tensor in loaded.values())
    assert_same(arrays, loaded)


def test_a_module_takes_back_its_weights(file, small):
    torch.save(small.state_dict(), file)
    write_torch_file(file, read_torch_file(file))
    other = Small()
    other.load_state_dict(torch.load(file))
    assert_same({name: to_numpy(tensor) for name, tensor in other.state_dict().items()}, small.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("layers", "width", "patch"), [(2, 64, 16), ((1, 1, 1, 1), 8, None)], ids=["transformer", "resnet"]
)
def test_an_archive_as_openai_publishes_them(file, layers, width, patch):
    pytest.importorskip("clip")
    from clip import model as openai

    torch.manual_seed(0)
    model = openai.CLIP(32, 32, layers, width, patch, 8, 64, 64, 1, 1).eval()
    del model.context_length, model.vocab_size  # the class has them as numbers, the archives as tensors
    for name, value in (("input_resolution", 32), ("context_length", 8), ("vocab_size", 64)):
        model.register_buffer(name, torch.tensor(value))
    openai.convert_weights(model)
    tokens = torch.randint(0, 64, (2, 8))
    traced = torch.jit.trace(model, (torch.randn(2, 3, 32, 32), tokens), check_trace=False)
    torch.jit.save(traced, file)
    actual = read_torch_file(file)
    assert_same(actual, model.state_dict())
    assert actual["visual.conv1.weight"].dtype == np.float16
    sizes = ("input_resolution", "context_length", "vocab_size")
    rebuilt = openai.build_model({name: torch.from_numpy(array.copy()) for name, array in actual.items()})
    assert_same({name: array for name, array in actual.items() if name not in sizes}, rebuilt.state_dict())
