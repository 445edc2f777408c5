"""The base class of both transformer towers: checks, flops, and config fields inferred from the shapes of weights."""

from clip_jax.models.activations import ACTIVATIONS
from clip_jax.models.execution import Execution
from clip_jax.models.towers.base import ShapeError, Shapes
from clip_jax.models.transformer import BlockInitializers, Transformer
from clip_jax.settings import must_be, must_be_one_of

HEAD_WIDTH = 64  # in all of the paper's transformers


class TransformerTower:
    """Base of a description whose module has a ``transformer.Transformer`` named "transformer"."""

    width: int
    num_layers: int
    num_heads: int
    mlp_ratio: float

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)

    @property
    def head_width(self) -> float:
        return self.width / self.num_heads

    @property
    def fused_head_widths(self) -> tuple[float, ...]:
        return (self.head_width,)

    def numbers(self) -> tuple[dict[str, int | range], ...]:
        return ({"layer": range(self.num_layers)},)

    def problems(self, prefix: str) -> list[str]:
        return [
            *must_be(
                self.width % self.num_heads == 0,
                f"{prefix}.num_heads={self.num_heads} must divide width={self.width}",
            ),
            *must_be(self.mlp_width > 0, f"{prefix}.mlp_ratio={self.mlp_ratio} leaves nothing of width={self.width}"),
            *must_be_one_of(self, "activation", ACTIVATIONS, prefix),
        ]

    def transformer(self, initializers: BlockInitializers, execution: Execution) -> Transformer:
        """Returns the blocks, as the child module "transformer" of the module that calls this."""
        return Transformer(
            self.num_layers,
            self.num_heads,
            self.mlp_width,
            self.activation,
            initializers,
            execution,
            name="transformer",
        )

    def layer_flops(self, tokens: int) -> int:
        """Returns forward flops of a sequence of ``tokens`` through all layers; the last computes one position."""
        keys_and_values = 2 * self.width**2
        others = 2 * self.width**2 + 2 * self.width * self.mlp_width  # queries, attention's output, both of the MLP

        def layer(positions: int) -> int:
            return 2 * (tokens * keys_and_values + positions * others) + 2 * 2 * positions * tokens * self.width

        return (self.num_layers - 1) * layer(tokens) + layer(1)


def transformer_fields(shapes: Shapes, section: str, num_heads: dict[int, int]) -> dict:
    """Returns all fields of a :class:`TransformerTower` but its activation, from the shapes of its parameters.

    Args:
      shapes: of the tower's parameters.
      section: "vision" or "text".
      num_heads: by width, of published models whose heads are not :data:`HEAD_WIDTH` wide.

    Raises:
      ShapeError: the number of heads does not follow from the width.
    """
    width, mlp_width = shapes.shape("transformer.blocks.fc1.kernel")
    if width not in num_heads and width % HEAD_WIDTH:
        raise ShapeError(
            f"how many heads the {section} tower has cannot be seen from its width of {width}; "
            f"put the model's config beside the file"
        )
    return {
        "width": width,
        "num_layers": shapes.count("transformer.blocks.ln_1.scale", "layer"),
        "num_heads": num_heads.get(width, width // HEAD_WIDTH),
        "mlp_ratio": mlp_width / width,
    }
