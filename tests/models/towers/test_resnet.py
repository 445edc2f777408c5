"""The ResNet's parts against their formulas in float64; how the whole is computed does not change what it computes."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.execution import Execution
from clip_jax.models.towers.resnet import (
    AttentionPool,
    BatchNorm,
    Bottleneck,
    Convolution,
    ResNet,
    ResNetPreset,
    average_pool,
)
from clip_jax.sharding import batch_sharding, replicated

MESHES = [(8, 1), (4, 2), (2, 4)]
TINY = ResNet(ResNetPreset(image_size=64, width=8, stage_sizes=(1, 3, 1, 1), num_heads=4), embed_dim=16)


def random_variables(model, *inputs):
    """Numpy variables in which nothing is at rest: no gain of 0 that hides a branch, no statistics of a new model."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        if name == "num_batches":
            return np.zeros(shape, np.int32)
        if name == "kernel":
            return np.float32(random.normal(0, np.prod(shape[-4:-1]) ** -0.5, shape))
        if name in ("scale", "variance"):
            return np.float32(random.uniform(0.5, 1.5, shape))
        return np.float32(random.normal(0, 0.3, shape))

    return jax.tree.map_with_path(draw, nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)))


def images(count, seed=0):
    return np.float32(np.random.default_rng(seed).normal(size=(count, 64, 64, 3)))


def split(x, mesh):
    return jax.device_put(jnp.float32(x), batch_sharding(mesh))


# The parts.


