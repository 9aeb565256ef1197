"""``/metrics``, read by Prometheus' own parser."""

from __future__ import annotations

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.live import QUESTION, Live, raw_post, serving

PROMPT = f"{QUESTION}\n"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def own(speaker):
    """A server nobody else counts on."""
    with serving(speaker, max_running=2, num_kv_slots=4096) as live:
        yield live


def read(live: Live) -> Samples:
    status, headers, text = live.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain")
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_answers_are_counted_with_their_tokens_forks_and_joins(own):
    answers = own.client.completions.create(model="speaker", prompt=PROMPT, n=8, seed=3)
    shapes = [choice.npr for choice in answers.choices]
    seen = read(own)
    assert value(seen, "npr_answers_total", finish="stop") == 8
    assert value(seen, "npr_generated_tokens_total") == answers.usage.completion_tokens
    paths = sum(shape["critical_path_tokens"] for shape in shapes)
    assert value(seen, "npr_critical_path_tokens_total") == paths
    assert paths < answers.usage.completion_tokens
    blocks = sum(shape["num_blocks"] for shape in shapes)
    assert value(seen, "npr_forks_total") == value(seen, "npr_joins_total") == blocks > 8
    assert value(seen, "npr_answer_tokens_count") == 8
    assert value(seen, "npr_answer_tokens_sum") == answers.usage.completion_tokens
    assert value(seen, "npr_kv_slots") == 4096
    assert value(seen, "npr_prompt_tokens_total") == 8 * (len(PROMPT) - 1)
    assert value(seen, "npr_cached_prompt_tokens_total") > 0
    assert value(seen, "npr_weight_version") == 1


def test_an_answer_that_ends_between_fork_and_join_is_counted_once(own):
    for seed in range(20):
        answer = own.client.completions.create(
            model="speaker", prompt=PROMPT, seed=seed, extra_body={"npr": {"max_critical_path": 20}}
        )
    assert answer.choices
    seen = read(own)
    assert value(seen, "npr_joins_total") < value(seen, "npr_forks_total")


def test_requests_are_counted_by_path_and_status_and_timed(own):
    own.client.completions.create(model="speaker", prompt=PROMPT)
    list(own.client.completions.create(model="speaker", prompt=PROMPT, stream=True))
    own.ask("POST", "/v1/completions", {})
    own.ask("GET", "/nowhere")
    own.ask("GET", "/health")
    seen = read(own)
    completions = {"endpoint": "/v1/completions"}
    assert value(seen, "npr_requests_total", status="200", **completions) == 2
    assert value(seen, "npr_requests_total", status="400", **completions) == 1
    assert value(seen, "npr_requests_total", status="404", endpoint="other") == 1
    assert value(seen, "npr_requests_total", status="200", endpoint="/health") == 1
    assert value(seen, "npr_request_seconds_count", **completions) == 3
    assert value(seen, "npr_first_text_seconds_count") == 1
    assert (
        0
        < value(seen, "npr_first_text_seconds_sum")
        < value(seen, "npr_request_seconds_sum", **completions)
    )


def test_what_runs_and_waits_is_seen_while_it_does(own):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 1000, "n": 3}
    busy = raw_post(own.port, "/v1/completions", body)
    until = threading.Event()
    for _ in range(1000):
        seen = read(own)
        if value(seen, "npr_waiting") == 1:
            break
        until.wait(0.01)
    assert value(seen, "npr_running") == 2
    assert value(seen, "npr_kv_slots_held") > 0
    busy.close()
    own.wait_until_free()
    seen = read(own)
    assert value(seen, "npr_running") == value(seen, "npr_waiting") == 0
    assert value(seen, "npr_requests_total", status="499", endpoint="/v1/completions") == 1
