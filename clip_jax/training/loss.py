"""The contrastive loss over the global batch (section 2.3 and figure 3 of the paper), and SigLIP's sigmoid loss.

Every device holds N / devices images and as many texts, and computes its own images' rows of the N x N similarities.
The gathered form holds these rows whole. The blockwise form and the sigmoid loss hold one block of them at a time: the
texts travel around the devices, and each device compares those that are with it to its images.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from clip_jax.models.backends import backend_of
from clip_jax.sharding import BATCH_AXES

LOSS_FORMS = ("gather", "blockwise")
GATHERED_LOGITS_BYTES = 64 * 2**20

ROWS, WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec()
LEAST = float(jnp.finfo(jnp.float32).min)  # minus infinity, but for LEAST - LEAST = 0

Metrics = dict[str, jax.Array]
METRIC_SPECS = {"image_to_text_accuracy": WHOLE, "text_to_image_accuracy": WHOLE, "pair_losses": ROWS}
# Of a block of images or texts, or with one more leading axis of all of a device's: {name: float32 [block, ...]}.
Block = dict[str, jax.Array]


class Products(NamedTuple):
    """How float32 matrices are multiplied: embeddings with one another, and the logits' gradients with embeddings.

    The gathered form, which JAX differentiates, multiplies all as the first.
    """

    embeddings: Callable[[jax.Array, jax.Array], jax.Array]
    logit_gradients: Callable[[jax.Array, jax.Array], jax.Array]


def choose_form(global_batch_size: int, num_devices: int) -> str:
    """Gathers while a device's ``[N / devices, N]`` float32 logits are at most 64 MiB.

    That is up to 65,536 pairs on 256 devices, and 4,096 on one. Loss and gradients of 768 numbers on 256 v5e chips, by
    the TPU's compiler (the time is of the arithmetic; blockwise also waits for its texts to go around twice):

    ========= ================ ================= ==========================
    N         logits of a chip gather            blockwise
    ========= ================ ================= ==========================
    32,768    17 MB            134 MB, 0.9 ms    0.4 MB, 5.2 ms
    65,536    67 MB            470 MB, 3.3 ms    0.4 MB, 7.9 ms
    131,072   268 MB           1,344 MB, 13 ms   0.4 MB, 18 ms
    1,048,576 17,180 MB        does not fit      26 MB, 0.97 s
    ========= ================ ================= ==========================
    """
    return "gather" if 4 * global_batch_size**2 <= GATHERED_LOGITS_BYTES * num_devices else "blockwise"


def contrastive_loss(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    logit_scale: jax.Array,
    mesh: Mesh,
    form: str = "gather",
    block_size: int = 0,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, Metrics]:
    """Symmetric InfoNCE; each device computes its rows of the N x N similarities, once.

    Args:
      image_embeddings: float32 ``[N, D]``, unit length, first axis split over the mesh.
      text_embeddings: the same; row i belongs to image i.
      logit_scale: float32 scalar, the natural logarithm of the inverse temperature.
      mesh: the ``("data", "fsdp")`` mesh.
      form: one of ``LOSS_FORMS``; they differ in memory and time, and but for rounding not in result. See
        :func:`choose_form`.
      block_size: the blockwise form holds at most ``[block_size, block_size]`` logits. Any size fits any batch; 0 is
        the one for this kind of device (:mod:`clip_jax.models.backends`).
      dtype: in which the towers compute, and go on with the gradients of their embeddings.

    Returns:
      The loss, a float32 scalar, and ``image_to_text_accuracy`` and ``text_to_image_accuracy`` within the batch beside
      ``pair_losses`` float32 ``[N]``, whose mean is the loss.

    Raises:
      ValueError: an unknown form, or a batch that cannot be divided among the devices.
    """
    if form not in LOSS_FORMS:
        raise ValueError(f"unknown form of the loss: {form!r}; known are {', '.join(LOSS_FORMS)}")
    products = _products_on(mesh, dtype)
    if form == "blockwise":
        block_size = block_size or backend_of(mesh.devices.flat[0]).loss_block_size
        return _blockwise_loss(image_embeddings, text_embeddings, logit_scale, mesh, block_size, products)
    # check_vma verifies that what is returned as replicated is, and makes the gradients of replicated inputs sums.
    sharded = jax.shard_map(
        functools.partial(_gathered_loss, products=products),
        mesh=mesh,
        in_specs=(ROWS, ROWS, WHOLE),
        out_specs=(WHOLE, METRIC_SPECS),
        check_vma=True,
    )
    return sharded(image_embeddings, text_embeddings, logit_scale)


def sigmoid_loss(
    image_embeddings: jax.Array,
    text_embeddings: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array,
    mesh: Mesh,
    block_size: int = 0,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, Metrics]:
    """SigLIP's loss (arXiv 2303.15343, section 3.2 and algorithm 1): every pair is judged by itself.

    It is ``-sum(log_sigmoid(z * (exp(logit_scale) * similarity + logit_bias))) / N`` over all N x N pairs, with z = 1
    for an image and its own text and -1 for any other. It is always computed blockwise.

    Args:
      image_embeddings: float32 ``[N, D]``, unit length, first axis split over the mesh.
      text_embeddings: the same; row i belongs to image i.
      logit_scale: float32 scalar, the natural logarithm of the inverse temperature; SigLIP starts at log 10.
      logit_bias: float32 scalar; SigLIP starts at -10.
      mesh: the ``("data", "fsdp")`` mesh.
      block_size: at most ``[block_size, block_size]`` logits are held; 0 as for :func:`contrastive_loss`.
      dtype: as for :func:`contrastive_loss`.

    Returns:
      The loss, a float32 scalar, and ``image_to_text_accuracy`` and ``text_to_image_accuracy`` within the batch beside
      ``pair_losses`` float32 ``[N]``, whose mean is the loss.

    Raises:
      ValueError: a batch that cannot be divided among the devices.
    """
    block_size = block_size or backend_of(mesh.devices.flat[0]).loss_block_size
    products = _products_on(mesh, dtype)
    return _sigmoid_loss(image_embeddings, text_embeddings, logit_scale, logit_bias, mesh, block_size, products)


# The gathered form: autodiff of the rows.


def _gathered_loss(
    images: jax.Array, texts: jax.Array, logit_scale: jax.Array, *, products: Products
) -> tuple[jax.Array, Metrics]:
    local = images.shape[0]
    all_max = functools.partial(jax.lax.pmax, axis_name=BATCH_AXES)
    total = _total(images)
    all_texts = jax.lax.all_gather(texts, BATCH_AXES, tiled=True)  # [N, D]
    logits = jnp.exp(logit_scale) * products.embeddings(images, all_texts.T)  # [N / devices, N]

    columns = _pair_numbers(local)
    positives = jnp.take_along_axis(logits, columns[:, None], axis=1)[:, 0]  # [N / devices]

    row_log_sums = jax.nn.logsumexp(logits, axis=1)  # [N / devices]
    column_max = all_max(jax.lax.stop_gradient(logits.max(axis=0)))  # [N]
    column_log_sums = column_max + jnp.log(_all_sum(jnp.exp(logits - column_max).sum(axis=0)))  # [N], on every device

    image_to_text = _all_mean(row_log_sums - positives)
    text_to_image = (column_log_sums.sum() - _all_sum(positives.sum())) / total

    # A tie counts as wrong: a collapsed model, to which all is alike, must not look like a perfect one.
    all_positives = jax.lax.all_gather(positives, BATCH_AXES, tiled=True)  # [N]
    row_ranks = (logits >= positives[:, None]).sum(axis=1)  # [N / devices], the positive itself included
    column_ranks = _all_sum((logits >= all_positives).sum(axis=0))  # [N]
    metrics = {
        "image_to_text_accuracy": _all_mean(row_ranks == 1),
        "text_to_image_accuracy": (column_ranks == 1).mean(),
        "pair_losses": (row_log_sums + column_log_sums[columns]) / 2 - positives,
    }
    return (image_to_text + text_to_image) / 2, jax.tree.map(jax.lax.stop_gradient, metrics)


# The blockwise form: the texts go around once for the sums of the softmax, and again for the gradients.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _blockwise_loss(images, texts, logit_scale, mesh, block_size, products):
    return _blockwise_forward(images, texts, logit_scale, mesh, block_size, products)[0]


def _blockwise_forward(images, texts, logit_scale, mesh, block_size, products):
    forward = jax.shard_map(
        functools.partial(_blockwise_sums, block_size=block_size, products=products),
        mesh=mesh,
        in_specs=(ROWS, ROWS, WHOLE),
        out_specs=(WHOLE, METRIC_SPECS, ROWS),
    )
    loss, metrics, sums = forward(images, texts, logit_scale)
    return (loss, metrics), (images, texts, logit_scale, sums)


def _blockwise_backward(mesh, block_size, products, saved, cotangents):
    backward = jax.shard_map(
        functools.partial(_blockwise_gradients, block_size=block_size, products=products),
        mesh=mesh,
        in_specs=(ROWS, ROWS, WHOLE, ROWS, WHOLE),
        out_specs=(ROWS, ROWS, WHOLE),
    )
    return backward(*saved, cotangents[0])


_blockwise_loss.defvjp(_blockwise_forward, _blockwise_backward)


def _blockwise_sums(images, texts, logit_scale, *, block_size, products):
    """The loss, the metrics, and for each of the device's pairs its logit and the log-sums of all others' with it."""

    def visit(image: Block, text: Block) -> tuple[Block, Block]:
        logits = jnp.exp(logit_scale) * products.embeddings(image["embedding"], text["embedding"].T)
        own, others = _pairings(image, text)
        negatives = jnp.where(others, logits, LEAST)
        return (
            _exponential_sums(negatives, axis=1) | {"positive": jnp.where(own, logits, 0).sum(axis=1)},
            _exponential_sums(negatives, axis=0),
        )

    by_image, by_text = _ring(visit, _merge_exponential_sums, {"embedding": images}, {"embedding": texts}, block_size)
    positives = by_image["positive"]
    sums = {
        "positive": positives,
        "by_image": by_image["greatest"] + jnp.log(by_image["sum"]),
        "by_text": by_text["greatest"] + jnp.log(by_text["sum"]),
    }
    # -log(e^p / (e^p + e^o)) = softplus(o - p) for the positive p and the others' log-sum o.
    losses = jax.nn.softplus(sums["by_image"] - positives) + jax.nn.softplus(sums["by_text"] - positives)
    metrics = _accuracies(positives, by_image, by_text) | {"pair_losses": losses / 2}
    return _all_mean(losses) / 2, metrics, sums


def _blockwise_gradients(images, texts, logit_scale, sums, cotangent, *, block_size, products):
    positives = sums["positive"]
    image_log_sums, text_log_sums = (jnp.logaddexp(sums[name], positives) for name in ("by_image", "by_text"))

    def visit(image: Block, text: Block) -> tuple[Block, Block]:
        logits = jnp.exp(logit_scale) * products.embeddings(image["embedding"], text["embedding"].T)
        _, others = _pairings(image, text)
        softmaxes = jnp.exp(logits - image["log_sum"][:, None]) + jnp.exp(logits - text["log_sum"])
        return _embedding_gradients(jnp.where(others, softmaxes, 0), image, text, products)

    by_image, by_text = _ring(
        visit,
        _merge,
        {"embedding": images, "log_sum": image_log_sums},
        {"embedding": texts, "log_sum": text_log_sums},
        block_size,
    )
    own = -jax.nn.sigmoid(sums["by_image"] - positives) - jax.nn.sigmoid(sums["by_text"] - positives)
    factor = cotangent * jnp.exp(logit_scale) / (2 * _total(positives))
    image_gradients = factor * (by_image["gradient"] + own[:, None] * texts)
    text_gradients = factor * (by_text["gradient"] + own[:, None] * images)
    # Every logit is linear in its image, so the logits' gradients times the logits are the images' times the images.
    return image_gradients, text_gradients, _all_sum((images * image_gradients).sum())


def _exponential_sums(logits: jax.Array, axis: int) -> Block:
    """The sum of ``exp(logits - greatest)``, and the greatest, by which later ones are rescaled."""
    greatest = logits.max(axis=axis)
    return {"greatest": greatest, "sum": jnp.exp(logits - jnp.expand_dims(greatest, axis)).sum(axis=axis)}


def _merge_exponential_sums(one: Block, other: Block) -> Block:
    greatest = jnp.maximum(one["greatest"], other["greatest"])
    one, other = (x | {"sum": x["sum"] * jnp.exp(x["greatest"] - greatest)} for x in (one, other))
    return _merge(one, other)


# The sigmoid loss: no gradient waits for a complete sum, so the texts go around once for both. Where only the loss is
# asked for, the compiler leaves out the gradients' products.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sigmoid_loss(images, texts, logit_scale, logit_bias, mesh, block_size, products):
    return _sigmoid_forward(images, texts, logit_scale, logit_bias, mesh, block_size, products)[0]


def _sigmoid_forward(images, texts, logit_scale, logit_bias, mesh, block_size, products):
    forward = jax.shard_map(
        functools.partial(_sigmoid_loss_and_gradients, block_size=block_size, products=products),
        mesh=mesh,
        in_specs=(ROWS, ROWS, WHOLE, WHOLE),
        out_specs=(WHOLE, METRIC_SPECS, (ROWS, ROWS, WHOLE, WHOLE)),
    )
    loss, metrics, gradients = forward(images, texts, logit_scale, logit_bias)
    return (loss, metrics), gradients


def _sigmoid_backward(mesh, block_size, products, gradients, cotangents):
    return jax.tree.map(lambda gradient: cotangents[0] * gradient, gradients)


_sigmoid_loss.defvjp(_sigmoid_forward, _sigmoid_backward)


def _sigmoid_loss_and_gradients(images, texts, logit_scale, logit_bias, *, block_size, products):
    def visit(image: Block, text: Block) -> tuple[Block, Block]:
        logits = jnp.exp(logit_scale) * products.embeddings(image["embedding"], text["embedding"].T) + logit_bias
        own, others = _pairings(image, text)
        slopes = jnp.where(others, jax.nn.sigmoid(logits), 0)
        image_gradients, text_gradients = _embedding_gradients(slopes, image, text, products)
        negatives = jnp.where(others, logits, LEAST)  # softplus(LEAST) = 0
        return image_gradients | {
            "greatest": negatives.max(axis=1),
            "positive": jnp.where(own, logits, 0).sum(axis=1),
            "loss": jax.nn.softplus(negatives).sum(axis=1),
            "slope": slopes.sum(axis=1),
        }, text_gradients | {"greatest": negatives.max(axis=0)}

    by_image, by_text = _ring(visit, _merge, {"embedding": images}, {"embedding": texts}, block_size)
    positives = by_image["positive"]
    own = -jax.nn.sigmoid(-positives)
    factor = jnp.exp(logit_scale) / _total(positives)
    image_gradients = factor * (by_image["gradient"] + own[:, None] * texts)
    text_gradients = factor * (by_text["gradient"] + own[:, None] * images)
    gradients = (
        image_gradients,
        text_gradients,
        _all_sum((images * image_gradients).sum()),  # as in the blockwise form
        _all_mean(by_image["slope"] + own),
    )
    losses = by_image["loss"] + jax.nn.softplus(-positives)
    metrics = _accuracies(positives, by_image, by_text) | {"pair_losses": losses}
    return _all_mean(losses), metrics, gradients


# What they share. All of it runs under shard_map, on one device's images and texts.


def _products_on(mesh: Mesh, dtype: jnp.dtype) -> Products:
    """In float32, or in what GPUs are quick with.

    A TPU's default would round the similarities' operands to bfloat16, 0.4 % of a logit of 100. TF32 rounds them to 11
    bits, an eighth of that. The logits' gradients may be rounded to bfloat16 where what they come to will be, too.
    """
    backend = backend_of(mesh.devices.flat[0])
    rounded = jnp.dtype(dtype) == jnp.bfloat16
    of_gradients = backend.embedding_gradient_precision if rounded else backend.similarity_precision
    return Products(
        *(
            functools.partial(jnp.matmul, precision=precision)
            for precision in (backend.similarity_precision, of_gradients)
        )
    )


def _all_sum(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, BATCH_AXES)


def _total(local: jax.Array) -> int:
    """N, from an array of the device's part of it."""
    return len(local) * jax.lax.axis_size(BATCH_AXES)


