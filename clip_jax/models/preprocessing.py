"""The settings of image preprocessing, for the image tower's square input. The code is in ``data/images.py``."""

import dataclasses
import math

from clip_jax.settings import must_be_one_of

# Mean and standard deviation of CLIP's training images, RGB in [0, 1], as published by OpenAI.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
SMALLEST_STD = 1e-6  # a smaller one is a mistake, and would make pixels infinite in float32
MAX_RESIZE = 8  # times the image size; a larger size before the crop is a mistake that uses up memory
RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest")  # Pillow's


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image of any size is made into the image tower's square input. The default is OpenAI's.

    The image is resized with Pillow's ``interpolation``: its short side ("shortest"), its long side ("longest") or both
    sides ("squash"), by ``resize_mode``, become ``resize_size`` pixels (0: the tower's image size). Then the center is
    cropped, or padded with the gray level ``fill_color`` (0 to 255), to the tower's image size. Finally, for RGB in
    [0, 1], ``mean`` is subtracted and the result is divided by ``std``.

    Source: open_clip's ``PreprocessCfg`` and the image processors of Hugging Face's CLIP.
    """

    mean: tuple[float, float, float] = IMAGE_MEAN
    std: tuple[float, float, float] = IMAGE_STD
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    resize_size: int = 0
    fill_color: int = 0

    def at_image_size(self, image_size: int, wanted: int) -> "Preprocessing":
        """Returns the same for ``wanted`` instead of ``image_size`` pixels: it crops the same share of an image."""
        return dataclasses.replace(self, resize_size=round(self.resize_size * wanted / image_size))

    def problems(self, prefix: str, image_size: int) -> list[str]:
        """Returns what is wrong with these values, a line for each; ``prefix`` is the config section's name."""
        problems = []
        for name, least in (("mean", -math.inf), ("std", SMALLEST_STD)):
            values = getattr(self, name)
            if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
                problems.append(f"{prefix}.{name}={values} must be three numbers, of red, green and blue")
            elif min(values) < least:
                problems.append(f"{prefix}.{name}={values} must be at least {least:g}")
        problems += must_be_one_of(self, "resize_mode", RESIZE_MODES, prefix)
        problems += must_be_one_of(self, "interpolation", INTERPOLATIONS, prefix)
        for name, largest in (("resize_size", MAX_RESIZE * image_size), ("fill_color", 255)):
            if not 0 <= getattr(self, name) <= largest:
                problems.append(f"{prefix}.{name}={getattr(self, name)} must be in [0, {largest}]")
        return problems


OPENAI_PREPROCESSING = Preprocessing()
