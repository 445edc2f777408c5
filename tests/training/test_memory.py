"""Memory is reported where the device and the operating system know it."""

import jax
import numpy as np

from clip_jax.training.memory import memory_bytes


class Device:
    def __init__(self, stats: dict | None):
        self._stats = stats

    def memory_stats(self) -> dict | None:
        return self._stats


def test_the_host_is_measured_and_cpu_devices_are_not():
    before = memory_bytes()
    kept = np.ones(50_000_000 // 8)
    assert before.keys() == {"memory/host"}
    assert memory_bytes()["memory/host"] - before["memory/host"] > 0.9 * kept.nbytes


def test_the_fullest_device_counts(monkeypatch):
    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 9}, {"bytes_in_use": 7, "peak_bytes_in_use": 8}]
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(found) for found in stats])
    found = memory_bytes()
    assert (found["memory/device"], found["memory/device_peak"]) == (7, 9)


def test_a_device_without_a_peak_has_none(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"bytes_in_use": 5})])
    assert memory_bytes().keys() == {"memory/device", "memory/host"}
