"""How an image becomes what the image tower takes. Workers that decode images import this, so it imports no JAX."""

import dataclasses
import math

from clip_jax.settings import must_be, must_be_one_of

# Mean and standard deviation of CLIP's training images, RGB in [0, 1], as published with its weights.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
SMALLEST_STD = 1e-6  # a deviation near 0 is a mistake, and would make pixels infinite in float32
MAX_RESIZE = 8  # times the image size: a larger size before the crop is a mistake that takes all memory
RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest")  # Pillow's


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image of any size becomes the square that the image tower sees. The default is OpenAI's.

    The image is resized to ``resize_size`` pixels (0: the tower's image size), with Pillow's ``interpolation``. By
    ``resize_mode`` that is the length of its short side ("shortest"), its long side ("longest") or both, whatever
    its aspect ratio ("squash"). Then its center is cropped, or padded with the gray level ``fill_color`` (0 to 255),
    to the tower's image size. ``mean`` and ``std``, of RGB in [0, 1], are subtracted and divided by.

    Source: open_clip's ``PreprocessCfg`` and the image processors of Hugging Face's CLIP.
    """

    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    resize_size: int = 0
    fill_color: int = 0

    def problems(self, image_size: int) -> list[str]:
        """One line for each value of ``config.model.preprocessing`` that a tower of this image size cannot use."""
        prefix, problems = "config.model.preprocessing", []
        for name, least in (("mean", -math.inf), ("std", SMALLEST_STD)):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
                problems.append(f"{prefix}.{name}={values} must be three numbers, of red, green and blue")
            else:
                problems += must_be(min(values) >= least, f"{prefix}.{name}={values} must be at least {least:g}")
        largest = MAX_RESIZE * image_size
        return [
            *problems,
            *must_be_one_of(self, "resize_mode", RESIZE_MODES, prefix),
            *must_be_one_of(self, "interpolation", INTERPOLATIONS, prefix),
            *must_be(
                0 <= self.resize_size <= largest, f"{prefix}.resize_size={self.resize_size} must be in [0, {largest}]"
            ),
            *must_be(0 <= self.fill_color <= 255, f"{prefix}.fill_color={self.fill_color} must be in [0, 255]"),
        ]

    def at_image_size(self, image_size: int, wanted: int) -> "Preprocessing":
        """The same for images of ``wanted`` pixels, where this one is for ``image_size``: the same part is cropped."""
        return dataclasses.replace(self, resize_size=round(self.resize_size * wanted / image_size))


OPENAI_PREPROCESSING = Preprocessing()