def pool_by_loops(x, size):
    batch, height, width, channels = x.shape
    result = np.zeros((batch, height // size, width // size, channels))
    for row in range(height // size):
        for column in range(width // size):
            window = x[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            result[:, row, column] = window.mean(axis=(1, 2))
    return result


@pytest.mark.parametrize("size", [1, 2, 3])
def test_average_pooling_takes_the_mean_of_each_window(size):
    x = np.random.default_rng(0).normal(size=(2, 6, 12, 5))
    np.testing.assert_allclose(average_pool(jnp.float32(x), size), pool_by_loops(x, size), rtol=1e-5, atol=1e-6)


def convolve_by_loops(x, kernel, stride):
    """As PyTorch's Conv2d with ``padding=size // 2``: zeros on every side alike, whatever the stride."""
    size = len(kernel)
    rows, columns = ((length + 2 * (size // 2) - size) // stride + 1 for length in x.shape[1:3])
    padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    result = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for row in range(rows):
        for column in range(columns):
            window = padded[:, row * stride : row * stride + size, column * stride : column * stride + size]
            result[:, row, column] = np.einsum("byxc,yxcw->bw", window, kernel)
    return result


# An even side with a stride of 2 tells PyTorch's padding from "SAME", which would start at another pixel.
@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (2, 7, 5, 3)])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_a_convolution_is_pytorchs_with_half_the_kernel_as_padding(shape, size, stride):
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=shape), random.normal(size=(size, size, 3, 4))
    result = Convolution(4, size, stride).apply({"params": {"kernel": jnp.float32(kernel)}}, jnp.float32(x))
    np.testing.assert_allclose(result, convolve_by_loops(x, kernel, stride), rtol=1e-4, atol=1e-5)


def test_a_convolution_has_a_kernel_and_no_bias():
    params = nn.meta.unbox(Convolution(4, 3).init(jax.random.key(0), jnp.zeros((1, 4, 4, 2))))["params"]
    assert {name: leaf.shape for name, leaf in params.items()} == {"kernel": (3, 3, 2, 4)}


def plain_batch_norm(x, scale, bias):
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axis=axes)
    variance = ((x - mean) ** 2).mean(axis=axes)
    return (x - mean) / (variance + 1e-5) ** 0.5 * scale + bias


def norm_case(spread=1.0, shape=(16, 3, 2, 6), seed=0):
    """An input whose shards differ, a gain and a shift."""
    random = np.random.default_rng(seed)
    x = random.normal(0.5, 1, shape) * spread * np.linspace(0.5, 2, len(shape) * shape[0])[: shape[0], None, None, None]
    return x, random.normal(1, 0.5, shape[-1]), random.normal(0, 1, shape[-1])


def norm_variables(scale, bias, mean=0.0, variance=1.0, num_batches=0):
    full = functools.partial(np.full_like, scale, dtype=np.float32)
    return {
        "params": {"scale": np.float32(scale), "bias": np.float32(bias)},
        "batch_stats": {"mean": full(mean), "variance": full(variance), "num_batches": np.int32(num_batches)},
    }


def train_norm(variables, x, batch_norm="global", sharding=None, dtype=jnp.float32):
    module = BatchNorm(True, batch_norm, execution=Execution(dtype=dtype, batch_sharding=sharding))
    return jax.jit(lambda variables, x: module.apply(variables, x, mutable=["batch_stats"]))(variables, x)


# Where the spread is 1e-3 the variance is a tenth of epsilon, so that another epsilon is another function.
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_in_training_batch_norm_takes_out_the_batchs_own_mean_and_variance(spread):
    x, scale, bias = norm_case(spread)
    variables = norm_variables(scale, bias, mean=7, variance=9)  # not looked at
    result, _ = train_norm(variables, jnp.float32(x))
    np.testing.assert_allclose(result, plain_batch_norm(x, scale, bias), rtol=1e-5, atol=1e-5)


def test_batch_norm_has_the_gradients_of_the_plain_formula():
    x, scale, bias = norm_case()
    cotangent = np.random.default_rng(1).normal(size=x.shape)
    with jax.enable_x64(True):
        _, backward = jax.vjp(plain_batch_norm, *map(jnp.asarray, (x, scale, bias)))
        expected = backward(jnp.asarray(cotangent))
        assert {gradient.dtype for gradient in expected} == {jnp.dtype("float64")}

    def norm(x, scale, bias):
        variables = norm_variables(np.ones(6), np.zeros(6)) | {"params": {"scale": scale, "bias": bias}}
        return train_norm(variables, x)[0]

    _, backward = jax.vjp(norm, *(jnp.float32(argument) for argument in (x, scale, bias)))
    for gradient, reference in zip(backward(jnp.float32(cotangent)), expected, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("steps", [1, 5])
def test_running_averages_move_a_tenth_a_step_to_the_mean_and_the_unbiased_variance(steps):
    mean, variance = np.full(6, 3.0), np.full(6, 5.0)
    _, scale, bias = norm_case()
    variables = norm_variables(scale, bias, 3, 5, num_batches=4)
    for step in range(steps):
        x = norm_case(seed=step)[0]
        mean = 0.9 * mean + 0.1 * x.mean(axis=(0, 1, 2))
        variance = 0.9 * variance + 0.1 * x.reshape(-1, 6).var(axis=0, ddof=1)  # PyTorch's, by n - 1
        _, updated = train_norm(variables, jnp.float32(x))
        variables |= updated
    stats = variables["batch_stats"]
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(stats["variance"], variance, rtol=1e-5)
    assert stats["num_batches"] == 4 + steps


def test_few_values_a_channel_tell_the_unbiased_variance_from_the_other():
    x, scale, bias = norm_case(shape=(2, 1, 1, 6))
    _, updated = train_norm(norm_variables(scale, bias), jnp.float32(x))
    expected = 0.9 + 0.1 * x.reshape(2, 6).var(axis=0, ddof=1)
    np.testing.assert_allclose(updated["batch_stats"]["variance"], expected, rtol=1e-5)


def test_the_arrays_of_a_step_that_is_not_compiled_stay_as_they_were():
    """Whoever holds them in numpy would see an addition in place."""
    x, scale, bias = norm_case()
    variables = norm_variables(scale, bias)
    variables["batch_stats"]["num_batches"] = np.zeros((), np.int32)
    BatchNorm(True, "global").apply(variables, jnp.float32(x), mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, variables, norm_variables(scale, bias))


def test_creating_variables_for_training_is_not_yet_a_step():
    variables = BatchNorm(True, "global").init(jax.random.key(0), jnp.float32(norm_case()[0]))
    expected = norm_variables(np.ones(6), np.zeros(6))
    jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(variables), expected)


def test_a_single_value_a_channel_leaves_everything_finite():
    outcome = train_norm(norm_variables(np.ones(6), np.zeros(6)), jnp.ones((1, 1, 1, 6)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outcome))


def test_in_evaluation_batch_norm_uses_the_running_averages_and_leaves_them():
    x, scale, bias = norm_case()
    variables = norm_variables(scale, bias, mean=0.3, variance=2.5, num_batches=7)
    result, updated = BatchNorm(False, "global").apply(variables, jnp.float32(x), mutable=["batch_stats"])
    np.testing.assert_allclose(result, (x - 0.3) / np.sqrt(2.5 + 1e-5) * scale + bias, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("shape", MESHES)
def test_global_statistics_are_those_of_the_whole_batch_on_however_many_devices(mesh_of, shape):
    x, scale, bias = norm_case()
    mesh, variables = mesh_of(shape), norm_variables(scale, bias)
    result = train_norm(variables, split(x, mesh), "global", batch_sharding(mesh))
    expected = train_norm(variables, jnp.float32(x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), result, expected)


@pytest.mark.parametrize("shape", MESHES)
def test_statistics_per_device_are_each_parts_own_and_their_running_averages_the_mean(mesh_of, shape):
    x, scale, bias = norm_case()
    mesh, variables = mesh_of(shape), norm_variables(scale, bias)
    result, updated = train_norm(variables, split(x, mesh), "per_device", batch_sharding(mesh))
    parts = np.split(x, 8)
    expected = np.concatenate([plain_batch_norm(part, scale, bias) for part in parts])
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(result - plain_batch_norm(x, scale, bias)).max() > 0.1  # another function than the global one
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * np.mean([p.mean((0, 1, 2)) for p in parts], axis=0), rtol=1e-5)
    variance = np.mean([part.reshape(-1, 6).var(axis=0, ddof=1) for part in parts], axis=0)
    np.testing.assert_allclose(stats["variance"], 0.9 + 0.1 * variance, rtol=1e-5)
    assert stats["num_batches"] == 1


def test_statistics_per_device_without_a_mesh_are_those_of_the_batch():
    x, scale, bias = norm_case()
    result, _ = train_norm(norm_variables(scale, bias), jnp.float32(x), "per_device")
    np.testing.assert_allclose(result, plain_batch_norm(x, scale, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_in_bfloat16_computes_in_float32(train):
    x = jnp.bfloat16(np.random.default_rng(0).normal(100, 1, (8, 4, 4, 6)))  # bfloat16 squares would lose the variance
    exact = np.float64(x)
    variables = norm_variables(np.ones(6), np.zeros(6), mean=100, variance=1)
    module = BatchNorm(train, "global", execution=Execution(dtype=jnp.bfloat16))
    result, updated = module.apply(variables, x, mutable=["batch_stats"])
    assert result.dtype == jnp.bfloat16
    assert updated["batch_stats"]["mean"].dtype == updated["batch_stats"]["variance"].dtype == jnp.float32
    expected = plain_batch_norm(exact, 1.0, 0.0) if train else (exact - 100) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(np.float64(result), expected, rtol=2**-8, atol=1e-4)


def attention_pool_by_loops(x, params, num_heads):
    """One query, the mean of all places, position 0; keys and values are the mean and the places."""
    batch, width = len(x), x.shape[-1]
    size = width // num_heads
    x = x.reshape(batch, -1, width)
    x = np.concatenate([x.mean(axis=1, keepdims=True), x], axis=1) + params["positional_embedding"]
    project = {name: (params[name]["kernel"], params[name]["bias"]) for name in ("query", "key", "value", "output")}
    query, key, value = (x @ kernel + bias for kernel, bias in (project[name] for name in ("query", "key", "value")))
    pooled = np.zeros((batch, width))
    for b in range(batch):
        for head in range(num_heads):
            columns = slice(head * size, (head + 1) * size)
            weights = np.exp(key[b, :, columns] @ query[b, 0, columns] / np.sqrt(size))
            pooled[b, columns] = weights @ value[b, :, columns] / weights.sum()
    kernel, bias = project["output"]
    return pooled @ kernel + bias


@pytest.mark.parametrize("num_heads", [1, 3, 12])
def test_attention_pooling_is_that_of_the_formula_head_by_head(num_heads):
    x = np.random.default_rng(1).normal(size=(2, 3, 3, 12))
    module = AttentionPool(3, num_heads, 5)
    variables = random_variables(module, jnp.float32(x))
    result = module.apply(variables, jnp.float32(x))
    expected = attention_pool_by_loops(x, jax.tree.map(np.float64, variables["params"]), num_heads)
    assert result.shape == (2, 5)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_attention_pooling_asks_for_what_the_mean_place_asks_for_wherever_things_stand():
    """With all positions alike only the set of places counts, and a value that all places have comes out as it is."""
    x = np.random.default_rng(1).normal(size=(2, 3, 3, 12))
    module = AttentionPool(3, 3, 5)
    params = random_variables(module, jnp.float32(x))["params"]
    nowhere = params | {"positional_embedding": np.zeros_like(params["positional_embedding"])}
    turned = np.ascontiguousarray(x[:, ::-1, ::-1])
    results = {
        (name, way): module.apply({"params": p}, jnp.float32(pixels))
        for name, p in (("somewhere", params), ("nowhere", nowhere))
        for way, pixels in (("straight", x), ("turned", turned))
    }
    np.testing.assert_allclose(results["nowhere", "straight"], results["nowhere", "turned"], rtol=1e-4, atol=1e-5)
    assert np.abs(results["somewhere", "straight"] - results["somewhere", "turned"]).max() > 1e-2
    everywhere = np.broadcast_to(x[:, :1, :1], x.shape)
    value = x[:, 0, 0] @ params["value"]["kernel"] + params["value"]["bias"]
    expected = value @ params["output"]["kernel"] + params["output"]["bias"]
    result = module.apply({"params": nowhere}, jnp.float32(everywhere))
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def bottleneck_by_formulas(x, params, stride):
    def convolve(x, name):
        return convolve_by_loops(x, params[name]["kernel"], 1)

    def norm(x, name):
        return plain_batch_norm(x, params[name]["scale"], params[name]["bias"])

    y = np.maximum(norm(convolve(x, "conv1"), "bn1"), 0)
    y = np.maximum(norm(convolve(y, "conv2"), "bn2"), 0)
    y = norm(convolve(pool_by_loops(y, stride), "conv3"), "bn3")
    if "downsample_conv" in params:
        x = norm(convolve(pool_by_loops(x, stride), "downsample_conv"), "downsample_bn")
    return np.maximum(x + y, 0)


# Only a block that keeps its shape adds its input as it is.
@pytest.mark.parametrize(("channels", "stride", "kept"), [(12, 1, True), (12, 2, False), (8, 1, False), (8, 2, False)])
def test_a_block_is_that_of_the_formula_and_its_shortcut_convolves_only_where_shapes_change(channels, stride, kept):
    x = np.random.default_rng(1).normal(size=(4, 4, 6, channels))
    module = Bottleneck(3, stride, train=True, batch_norm="global")
    variables = random_variables(module, jnp.float32(x))
    main = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}
    assert variables["params"].keys() == (main if kept else main | {"downsample_conv", "downsample_bn"})
    (result, _), updated = module.apply(variables, jnp.float32(x), mutable=["batch_stats"])
    expected = bottleneck_by_formulas(x, jax.tree.map(np.float64, variables["params"]), stride)
    assert result.shape == (4, 4 // stride, 6 // stride, 12)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
    assert {int(norm["num_batches"]) for norm in updated["batch_stats"].values()} == {1}


# The whole.


@pytest.fixture(scope="module")
def train():
    """A function from variables and images to the features in training and the running averages after it."""
    apply = jax.jit(lambda variables, pixels: TINY.apply(variables, pixels, train=True, mutable=["batch_stats"]))

    def run(variables, pixels):
        features, updated = apply(variables, pixels)
        return np.asarray(features), jax.tree.map(np.asarray, updated["batch_stats"])

    return run


@pytest.fixture(scope="module")
def variables(train):
    """Random parameters, and as running averages the statistics of one batch, so that images count for much."""
    variables = random_variables(TINY, jnp.zeros((1, 64, 64, 3)))
    nothing = jax.tree.map(np.zeros_like, variables["batch_stats"])
    stats = jax.tree.map_with_path(
        lambda path, leaf: 0 * leaf if path[-1].key == "num_batches" else leaf / np.float32(0.1),
        train(variables | {"batch_stats": nothing}, images(8))[1],
    )
    return variables | {"batch_stats": stats}


@pytest.fixture(scope="module")
def evaluate(variables):
    apply = jax.jit(lambda variables, pixels: TINY.apply(variables, pixels, mutable=["batch_stats"]))

    def run(pixels):
        features, updated = apply(variables, pixels)
        jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])
        return np.asarray(features)

    return run


def test_stages_have_as_many_blocks_as_told_and_one_of_a_single_block_scans_nothing(variables):
    params = variables["params"]
    firsts = {f"stage{number}_first" for number in (1, 2, 3, 4)}
    stem = {f"{part}{number}" for part in ("conv", "bn") for number in (1, 2, 3)}
    assert params.keys() == firsts | stem | {"stage2_rest", "attention_pool"}
    assert variables["batch_stats"].keys() == params.keys() - {"conv1", "conv2", "conv3", "attention_pool"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["stage2_rest"])} == {2}
    assert all("downsample_conv" in params[first] for first in firsts)
    assert "downsample_conv" not in params["stage2_rest"]
    # Half the width, then the width, then 4, 8, 16 and 32 times it.
    kernels = [params["conv1"], params["conv3"], *(params[first]["conv3"] for first in sorted(firsts))]
    assert [kernel["kernel"].shape[-1] for kernel in kernels] == [4, 8, 32, 64, 128, 256]
    assert params["attention_pool"]["positional_embedding"].shape == (1 + 2 * 2, 256)


def test_training_moves_every_running_average_of_every_block(variables, train):
    _, stats = train(variables, images(8, seed=1))
    different = jax.tree.map(lambda a, b: bool((a != b).mean() > 0.9), stats, variables["batch_stats"])
    assert all(jax.tree.leaves(different))
    assert all((norm["num_batches"] == [1, 1]).all() for norm in stats["stage2_rest"].values())


def test_evaluation_with_the_statistics_of_a_batch_gives_that_batchs_features_in_training(variables, train, evaluate):
    expected, _ = train(variables, images(8))
    # All but the n / (n - 1) of the unbiased variance, where n is 32 in the last stage.
    assert np.corrcoef(np.ravel(evaluate(images(8))), np.ravel(expected))[0, 1] > 0.99
    assert np.abs(evaluate(images(8)) - expected).max() > 1e-3


def test_only_in_training_does_an_image_depend_on_the_others_of_its_batch(variables, train, evaluate):
    pixels = images(8)
    others = np.concatenate([pixels[:1], images(7, seed=1)])
    np.testing.assert_allclose(evaluate(others)[0], evaluate(pixels)[0], rtol=0, atol=1e-5)
    one_by_one = np.concatenate([evaluate(image[None]) for image in pixels])
    np.testing.assert_allclose(one_by_one, evaluate(pixels), rtol=0, atol=1e-4)
    assert np.abs(train(variables, others)[0][0] - train(variables, pixels)[0][0]).max() > 1e-2


def test_every_part_of_the_image_reaches_the_feature_and_so_do_its_place_and_its_colors(evaluate):
    [image] = images(1)
    changed = [np.roll(image, 32, axis=0), np.roll(image, 32, axis=1), image[..., [1, 0, 2]], image[..., ::-1]]
    for row in range(0, 64, 8):
        for column in range(0, 64, 8):
            changed.append(image.copy())
            changed[-1][row : row + 8, column : column + 8] += 1
    for corner in (0, -1):  # a single pixel each
        changed.append(image.copy())
        changed[-1][corner, corner] += 3
    result = evaluate(np.stack([image, *changed]))
    assert (np.abs(result[1:] - result[0]).max(axis=1) > 3e-4).all()


def test_recomputing_blocks_and_unrolling_their_scan_change_neither_function_nor_gradients_nor_averages(variables):
    pixels, cotangent = images(8), np.float32(np.random.default_rng(1).normal(size=(8, 16)))

    def outcome(**changes):
        model = TINY.clone(execution=Execution(**changes))

        def objective(params, stats):
            features, updated = model.apply(
                {"params": params, "batch_stats": stats}, pixels, train=True, mutable=["batch_stats"]
            )
            return (features * cotangent).sum(), (features, updated["batch_stats"])

        return jax.jit(jax.grad(objective, has_aux=True))(variables["params"], variables["batch_stats"])

    expected_gradients, expected = outcome()
    assert all(np.abs(gradient).max() > 0 for gradient in jax.tree.leaves(expected_gradients))
    gradients, result = outcome(remat="full", scan_unroll=99)  # more blocks in a scan step than there are: all of them
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), result, expected)
    jax.tree.map(
        # The gradient of the keys' bias is zero but for rounding: a softmax does not change with it.
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max() + 1e-6),
        gradients,
        expected_gradients,
    )


