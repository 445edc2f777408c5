"""Tasks with their data: opened once, scored any number of times, in training and by ``clip_jax.evaluate``."""

import os
from collections.abc import Callable, Sequence

from clip_jax.data.images import DEFAULT_PREPROCESSING
from clip_jax.evaluation.classification import ClassificationTask
from clip_jax.evaluation.embedding import Embedder
from clip_jax.evaluation.measuring import NO_EXTRAS, Extras
from clip_jax.evaluation.registry import Task
from clip_jax.evaluation.remembered import Classifier
from clip_jax.evaluation.results import MissingTask, Results
from clip_jax.evaluation.retrieval_task import RetrievalTask
from clip_jax.models.preprocessing import Preprocessing


class Evaluations:
    """Tasks whose data is opened; those without data here are ``missing``, those with wrong data ``broken``.

    Args:
      tasks: of :func:`clip_jax.evaluation.registry.find_tasks`.
      image_size: S, of the model.
      data: the folder that ``{data}`` stands for.
      preprocessing: of the model.
    """

    def __init__(
        self, tasks: Sequence[Task], image_size: int, data: str, preprocessing: Preprocessing = DEFAULT_PREPROCESSING
    ):
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
        tell: Callable[[Results], None] = lambda results: None,
        again: bool = True,
    ) -> Results:
        """Scores the embedder's model on every task.

        A task that fails, since a picture cannot be decoded or embeddings are not finite, is one that was not scored,
        with the reason; the others go on.

        Args:
          classifier: of the class names and templates of a task.
          tell: hears of the results so far after each task.
          again: whether pictures are kept for the next time.
        """
        results = Results(model, architecture, [], [*self.missing, *self.broken])
        for task in self.tasks:
            try:
                results.tasks.append(task.score(embedder, classifier, extras))
            except (ValueError, FloatingPointError) as error:
                results.missing.append(_not_scored(task.task, error))
            if not again:
                task.pictures.forget()
            tell(results)
        return results


def _not_scored(task: Task, error: Exception, how_to_get: str = "") -> MissingTask:
    return MissingTask(task.name, task.title or task.name, " ".join(str(error).split()), how_to_get)
