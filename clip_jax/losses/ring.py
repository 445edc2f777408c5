"""Compares all images with all texts, one block of similarities at a time, while the texts pass through all devices.

Each device starts with its own N / devices images and texts. At each step, a device compares its images with the texts
that it holds, and sends these texts to the next device, together with the results for them. After as many steps as
there are devices, every text is back on its first device.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from clip_jax.losses.products import Products
from clip_jax.losses.shards import all_mean, pair_indices
from clip_jax.sharding import BATCH_AXES

MOST_NEGATIVE = float(jnp.finfo(jnp.float32).min)  # acts as minus infinity, but MOST_NEGATIVE - MOST_NEGATIVE is 0

# Arrays by name for a block of images or texts: float32 [block, ...], and "pair", int32 [block], -1 for padding. All
# blocks of a device have one more leading axis.
Block = dict[str, jax.Array]
# Takes an image block and a text block. Returns the results for each image and for each text.
Compare = Callable[[Block, Block], tuple[Block, Block]]
Merge = Callable[[Block, Block], Block]


def ring(compare: Compare, merge: Merge, images: Block, texts: Block, block_size: int) -> tuple[Block, Block]:
    """Compares every block of images with every block of texts, on all devices, and merges the results.

    Args:
      compare: takes blocks of ``images`` and ``texts``, with the pairs' indices in the global batch added as "pair".
      merge: combines two results for the same images or texts. Results start at ``MOST_NEGATIVE`` for "largest" and at
        0 for all others.
      images: arrays ``[N / devices, ...]`` by name; "embedding" is one of them.
      texts: the same for texts.
      block_size: the most images, and the most texts, in a block.

    Returns:
      The merged results for the device's own images and for its own texts, arrays ``[N / devices, ...]`` by name.
    """
    local, devices = len(images["embedding"]), jax.lax.axis_size(BATCH_AXES)
    number = -(-local // block_size)
    size = -(-local // number)  # the smallest size with the same number of blocks

    def in_blocks(x: jax.Array, filler: int = 0) -> jax.Array:
        widths = [(0, number * size - local)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, widths, constant_values=filler).reshape(number, size, *x.shape[1:])

    def initial(result: Block) -> Block:
        values = {
            name: jnp.full((number, *x.shape), MOST_NEGATIVE if name == "largest" else 0.0, x.dtype)
            for name, x in result.items()
        }
        return jax.lax.pcast(values, BATCH_AXES, to="varying")

    def send(tree):
        return jax.lax.ppermute(tree, BATCH_AXES, [(device, (device + 1) % devices) for device in range(devices)])

    def step(carry, _):
        texts, by_image, by_text = carry
        next_texts = send(texts)  # can overlap with this step's products
        by_image, by_text = _all_blocks(compare, merge, images, texts, by_image, by_text)
        return (next_texts, by_image, send(by_text)), None

    pair = {"pair": in_blocks(pair_indices(local), filler=-1)}
    images, texts = (jax.tree.map(in_blocks, side) | pair for side in (images, texts))
    by_image, by_text = map(initial, jax.eval_shape(compare, *jax.tree.map(lambda x: x[0], (images, texts))))
    (_, by_image, by_text), _ = jax.lax.scan(step, (texts, by_image, by_text), length=devices)
    return jax.tree.map(lambda x: x.reshape(number * size, *x.shape[2:])[:local], (by_image, by_text))


def _all_blocks(
    compare: Compare, merge: Merge, images: Block, texts: Block, by_image: Block, by_text: Block
) -> tuple[Block, Block]:
    """Merges the comparison of each block of images with each block of texts into ``by_image`` and ``by_text``."""

    def one_image_block(by_text: Block, image: tuple[Block, Block]):
        image, before = image

        def one_text_block(by_image: Block, text: tuple[Block, Block]):
            text, before = text
            for_image, for_text = compare(image, text)
            return merge(by_image, for_image), merge(before, for_text)

        by_image, by_text = jax.lax.scan(one_text_block, before, (texts, by_text))
        return by_text, by_image

    by_text, by_image = jax.lax.scan(one_image_block, by_text, (images, by_image))
    return by_image, by_text


def merge_sums(one: Block, other: Block) -> Block:
    """The sums of two results, and the maximum of "largest"."""
    return {name: (jnp.maximum if name == "largest" else jnp.add)(one[name], other[name]) for name in one}


def pair_masks(image: Block, text: Block) -> tuple[jax.Array, jax.Array]:
    """Bool masks ``[images, texts]`` of the positive and of the negative pairs; padding is in neither."""
    rows, columns = image["pair"][:, None], text["pair"]
    real, same = (rows >= 0) & (columns >= 0), rows == columns
    return real & same, real & ~same


def embedding_gradients(
    logit_gradients: jax.Array, image: Block, text: Block, products: Products
) -> tuple[Block, Block]:
    """The gradients of a block's image and text embeddings, from those of its similarities ``[images, texts]``."""
    return (
        {"gradient": products.logit_gradients(logit_gradients, text["embedding"])},
        {"gradient": products.logit_gradients(logit_gradients.T, image["embedding"])},
    )


def ring_accuracies(positives: jax.Array, by_image: Block, by_text: Block) -> dict[str, jax.Array]:
    """Both accuracies, from each pair's own logit and its largest negative logits; a tie counts as wrong."""
    return {
        "image_to_text_accuracy": all_mean(positives > by_image["largest"]),
        "text_to_image_accuracy": all_mean(positives > by_text["largest"]),
    }
