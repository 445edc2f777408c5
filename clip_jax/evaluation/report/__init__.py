"""Writes the report of an evaluation: one HTML page that needs no other file, for readers who are new to CLIP."""

from collections.abc import Sequence

from etils import epath

from clip_jax.evaluation.figures import Html, escaped
from clip_jax.evaluation.provenance import Provenance
from clip_jax.evaluation.report.classification import MISTAKES, classification_section
from clip_jax.evaluation.report.page import page, title_of
from clip_jax.evaluation.report.provenance import provenance_section
from clip_jax.evaluation.report.published import load_published, natural_shift_section
from clip_jax.evaluation.report.retrieval import retrieval_section
from clip_jax.evaluation.report.summary import introduction, meanings, missing_section, summary_section, task_title
from clip_jax.evaluation.report.training import training_section
from clip_jax.evaluation.results import Results

# Random images shown for one task, and about how many for all tasks together: keeps a page of 30 tasks small.
SAMPLES, ALL_SAMPLES = 36, 180


def write_report(
    folder: epath.Path,
    results: Results,
    history: Sequence[dict[str, float]] = (),
    published: dict | None = None,
    provenance: Provenance | None = None,
) -> None:
    """Writes ``folder/report.html``.

    Args:
      folder: created if it does not exist.
      results: may have no tasks.
      history: from :func:`clip_jax.training.metrics.read_metrics`; empty for weights that were not trained here.
      published: replaces :func:`clip_jax.evaluation.report.published.load_published`.
      provenance: how the results were made; None leaves this section out.
    """
    published = load_published() if published is None else published
    anchors = {task.name: f"task-{number}" for number, task in enumerate(results.tasks, 1)}
    samples = max(MISTAKES, min(SAMPLES, ALL_SAMPLES // max(1, len(results.tasks))))
    title = title_of(results.model)
    body = [introduction(title, results), summary_section(results.tasks, anchors), meanings(results.tasks, published)]
    body += [provenance_section(provenance), training_section(history, results.tasks)]
    body.append(natural_shift_section(results.tasks, published))
    for task in results.tasks:
        if task.kind == "retrieval":
            section = retrieval_section(task, published)
        else:
            section = classification_section(task, published, samples)
        body.append(Html(f'<section id="{anchors[task.name]}"><h2>{escaped(task_title(task))}</h2>{section}</section>'))
    body.append(missing_section(results.missing))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page(f"clip_jax: {title}", body), encoding="utf-8")
