"""Opens the data of tasks once and scores models on them, in training and in ``clip_jax.evaluate``."""

import os
from collections.abc import Callable, Sequence

from clip_jax.errors import one_line
from clip_jax.evaluation.cached import Classifier
from clip_jax.evaluation.classification import ClassificationTask
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.measuring import NO_EXTRAS, Extras
from clip_jax.evaluation.results import MissingTask, Results
from clip_jax.evaluation.retrieval_task import RetrievalTask
from clip_jax.evaluation.task import Task
from clip_jax.models.preprocessing import OPENAI_PREPROCESSING, Preprocessing


class Evaluations:
    """Tasks with their data.

    Args:
      tasks: from :func:`clip_jax.evaluation.registry.find_tasks`.
      image_size: the model's, in pixels.
      data: the folder that replaces ``{data}`` in sources.
      preprocessing: the model's.
      keep_images: whether decoded images stay in memory for the next call of :meth:`score`.

    Attributes:
      tasks: the tasks whose data is open.
      missing: the tasks whose data was not found.
      broken: the tasks whose data is not valid.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        image_size: int,
        data: str,
        preprocessing: Preprocessing = OPENAI_PREPROCESSING,
        keep_images: bool = True,
    ):
        self._keep_images = keep_images
        kinds = {"zero_shot": ClassificationTask, "retrieval": RetrievalTask}
        self.tasks: list[ClassificationTask | RetrievalTask] = []
        self.missing: list[MissingTask] = []
        self.broken: list[MissingTask] = []
        for task in tasks:
            try:
                self.tasks.append(kinds[task.kind](task, image_size, os.path.expanduser(data), preprocessing))
            except FileNotFoundError as error:
                self.missing.append(_not_scored(task, error, task.how_to_get.replace("{data}", data)))
            except ValueError as error:
                self.broken.append(_not_scored(task, error))

    def __bool__(self) -> bool:
        return bool(self.tasks)

    def score(
        self,
        embedder: Embedder,
        classifier: Classifier,
        model: str,
        architecture: str,
        extras: Extras = NO_EXTRAS,
        on_result: Callable[[Results], None] = lambda results: None,
    ) -> Results:
        """Scores the embedder's model on every task.

        A task fails if an image cannot be decoded or embeddings are not finite. It is added to ``missing`` with the
        reason, and the other tasks are scored.

        Args:
          embedder: the model with its parameters.
          classifier: from class names and templates to classifier weights.
          model, architecture: names for the results.
          extras: optional measurements.
          on_result: called after each task with the results so far.
        """
        results = Results(model, architecture, [], [*self.missing, *self.broken])
        for task in self.tasks:
            try:
                results.tasks.append(task.score(embedder, classifier, extras))
            except (ValueError, FloatingPointError) as error:
                results.missing.append(_not_scored(task.task, error))
            if not self._keep_images:
                task.images.clear_cache()
            on_result(results)
        return results


def _not_scored(task: Task, error: Exception, how_to_get: str = "") -> MissingTask:
    return MissingTask(task.name, task.title or task.name, one_line(error), how_to_get)
