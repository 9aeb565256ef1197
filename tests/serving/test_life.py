"""The server under strain: clients that hang up, too many of them, new weights, a dead engine."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from typing import Any

import openai
import pytest

from npr_megatron.serving.app import Host, app_of
from npr_megatron.serving.http_thread import HttpThread, listen
from tests.serving.live import DEADLINE_S, QUESTION, Live, raw_post, serving

PROMPT = f"{QUESTION}\n"
ENDLESS: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 1000}
"""Greedily the model repeats itself up to the limit."""


def wait_for(is_so: Any) -> None:
    until = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.005)


def events_of(text: bytes) -> list[Any]:
    """Return the events of a response read off a socket, chunked transfer undone."""
    lines = [line for line in text.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def read_all(connection: Any) -> bytes:
    parts = []
    with connection:
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_gives_its_memory_back(live, stream):
    num_cut = answers_ended(live, "aborted")
    connection = raw_post(live.port, "/v1/completions", ENDLESS | {"n": 16, "stream": stream})
    wait_for(lambda: live.stats().num_running == 16)
    assert live.stats().num_kv_slots_held > 0
    connection.close()
    live.wait_until_free()
    assert answers_ended(live, "aborted") == num_cut + 16


def answers_ended(live: Live, finish: str) -> float:
    registry = live.host.metrics._registry
    return registry.get_sample_value("npr_answers_total", {"finish": finish}) or 0.0


def test_an_async_client_that_stops_listening_gives_its_memory_back(live):
    async def listen_a_little() -> None:
        async with live.async_client() as client:
            stream = await client.completions.create(model="speaker", stream=True, **ENDLESS)
            async for _ in stream:
                break
            await stream.close()

    num_cut = answers_ended(live, "aborted")
    asyncio.run(listen_a_little())
    live.wait_until_free()
    assert answers_ended(live, "aborted") == num_cut + 1


def test_clients_that_hang_up_at_any_moment_leave_nothing(live):
    rng = random.Random(0)
    for _ in range(60):
        body = ENDLESS | {"n": rng.randint(1, 4), "stream": rng.random() < 0.7}
        connection = raw_post(live.port, "/v1/completions", body)
        if rng.random() < 0.5:
            time.sleep(rng.random() * 0.02)
        connection.close()
    live.wait_until_free()
    assert live.client.completions.create(model="speaker", prompt=PROMPT).choices[0].text


def test_half_a_request_disturbs_nobody(live):
    connection = raw_post(live.port, "/v1/completions", ENDLESS)
    connection.close()
    other = raw_post(live.port, "/v1/completions", ENDLESS)
    other.shutdown(1)
    other.close()
    live.wait_until_free()


def test_overload_is_refused_with_the_time_to_come_back(speaker):
    with serving(speaker, max_running=2, max_waiting=2) as live:
        busy = raw_post(live.port, "/v1/completions", ENDLESS | {"n": 3})
        wait_for(lambda: live.service.num_open == 3)
        stats = live.stats()
        assert (stats.num_running, stats.num_waiting) == (2, 1)
        status, headers, told = live.ask("POST", "/v1/completions", ENDLESS | {"n": 2})
        assert (status, headers["retry-after"]) == (429, "1")
        assert told["error"]["code"] == "overloaded"
        assert (
            "3 answers run or wait, 2 more were asked for, 4 are taken"
            in (told["error"]["message"])
        )
        with pytest.raises(openai.RateLimitError):
            live.client.completions.create(model="speaker", prompt=PROMPT, n=2)
        status, _, told = live.ask("POST", "/v1/completions", ENDLESS | {"n": 5})
        assert status == 400 and "this server takes 4" in told["error"]["message"]
        assert live.ask("GET", "/health")[0] == 200
        busy.close()
        live.wait_until_free()
        patient = live.client.with_options(max_retries=5)
        assert patient.completions.create(model="speaker", prompt=PROMPT, n=4).choices


def test_a_waiting_client_that_hangs_up_is_forgotten(speaker):
    with serving(speaker, max_running=1) as live:
        busy = raw_post(live.port, "/v1/completions", ENDLESS)
        wait_for(lambda: live.stats().num_running == 1)
        waiting = raw_post(live.port, "/v1/completions", ENDLESS | {"stream": True})
        wait_for(lambda: live.stats().num_waiting == 1)
        waiting.close()
        wait_for(lambda: live.stats().num_waiting == 0)
        assert live.stats().num_running == 1
        busy.close()
        live.wait_until_free()


def push(live: Live, version: int) -> None:
    """Commit new weights, equal to the old ones, between two steps."""

    def commit() -> None:
        live.engine.load(dict(live.engine.weights), version)

    live.service._loop.between_steps(commit)


def slow_streams(live: Live, *bodies: dict[str, Any]) -> list[Any]:
    """Begin streams; return their connections once each has said something."""
    connections = [
        raw_post(live.port, "/v1/completions", ENDLESS | {"stream": True} | body) for body in bodies
    ]
    for connection in connections:
        head = connection.recv(1 << 12)
        while b"data: " not in head:
            head += connection.recv(1 << 12)
    return connections


def test_answers_that_begin_anew_are_told(speaker):
    with serving(speaker, kv_after_push="drop") as live:
        watched, plain = slow_streams(live, {"npr": {"branches": True}}, {})
        push(live, 5)
        told = events_of(read_all(watched))
        restarts = [index for index, x in enumerate(told) if x["npr"]["event"] == "restart"]
        assert told[restarts[0]]["npr"] == {"event": "restart", "weight_version": 5}
        text = "".join(x["choices"][0]["text"] for x in told[restarts[-1] :])
        whole = live.client.completions.create(model="speaker", **ENDLESS).choices[0].text
        assert text == whole
        # What plain clients have read cannot be taken back.
        assert events_of(read_all(plain))[-1]["error"]["code"] == "answer_restarted"
        live.wait_until_free()


def test_nobody_learns_of_a_new_beginning_who_has_heard_nothing(speaker):
    with serving(speaker, kv_after_push="drop") as live:
        answers: list[str] = []

        def ask() -> None:
            answer = live.client.completions.create(model="speaker", **ENDLESS)
            answers.append(answer.choices[0].text)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(lambda: live.stats().num_running == 1)
        push(live, 5)
        asking.join()
        ask()
        assert answers[0] == answers[1]


def test_streams_go_on_when_new_weights_keep_the_text(speaker):
    with serving(speaker, kv_after_push="recompute") as live:
        connections = slow_streams(live, {}, {"npr": {"branches": True}})
        push(live, 5)
        for connection in connections:
            events = events_of(read_all(connection))
            assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_dead_engine_is_told_to_everybody(speaker):
    with serving(speaker) as live:
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(live.client.completions.create(model="speaker", **ENDLESS))
            except openai.APIError as error:
                answers.append(error)

        asking = threading.Thread(target=ask)
        (stream,) = slow_streams(live, {})
        asking.start()
        wait_for(lambda: live.service.num_open == 2)

        def break_down() -> None:
            raise ZeroDivisionError("as the test wants it")

        with pytest.raises(ZeroDivisionError):
            live.service._loop.between_steps(break_down)
        asking.join()
        assert isinstance(answers[0], openai.InternalServerError)
        assert "the engine has failed: as the test wants it" in answers[0].message
        assert events_of(read_all(stream))[-1]["error"]["code"] == "engine_failed"
        assert live.failed.wait(DEADLINE_S)
        status, _, told = live.ask("GET", "/health")
        assert (status, told) == (503, {"status": "failed"})
        status, _, told = live.ask("POST", "/v1/completions", ENDLESS)
        assert (status, told["error"]["code"]) == (500, "engine_failed")
        assert live.ask("GET", "/metrics")[0] == 200


def test_before_the_engine_is_there_clients_are_told_to_come_back():
    listener = listen("127.0.0.1", 0)
    thread = HttpThread(app_of(Host()), listener)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError, match="the server is starting"):
                client.completions.create(model="speaker", prompt=PROMPT)
            with pytest.raises(openai.InternalServerError) as told:
                client.models.list()
            assert told.value.response.headers["retry-after"] == "1"
    finally:
        thread.stop()
