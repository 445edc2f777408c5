"""A retrieval task with its data: images, their captions, and which of them belong together."""

from collections.abc import Sequence

import numpy as np

from clip_jax.data.sources.digest import digest
from clip_jax.evaluation import retrieval
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.measuring import Extras, finite, under_corruptions
from clip_jax.evaluation.pictures import Pictures, Said, open_on_all_hosts, read_said
from clip_jax.evaluation.registry import Task
from clip_jax.evaluation.remembered import Classifier
from clip_jax.evaluation.results import TaskResult
from clip_jax.evaluation.similarity import ties
from clip_jax.models.preprocessing import Preprocessing

SHOWN_TEXTS = 8  # in the grid of the report


class RetrievalTask:
    """Images and their captions. Records of one image file are one image with the captions of all of them.

    Raises:
      FileNotFoundError, ValueError: as :class:`ClassificationTask`.
    """

    def __init__(self, task: Task, image_size: int, data: str, preprocessing: Preprocessing):
        source = task.source.replace("{data}", data)
        opened = open_on_all_hosts(source)
        said = read_said(source, opened)
        rows, captions = _captions_by_image(said)
        if not rows:
            raise ValueError(f"{source} has no images")
        self.task, self.pictures = task, Pictures(source, opened, image_size, preprocessing).chosen(rows)
        self._notes = []
        if len(rows) < len(said):
            self._notes.append(
                f"{len(said) - len(rows):,} of {len(said):,} records name an image file again; their captions are "
                "joined"
            )
        if task.first_caption:
            self._texts = list(dict.fromkeys(texts[0] for texts in captions))
            place = {text: number for number, text in enumerate(self._texts)}
            self._image_ids = np.array([place[texts[0]] for texts in captions])
            self._text_ids = np.arange(len(self._texts))
        else:
            self._texts = [text for texts in captions for text in texts]
            self._image_ids = np.arange(len(captions))
            self._text_ids = np.repeat(self._image_ids, [len(texts) for texts in captions])
        self._identity = {"images": digest(opened.fingerprint(), len(rows)), "texts": digest(self._texts)}

    def score(self, embedder: Embedder, classifier: Classifier, extras: Extras) -> TaskResult:
        text_embeddings = finite(embedder.encode_text(self._texts))
        metrics, arrays, notes = self._measure(embedder, text_embeddings, self.pictures)
        shift = {}
        if extras.synthetic_shift:
            shift = under_corruptions(self.pictures, lambda pictures: self._main(embedder, text_embeddings, pictures))
        return TaskResult(
            self.task.name,
            self.task.title or self.task.name,
            self.task.kind,
            self.task.metric,
            metrics,
            {"images": len(self.pictures), "texts": len(self._texts)},
            chance=retrieval.chance(self._image_ids, self._text_ids),
            synthetic_shift=shift,
            notes=[*self._notes, *notes],
            identity=self._identity,
            arrays=arrays,
            texts=[self._texts[text] for text in arrays["shown_texts"]],
            picture=self.pictures.__getitem__,
        )

    def _main(self, embedder: Embedder, text_embeddings: np.ndarray, pictures: Pictures) -> float:
        return self._measure(embedder, text_embeddings, pictures)[0][self.task.metric]

    def _measure(
        self, embedder: Embedder, text_embeddings: np.ndarray, pictures: Pictures
    ) -> tuple[dict, dict, list[str]]:
        """Metrics, arrays of the result, and a note where embeddings are equal, since a tie counts as wrong."""
        image_embeddings = finite(embedder.encode_image(pictures))
        ranks = {
            "image_to_text_rank": retrieval.retrieval_ranks(
                image_embeddings, text_embeddings, self._image_ids, self._text_ids
            ),
            "text_to_image_rank": retrieval.retrieval_ranks(
                text_embeddings, image_embeddings, self._text_ids, self._image_ids
            ),
        }
        equal = {
            f"of {len(image_embeddings):,} images have the same embedding as an image with another text": ties(
                image_embeddings, self._image_ids
            ),
            f"of {len(text_embeddings):,} texts have the same embedding as a text of another image": ties(
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


def _captions_by_image(said: Sequence[Said]) -> tuple[list[int], list[list[str]]]:
    """The first row of each image, and all of its captions."""
    rows: list[int] = []
    captions: list[list[str]] = []
    place_of: dict[str, int] = {}
    for row, one in enumerate(said):
        place = place_of.setdefault(one.image, len(rows)) if one.image else len(rows)
        if place < len(rows):
            captions[place] += one.captions
        else:
            rows.append(row)
            captions.append(list(one.captions))
    return rows, captions
