"""What a server counts, in the words of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from npr_megatron.engine.stats import EngineStats
from npr_megatron.records.trajectory import Trajectory

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_GAUGES = {
    "running": "Answers being decoded",
    "waiting": "Answers that wait for room",
    "kv_slots_held": "Tokens whose keys and values are in use",
    "kv_slots_idle": "Tokens of prompts that are kept for later requests",
}
_COUNTERS = {
    "preemptions": "Answers that had to give up their memory for a while",
    "replayed_tokens": "Tokens computed again because of preemptions",
    "prompt_tokens": "Prompt tokens of admitted requests, all but each prompt's last",
    "cached_prompt_tokens": "How many of them were there already",
}


class Metrics:
    """Counters and histograms of one server; the engine's own numbers are put beside them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter(
            "npr_requests", "Requests", ["endpoint", "status"], registry=registry
        )
        self._seconds = Histogram(
            "npr_request_seconds",
            "From the request to the end of its response",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first_text = Histogram(
            "npr_first_text_seconds",
            "From the request to the first text of a stream",
            buckets=_SECONDS,
            registry=registry,
        )
        self._answers = Counter("npr_answers", "Answers that ended", ["finish"], registry=registry)
        self._tokens = Counter("npr_generated_tokens", "Over all branches", registry=registry)
        self._path = Counter(
            "npr_critical_path_tokens", "On the longest path of each answer", registry=registry
        )
        self._lengths = Histogram(
            "npr_answer_tokens", "Tokens per answer", buckets=_TOKENS, registry=registry
        )
        self._forks = Counter("npr_forks", "Times an answer branched", registry=registry)
        self._joins = Counter("npr_joins", "Times branches were joined", registry=registry)

    def request_ended(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a response; 499 is the status of those whose client hung up."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def first_text(self, seconds: float) -> None:
        """Count the first text of a stream."""
        self._first_text.observe(seconds)

    def answer_ended(self, trajectory: Trajectory) -> None:
        """Count an answer."""
        forks, joins = forks_and_joins(trajectory)
        self._answers.labels(str(trajectory.finish)).inc()
        self._tokens.inc(trajectory.num_tokens)
        self._path.inc(trajectory.critical_path_tokens)
        self._lengths.observe(trajectory.num_tokens)
        self._forks.inc(forks)
        self._joins.inc(joins)

    def exposition(self) -> bytes:
        """Return what was counted in the text format of Prometheus."""
        return generate_latest(self._registry)


def engine_exposition(stats: EngineStats, weight_version: int, num_slots: int) -> bytes:
    """Return the engine's own numbers in the text format of Prometheus.

    Args:
        num_slots: tokens whose keys and values fit.
    """
    registry = CollectorRegistry()
    registry.register(_EngineNumbers(stats, weight_version, num_slots))
    return generate_latest(registry)


class _EngineNumbers(Collector):
    def __init__(self, stats: EngineStats, weight_version: int, num_slots: int) -> None:
        self._stats = stats
        self._others = {
            "kv_slots": ("Tokens whose keys and values fit", num_slots),
            "weight_version": ("Version of the weights", weight_version),
        }

    def collect(self) -> Iterator[Metric]:
        for name, help_text in _GAUGES.items():
            value = getattr(self._stats, f"num_{name}")
            yield GaugeMetricFamily(f"npr_{name}", help_text, value)
        for name, (help_text, value) in self._others.items():
            yield GaugeMetricFamily(f"npr_{name}", help_text, value)
        for name, help_text in _COUNTERS.items():
            value = getattr(self._stats, f"num_{name}")
            yield CounterMetricFamily(f"npr_{name}", help_text, value)


def forks_and_joins(trajectory: Trajectory) -> tuple[int, int]:
    """Return how often ``trajectory`` branched, and how often it went on behind its branches."""
    branch = trajectory.branch
    joins = np.count_nonzero((branch[:-1] > 0) & (branch[1:] == 0))
    return trajectory.num_blocks, int(joins)