def _all_mean(local: jax.Array) -> jax.Array:
    return _all_sum(local.sum()) / _total(local)


def _pair_numbers(local: int) -> jax.Array:
    """Int32 ``[local]``: where in the global batch the device's pairs lie."""
    return jax.lax.axis_index(BATCH_AXES) * local + jnp.arange(local)


def _pairings(image: Block, text: Block) -> tuple[jax.Array, jax.Array]:
    """Masks over images x texts: of those that belong together, and of those that don't. Padding is in neither."""
    rows, columns = image["pair"][:, None], text["pair"]
    real, same = (rows >= 0) & (columns >= 0), rows == columns
    return real & same, real & ~same


def _embedding_gradients(slopes: jax.Array, image: Block, text: Block, products: Products) -> tuple[Block, Block]:
    """Of a sum of products of images and texts, each times its slope."""
    return (
        {"gradient": products.logit_gradients(slopes, text["embedding"])},
        {"gradient": products.logit_gradients(slopes.T, image["embedding"])},
    )


def _merge(one: Block, other: Block) -> Block:
    """The sums over two blocks, and the greater of what is the greatest."""
    return {name: (jnp.maximum if name == "greatest" else jnp.add)(one[name], other[name]) for name in one}


def _accuracies(positives: jax.Array, by_image: Block, by_text: Block) -> Metrics:
    """A tie counts as wrong, as in the gathered form."""
    return {
        "image_to_text_accuracy": _all_mean(positives > by_image["greatest"]),
        "text_to_image_accuracy": _all_mean(positives > by_text["greatest"]),
    }


