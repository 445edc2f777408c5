"""Tests how a browser shows the report and the comparison, on a phone and on a wide screen."""

import json
import os
import shutil

import numpy as np
import pytest
from etils import epath

from clip_jax.evaluation.comparison import compare, write_comparison
from clip_jax.evaluation.provenance import provenance
from clip_jax.evaluation.report import write_report
from clip_jax.evaluation.results import MissingTask, Results, TaskResult, write_results

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
LONG = "a_name_without_any_space_that_is_longer_than_the_screen_of_a_phone_is_wide"
MODELS = ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"]
PUBLISHED = {
    "zero_shot": {"source": "a table", "models": MODELS, "tasks": {"imagenet": [*range(60, 69)]}},
    "shift": {"source": LONG, "models": MODELS, "tasks": {"art": [*range(50, 59)]}},
    "standard_models": {
        "source": "another",
        "models": ["one", "two", "three"],
        "tasks": {"imagenet": [60, 70, 80], "art": [20, 33, 50]},
    },
}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not executable:
        pytest.skip("needs a Chromium: install one, or name it in the environment variable CHROMIUM")
    with playwright.sync_playwright() as running:
        # Without its sandbox, which does not work for root, as in a container; the pages are the test's own.
        started = running.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()


def results(model, seed):
    rng = np.random.default_rng(seed)
    names = [LONG, "<b>&", *(f"class {n}" for n in range(10))]
    labels = np.arange(60, dtype=np.int32) % len(names)
    probabilities = rng.dirichlet(np.full(len(names), 0.3), len(labels))
    best = np.argsort(-probabilities, axis=1)[:, :5].astype(np.int32)
    zero_shot = {
        "labels": labels,
        "best": best,
        "probabilities": np.take_along_axis(probabilities, best, 1).astype(np.float32),
    }
    retrieval = {
        "image_to_text_rank": rng.integers(0, 20, 60),
        "shown_texts": np.arange(3),
        "best_images": rng.integers(0, 60, (3, 5)),
        "right_images": rng.random((3, 5)) < 0.3,
    }
    images = rng.integers(0, 256, (60, 200, 200, 3), dtype=np.uint8)
    counts = {"images": 60, "classes": len(names), "texts": 60}
    shift = {f"corruption_{n}": [0.1, 0.08, 0.05, 0.04, 0.02] for n in range(18)}
    accuracy = {"top_1": float((best[:, 0] == labels).mean())}
    recall = {f"image_to_text_recall@{k}": float((retrieval["image_to_text_rank"] < k).mean()) for k in (1, 5, 10)}
    tasks = [
        TaskResult("names", LONG, "zero_shot", "top_1", accuracy, counts, synthetic_shift=shift, class_names=names,
                   chance={"top_1": 1 / 12}, largest_class={"top_1": 0.2}, baseline={"top_1": 0.9},
                   linear_probe={"accuracy": 0.4, "C": 1.0}, arrays=zero_shot, image_at=images.__getitem__),
        TaskResult("pairs", "", "retrieval", "image_to_text_recall@1", recall, counts, chance=recall, arrays=retrieval,
                   texts=["one", LONG, "three"], image_at=images.__getitem__),
        TaskResult("imagenet", "", "zero_shot", "top_1", {"top_1": 0.6}, counts),
        TaskResult("art", "", "zero_shot", "top_1", {"top_1": 0.5}, counts),
    ]  # fmt: skip
    return Results(model, "ViT-B/32", tasks, [MissingTask("food", "Food", LONG, LONG)])


@pytest.fixture(scope="module", params=["report", "comparison", "least report"])
def path(request, tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("page"))
    if request.param == "comparison":
        for seed, model in enumerate(["one", LONG]):
            write_results(folder / str(seed), results(model, seed))
        write_comparison(folder, compare([folder / "0", folder / "1"]))
        return folder / "comparison.html"
    history = [{"step": step, "loss": 1 / step, "names/top_1": 0.1} for step in range(1, 100)]
    if request.param == "report":
        facts = {"steps": "99", "training_time": "1m02s", "config": json.dumps({LONG: LONG})}
        made = provenance("clip_jax.main", [f"--config={LONG}"], model=LONG, **facts)
        write_report(folder, results(LONG, 0), history, PUBLISHED, made)
    else:
        write_report(folder, Results("model", "", []))
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1_400])
def test_the_page_fits_and_is_whole(browser, path, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url[:80]))
    page.goto(f"file://{path}")
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    page.evaluate("Promise.all([...document.images].map(image => image.decode()))")
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert all(width > 0 for width in widths)
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth") <= page.evaluate(f"{root}.clientWidth")
    assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 14
    smallest = """Math.min(...[...document.querySelectorAll("body *")]
        .map(element => parseFloat(getComputedStyle(element).fontSize)))"""
    assert page.evaluate(smallest) >= 14
    # No cell of a table that stacks is cut off: chance and baselines of the summary among them.
    outside = """[...document.querySelectorAll(".stack td")].map(cell => cell.getBoundingClientRect())
        .filter(box => box.width > 0 && (box.left < 0 || box.right > innerWidth + 0.5)).length"""
    assert page.evaluate(outside) == 0
    assert not complaints
    page.close()
