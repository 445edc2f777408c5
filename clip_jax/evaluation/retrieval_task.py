"""Opens the data of an image-text retrieval task, and scores models on it."""

from collections.abc import Sequence

import numpy as np

from clip_jax.data.sources.digest import digest
from clip_jax.evaluation import retrieval
from clip_jax.evaluation.cached import Classifier
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.images import Annotation, Images, open_on_all_hosts, read_annotations
from clip_jax.evaluation.measuring import Extras, require_finite, under_corruptions
from clip_jax.evaluation.results import TaskResult
from clip_jax.evaluation.similarity import num_ties
from clip_jax.evaluation.task import Task
from clip_jax.models.preprocessing import Preprocessing

SHOWN_TEXTS = 8  # in the report


class RetrievalTask:
    """Images and their captions. Records of one image file are one image with all their captions.

    Args:
      task: a task of kind ``retrieval``.
      image_size: the model's, in pixels.
      data: the folder that replaces ``{data}`` in the source.
      preprocessing: the model's.

    Raises:
      FileNotFoundError: the data, or the package that reads it, is missing.
      ValueError: the source has no images, or is not valid; one line.
    """

    def __init__(self, task: Task, image_size: int, data: str, preprocessing: Preprocessing):
        source = task.source.replace("{data}", data)
        opened = open_on_all_hosts(source)
        annotations = read_annotations(source, opened)
        rows, captions = _captions_by_image(annotations)
        if not rows:
            raise ValueError(f"{source} has no images")
        self.task, self.images = task, Images(source, opened, image_size, preprocessing).select(rows)
        self._notes = []
        if len(rows) < len(annotations):
            self._notes.append(
                f"{len(annotations) - len(rows):,} of {len(annotations):,} records name an image file again; their "
                "captions are joined"
            )
        if task.first_caption:
            self._texts = list(dict.fromkeys(texts[0] for texts in captions))
            id_of = {text: index for index, text in enumerate(self._texts)}
            self._image_ids = np.array([id_of[texts[0]] for texts in captions])
            self._text_ids = np.arange(len(self._texts))
        else:
            self._texts = [text for texts in captions for text in texts]
            self._image_ids = np.arange(len(captions))
            self._text_ids = np.repeat(self._image_ids, [len(texts) for texts in captions])
        self._identity = {"images": digest(opened.fingerprint(), len(rows)), "texts": digest(self._texts)}

    def score(self, embedder: Embedder, classifier: Classifier, extras: Extras) -> TaskResult:
        """Scores the embedder's model, without ``classifier``. Raises ValueError or FloatingPointError, one line."""
        text_embeddings = require_finite(embedder.encode_text(self._texts))
        metrics, arrays, notes = self._measure(embedder, text_embeddings, self.images)
        shift = {}
        if extras.synthetic_shift:
            shift = under_corruptions(self.images, lambda images: self._main(embedder, text_embeddings, images))
        return TaskResult(
            self.task.name,
            self.task.title or self.task.name,
            self.task.kind,
            self.task.metric,
            metrics,
            {"images": len(self.images), "texts": len(self._texts)},
            chance=retrieval.chance(self._image_ids, self._text_ids),
            synthetic_shift=shift,
            notes=[*self._notes, *notes],
            identity=self._identity,
            arrays=arrays,
            texts=[self._texts[text] for text in arrays["shown_texts"]],
            image_at=self.images.__getitem__,
        )

    def _main(self, embedder: Embedder, text_embeddings: np.ndarray, images: Images) -> float:
        return self._measure(embedder, text_embeddings, images)[0][self.task.metric]

    def _measure(self, embedder: Embedder, text_embeddings: np.ndarray, images: Images) -> tuple[dict, dict, list[str]]:
        """Returns metrics, arrays of the result, and notes on equal embeddings: a tie counts as wrong."""
        image_embeddings = require_finite(embedder.encode_image(images))
        ranks = {
            "image_to_text_rank": retrieval.retrieval_ranks(
                image_embeddings, text_embeddings, self._image_ids, self._text_ids
            ),
            "text_to_image_rank": retrieval.retrieval_ranks(
                text_embeddings, image_embeddings, self._text_ids, self._image_ids
            ),
        }
        equal = {
            f"of {len(image_embeddings):,} images have the same embedding as an image with another text": num_ties(
                image_embeddings, self._image_ids
            ),
            f"of {len(text_embeddings):,} texts have the same embedding as a text of another image": num_ties(
                text_embeddings, self._text_ids
            ),
        }
        notes = [f"{count:,} {what}; such a tie counts as wrong" for what, count in equal.items() if count]
        count = min(SHOWN_TEXTS, len(self._texts))
        shown = np.sort(np.random.default_rng(0).choice(len(self._texts), count, replace=False)).astype(np.int32)
        best = retrieval.nearest(text_embeddings[shown], image_embeddings, 5)  # [Q, 5]
        right = self._image_ids[best] == self._text_ids[shown][:, None]
        shown_arrays = {"shown_texts": shown, "best_images": best, "right_images": right}
        return retrieval.recalls(*ranks.values()), ranks | shown_arrays, notes


def _captions_by_image(annotations: Sequence[Annotation]) -> tuple[list[int], list[list[str]]]:
    """Returns the first record of each image, and all captions of each image."""
    rows: list[int] = []
    captions: list[list[str]] = []
    index_of: dict[str, int] = {}
    for row, annotation in enumerate(annotations):
        image = index_of.setdefault(annotation.image, len(rows)) if annotation.image else len(rows)
        if image < len(rows):
            captions[image] += annotation.captions
        else:
            rows.append(row)
            captions.append(list(annotation.captions))
    return rows, captions
