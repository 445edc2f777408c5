"""The config section ``data``: where the pairs come from, how they are read and how images are augmented."""

import dataclasses
from collections.abc import Mapping

from clip_jax.data.augmentation import Augmentation
from clip_jax.history import parse_ranges
from clip_jax.settings import may_change, must_be, must_be_positive, must_not_be_negative

MAX_STRENGTHS = {"rotation": 180, "hue": 180, "blur": 16}  # degrees, degrees, px; 1 for all others


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Defaults of ``config.data``.

    A resumed run compares the content of the source and not its name, so that data can be moved.
    """

    source: str = may_change("")  # see clip_jax.data.sources; several are joined by " + "
    weights: str = may_change("")  # proportions of several sources, such as 3:1; empty: all pairs are equally likely
    min_image_side: int = 1  # px; smaller images are replaced, like all bad samples
    max_aspect_ratio: float = 100.0  # images with a larger ratio of sides are replaced
    max_bad_share: float = may_change(0.1)  # a larger share of bad samples ends the run
    num_workers: int = may_change(4)  # processes that decode; 0: this process decodes
    num_threads: int = may_change(1)  # in each process; use more if each image is a request over a network
    cache_mebibytes: int = may_change(0)  # decoded images that each worker caches; for small data sets
    bucket_timeout: float = may_change(15.0)  # seconds until gs://, s3:// or a web server must have sent up to 8 MiB
    bucket_retries: int = may_change(
        2
    )  # after the first attempt; then the record is bad, or the source cannot be opened
    bucket_connections: int = may_change(32)  # largest number in each process
    allow_changed: bool = may_change(False)  # other data than before is new data: the run goes on with an order of it
    # START:STOP, several by commas: batches that are passed over. Batch n, counted from 0, is that of step n + 1.
    skip_batches: str = may_change("")
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)

    def problems(self) -> list[str]:
        """Returns one line for each invalid value."""
        prefix = "config.data"
        return [
            *must_be(
                bool(self.source),
                "config.data.source is empty: set it, such as --config.data.source=folder:/images, csv:/pairs.csv or "
                "wds:/data/{00000..00099}.tar",
            ),
            *must_be_positive(self, ("min_image_side", "num_threads", "bucket_timeout", "bucket_connections"), prefix),
            *must_be(
                self.max_aspect_ratio >= 1, f"{prefix}.max_aspect_ratio={self.max_aspect_ratio} must be at least 1"
            ),
            *must_be(0 <= self.max_bad_share <= 1, f"{prefix}.max_bad_share={self.max_bad_share} must be in [0, 1]"),
            *must_not_be_negative(self, ("num_workers", "cache_mebibytes", "bucket_retries"), prefix),
            *_problems_of_ranges(self.skip_batches, f"{prefix}.skip_batches"),
            *_problems_of_strengths(dataclasses.asdict(self.augmentation), f"{prefix}.augmentation"),
        ]


def _problems_of_ranges(text: str, name: str) -> list[str]:
    try:
        parse_ranges(text)
    except ValueError as error:
        return [f"{name}={text}: {error}"]
    return []


def _problems_of_strengths(augmentation: Mapping[str, float], prefix: str) -> list[str]:
    problems = []
    for name, strength in augmentation.items():
        largest = MAX_STRENGTHS.get(name, 1)
        problems += must_be(0 <= strength <= largest, f"{prefix}.{name}={strength} must be in [0, {largest}]")
    return problems