def _ring(visit: Callable, merge: Callable, images: Block, texts: Block, block_size: int) -> tuple[Block, Block]:
    """Merges what ``visit(image_block, text_block)`` finds, over all blocks of images and texts of all devices.

    The texts go once around the devices, and take along what was found for them.

    Returns:
      What was found for the device's own images and for its own texts, by all devices.
    """
    local, devices = len(images["embedding"]), jax.lax.axis_size(BATCH_AXES)
    number = -(-local // block_size)
    size = -(-local // number)  # blocks of equal size, as small as makes no more of them

    def in_blocks(x: jax.Array, filler: int = 0) -> jax.Array:
        widths = [(0, number * size - local)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, widths, constant_values=filler).reshape(number, size, *x.shape[1:])

    def nothing(found: Block) -> Block:
        empty = {
            name: jnp.full((number, *x.shape), LEAST if name == "greatest" else 0.0, x.dtype)
            for name, x in found.items()
        }
        return jax.lax.pcast(empty, BATCH_AXES, to="varying")

    def onward(tree):
        return jax.lax.ppermute(tree, BATCH_AXES, [(device, (device + 1) % devices) for device in range(devices)])

    def step(carry, _):
        texts, by_image, by_text = carry
        next_texts = onward(texts)  # which need not wait for this step's products
        by_image, by_text = _all_blocks(visit, merge, images, texts, by_image, by_text)
        return (next_texts, by_image, onward(by_text)), None

    pair = {"pair": in_blocks(_pair_numbers(local), filler=-1)}
    images, texts = (jax.tree.map(in_blocks, side) | pair for side in (images, texts))
    by_image, by_text = map(nothing, jax.eval_shape(visit, *jax.tree.map(lambda x: x[0], (images, texts))))
    (_, by_image, by_text), _ = jax.lax.scan(step, (texts, by_image, by_text), length=devices)
    return jax.tree.map(lambda x: x.reshape(number * size, *x.shape[2:])[:local], (by_image, by_text))


def _all_blocks(visit: Callable, merge: Callable, images: Block, texts: Block, by_image: Block, by_text: Block):
    """Merges what is found on each block of images with each of texts into ``by_image`` and ``by_text``."""

    def one_image_block(by_text: Block, image: tuple[Block, Block]):
        image, found_before = image

        def one_text_block(by_image: Block, text: tuple[Block, Block]):
            text, found_before = text
            for_image, for_text = visit(image, text)
            return merge(by_image, for_image), merge(found_before, for_text)

        by_image, by_text = jax.lax.scan(one_text_block, found_before, (texts, by_text))
        return by_text, by_image

    by_text, by_image = jax.lax.scan(one_image_block, by_text, (images, by_image))
    return by_image, by_text
