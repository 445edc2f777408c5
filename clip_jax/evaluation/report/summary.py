"""Writes the start of a report: an introduction, a table of all tasks, and the meaning of the numbers."""

from collections.abc import Sequence

from clip_jax.evaluation.figures import Html, escaped
from clip_jax.evaluation.report.page import SHORT, join, marked, metric_name, percent, table
from clip_jax.evaluation.report.published import shifts_of
from clip_jax.evaluation.results import REFERENCES, MissingTask, Results, TaskResult

MEANING = {
    "top_1": "the share of images whose right class is the model's first answer.",
    "top_5": "the share of images whose right class is among the model's first five answers.",
    "mean_top_1_top_5": "the mean of those two.",
    "mean_per_class": "the share of right first answers within each class, averaged over the classes, so that rare "
    "classes count as much as frequent ones.",
    "calibration_error": "the average distance between the probability that the model states and the share of its "
    "answers that are right; 0 is best.",
    "average_precision_11": "for images that show several classes: how well each class's images are ranked before all "
    "others, averaged over the classes.",
    "roc_auc": "the probability that an image of the second class is ranked before one of the first; 50 % is guessing.",
    "recall": "recall@k is the share of queries with a right answer among the first k. Image to text searches the text "
    "of an image, text to image searches the image of a text.",
    "chance": "the expected value of guessing.",
    "largest_class": "the value of answering every image with the class that most images have. A model below it is of "
    "no use here, even if it is above chance.",
    "baseline": "the value of comparing pixels with the mean training image of each class, without any learning.",
    "not_above": "marks a result that does not exceed one of these references.",
    "linear_probe": "a linear classifier trained on the model's image embeddings with labels. It measures the "
    "information in the image embeddings, without the text tower.",
    "synthetic_shift": "the same images with blur, noise, JPEG compression and brightness, at five strengths.",
    "effective_robustness": "accuracy on images of another kind, minus the accuracy of models trained on ImageNet that "
    "are as accurate on ImageNet itself; above 0 is better.",
}


def task_title(task: TaskResult | MissingTask) -> str:
    return task.title or task.name


def introduction(title: str, results: Results) -> Html:
    architecture = f"<p class='quiet'>{escaped(results.architecture)}</p>" if results.architecture else ""
    return Html(
        f"<h1>{escaped(title)}</h1>{architecture}"
        "<p>A CLIP model maps images and texts to vectors in one space, where an image is close to the texts that "
        "describe it. In <b>zero-shot classification</b> the model sees an image and the names of all classes, and "
        "answers with the closest name; it was never trained to classify. In <b>retrieval</b> it searches the text of "
        "an image among all texts, or the image of a text among all images.</p>"
    )


def summary_section(tasks: list[TaskResult], anchors: dict[str, str]) -> Html:
    if not tasks:
        return Html("<p>Nothing was evaluated.</p>")
    references = {key: name for key, name in reversed(REFERENCES.items()) if any(getattr(task, key) for task in tasks)}
    rows = []
    for task in tasks:
        link = Html(f'<a href="#{anchors[task.name]}">{escaped(task_title(task))}</a>')
        value = marked(task.metrics.get(task.metric), task.not_above(task.metric))
        others = [percent(getattr(task, key).get(task.metric)) for key in references]
        images, choices = task.counts.get("images"), task.counts.get("classes", task.counts.get("texts"))
        counts = ["–" if count is None else f"{count:,}" for count in (images, choices)]
        rows.append([link, metric_name(task.metric), value, *others, *counts])
    levels = [f"{name}, %" for name in references.values()]
    head = ["task", "metric", "this model, %", *levels, "images", "classes or texts"]
    return join("<h2>Summary</h2>", table(head, rows, texts=2, stack=True))


def meanings(tasks: list[TaskResult], published: dict) -> Html:
    """Returns a sentence for each kind of number that is on the page."""
    used = {name for task in tasks for name in task.metrics}
    used |= {"recall"} if any("recall@" in name for name in used) else set()
    for name in (*REFERENCES, "linear_probe", "synthetic_shift"):
        used |= {name} if any(getattr(task, name) for task in tasks) else set()
    used |= {"not_above"} if any(task.not_above(task.metric) for task in tasks) else set()
    used |= {"effective_robustness"} if shifts_of(tasks, published) else set()
    entries = "".join(
        f"<dt>{escaped(SHORT.get(name, name.replace('_', ' ')))}</dt><dd>{escaped(sentence)}</dd>"
        for name, sentence in MEANING.items()
        if name in used
    )
    return Html(f"<h2>What the numbers mean</h2><dl>{entries}</dl>" if entries else "")


def missing_section(missing: Sequence[MissingTask]) -> Html:
    if not missing:
        return Html("")
    rows = [[task_title(task), task.reason, task.how_to_get] for task in missing]
    return join("<h2>Not evaluated</h2>", table(["task", "why", "how to get it"], rows, texts=3, stack=True))
