"""The training time of a run, over all processes that took part in it."""

from clip_jax.training.metrics import StepLog, training_seconds


class Writer:
    def __init__(self):
        self.records = []

    def write(self, step, scalars):
        self.records.append({"step": step, **scalars})


def test_the_training_time_goes_on_from_the_processes_before(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("clip_jax.training.metrics.time.perf_counter", lambda: now[0])
    writer = Writer()
    log = StepLog(every=2, images_per_step=8, last_step=6, writer=writer, seconds_before=50.0)
    metrics = {"loss": 1.0, "gradient_norm": 1.0, "image_to_text_accuracy": 0.5, "text_to_image_accuracy": 0.5}
    for step in (4, 5, 6):
        now[0] += 10
        log.add(step, metrics, {})
    log.flush()
    assert [(record["step"], record["seconds"]) for record in writer.records] == [(4, 70.0), (6, 80.0)]
    history = [{"step": 2, "seconds": 50.0}, *writer.records, {"step": 6, "odd/top_1": 0.5}]
    assert [training_seconds(history, step) for step in (1, 2, 3, 4, 6)] == [0, 50.0, 50.0, 70.0, 80.0]
    assert training_seconds([{"step": 1, "loss": 1.0}], 1) == 0  # a run from before the times were kept