def test_remat_full_does_recompute_in_the_backward_pass(variables):
    def program(remat):
        model = TINY.clone(execution=Execution(remat=remat))
        return str(jax.make_jaxpr(jax.grad(lambda images: model.apply(variables, images).sum()))(images(1)))

    assert "remat" in program("full") or "checkpoint" in program("full")
    assert "remat" not in program("none")
    assert "checkpoint" not in program("none")


def collectives(program):
    return re.findall(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\(", program)


@pytest.mark.parametrize("batch_norm", ["per_device", "global"])
def test_on_eight_devices_only_global_statistics_make_the_devices_talk(mesh_of, variables, train, batch_norm):
    mesh = mesh_of((8, 1))
    preset = dataclasses.replace(TINY.preset, batch_norm=batch_norm)
    model = preset.build(16, Execution(batch_sharding=batch_sharding(mesh)))

    def features(variables, pixels):  # without the running averages, of which there is one for all devices
        return model.apply(variables, pixels, train=True, mutable=["batch_stats"])[0]

    shardings = {"in_shardings": (replicated(mesh), batch_sharding(mesh)), "out_shardings": batch_sharding(mesh)}
    pixels = images(16)
    compiled = jax.jit(features, **shardings).lower(variables, pixels).compile()
    assert bool(collectives(compiled.as_text())) == (batch_norm == "global")
    result = compiled(jax.device_put(variables, replicated(mesh)), split(pixels, mesh))
    parts = [pixels] if batch_norm == "global" else np.split(pixels, 8)
    np.testing.assert_allclose(
        result, np.concatenate([train(variables, part)[0] for part in parts]), rtol=1e-3, atol=1e-3
    )


def test_what_the_devices_tell_each_other_for_batch_norm_are_statistics(mesh_of):
    """Sums over channels, or the scalars of none: never the activations that they are the statistics of."""
    mesh = mesh_of((8, 1))
    x, scale, bias = norm_case()
    for batch_norm in ("global", "per_device"):
        module = BatchNorm(True, batch_norm, execution=Execution(batch_sharding=batch_sharding(mesh)))
        apply = jax.jit(
            lambda variables, x, module=module: module.apply(variables, x, mutable=["batch_stats"]),
            in_shardings=(replicated(mesh), batch_sharding(mesh)),
        )
        told = collectives(apply.lower(norm_variables(scale, bias), jnp.float32(x)).compile().as_text())
        assert {kind for _, kind in told} == {"all-reduce"}
        for shapes, _ in told:
            for dimensions in re.findall(r"f32\[([\d,]*)\]", shapes):
                assert np.prod([int(size) for size in dimensions.split(",")]) == 6
