"""What cannot be served is refused with a status, a code, and every problem by name."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npr_megatron.serving.app import MAX_BODY_BYTES
from tests.serving.live import QUESTION, Live
from tests.structures import QUICK

SHARING = settings(QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""The examples of a test share its server."""
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": QUESTION}]
PROMPT = f"{QUESTION}\n"
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES, "max_tokens": 3},
    COMPLETIONS: {"prompt": PROMPT, "max_tokens": 3},
}
WRONG: dict[str, list[Any]] = {
    "temperature": [-1, "hot", True, [], 1e9],
    "top_p": [0, 2, "1", {}],
    "top_k": [-1, 1.5, "all"],
    "min_p": [-0.1, 2, False, []],
    "max_tokens": [0, -3, 1.5, "8", True, []],
    "n": [0, 129, "2", 1.0, True],
    "seed": [1.5, "7", 1 << 64, -(1 << 63) - 1, []],
    "stop": ["", ["a", ""], [1], {}, ["a"] * 5],
    "stream": ["yes", 1, []],
    "npr": [1, "parallel", [], {"mode": "tree"}, {"branchs": True}, {"max_critical_path": 0}],
    "stream_options": [{}, {"include_usage": 1}, {"what": True}, 5],
    "model": [3, [], {}],
    "presence_penalty": [0.5, "x"],
    "frequency_penalty": [-2],
    "logit_bias": [{"5": 1.0}],
    "tools": [[{"type": "function"}], 1],
    "response_format": [{"type": "json_object"}],
    "best_of": [2],
    "whatever": [0, "x"],
}
"""Values of each field that are wrong, whatever else is asked."""


def refused(live: Live, path: str, body: object) -> tuple[int, dict[str, Any]]:
    status, _, told = live.ask("POST", path, body)
    assert set(told) == {"error"}, told
    assert set(told["error"]) == {"message", "type", "param", "code", "problems"}
    assert told["error"]["message"] == "\n".join(told["error"]["problems"]) != ""
    return status, told["error"]


@pytest.fixture(autouse=True)
def it_still_serves(live):
    """Whatever was sent: the server is well afterwards, and holds nothing."""
    yield
    assert live.ask("POST", CHAT, GOOD[CHAT])[0] == 200
    live.wait_until_free()


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named(live, path, name):
    for value in WRONG[name]:
        status, error = refused(live, path, GOOD[path] | {name: value})
        assert (status, error["type"]) == (400, "invalid_request_error")
        assert len(error["problems"]) == 1, (value, error)
        assert name in error["message"], (value, error)


@given(st.data())
@SHARING
def test_all_wrong_fields_are_named_at_once(live, data):
    path = data.draw(st.sampled_from([*GOOD]))
    names = data.draw(st.lists(st.sampled_from([*WRONG]), min_size=1, max_size=6, unique=True))
    wrong = {name: data.draw(st.sampled_from(WRONG[name])) for name in names}
    status, error = refused(live, path, GOOD[path] | wrong)
    assert status == 400
    for name in names:
        told = name in error["message"]
        # What only contradicts another field is told when the fields by themselves are right.
        assert told or (name == "stream_options" and wrong[name] == {}), (wrong, error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*WRONG, "messages", "prompt", "role", "content"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(JSON, st.sampled_from([*GOOD]))
@SHARING
def test_no_json_gets_more_than_a_clear_no(live, value, path):
    body = json.dumps(value).encode()
    status, _, told = live.ask("POST", path, body)
    assert status == 400 and told["error"]["problems"], (status, told)


@given(st.binary(max_size=60), st.sampled_from([*GOOD]))
@SHARING
def test_no_bytes_get_more_than_a_clear_no(live, body, path):
    status, error = refused(live, path, body)
    assert status == 400 and error["code"] in ("invalid_json", "invalid_request")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"messages": "\\ud800"}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_object_of_json_is_refused(live, body):
    status, error = refused(live, CHAT, body)
    assert (status, error["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (None, "messages is missing"),
        ([], "messages is []"),
        ("hello", "messages is 'hello'"),
        ([5], "messages[0] is 5"),
        ([{"role": "user"}], "messages[0].content is missing"),
        ([{"role": "pirate", "content": "x"}], "messages[0].role is 'pirate'"),
        ([{"role": "tool", "content": "x"}], "messages[0].role is 'tool'"),
        ([{"role": "user", "content": 7}], "messages[0].content is 7: must be a string"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "this server reads text only",
        ),
        ([{"role": "user", "content": "a", "tool_calls": []}], "messages[0].tool_calls"),
        ([*MESSAGES, {"role": "assistant", "content": "a"}], "ends with a turn of role assistant"),
        ([{"role": "system", "content": "a"}, *MESSAGES], "no chat template"),
        ([{"role": "user", "content": "BIG"}], "no token for one of its characters"),
    ],
)
def test_messages_that_cannot_be_read_are_named(live, messages, told):
    status, error = refused(live, CHAT, {"messages": messages})
    assert status == 400
    assert told in error["message"]


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [[]], ["a", 5], [1.5], [[1], "a"], {"a": 1}, [True]]
)
def test_prompts_that_cannot_be_read_are_named(live, prompt):
    status, error = refused(live, COMPLETIONS, {"prompt": prompt})
    assert status == 400
    assert error["message"].startswith("prompt is ")


@pytest.mark.parametrize("prompt", ["", [-1], [56], [[1], [2, 99]], [1 << 70]])
def test_prompts_outside_the_vocabulary_are_refused(live, prompt):
    status, error = refused(live, COMPLETIONS, {"prompt": prompt})
    assert status == 400
    assert "no tokens, or ids outside 0..55" in error["message"]


def test_what_is_too_long_says_what_would_fit(live):
    status, error = refused(live, COMPLETIONS, {"prompt": "a" * 1024})
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "has 1024 tokens; the model knows 1024 positions" in error["message"]
    status, error = refused(live, COMPLETIONS, {"prompt": "a" * 1000, "max_tokens": 25})
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "room for 24" in error["message"]
    # Without a wish of the client's the answer gets what the prompt leaves.
    status, _, answer = live.ask("POST", COMPLETIONS, {"prompt": "a" * 1000, "temperature": 0})
    assert status == 200 and answer["usage"]["completion_tokens"] <= 24
    # Branches may be longer together than the model has positions: its paths are not.
    body = {"prompt": "a" * 1000, "max_tokens": 2000, "npr": {"max_critical_path": 24}}
    assert live.ask("POST", COMPLETIONS, body)[0] == 200


def test_answers_that_memory_cannot_hold_are_told_how_many_tokens_it_can(live):
    num_slots = live.served.engine.num_kv_slots
    body: dict[str, Any] = {"prompt": PROMPT, "npr": {"max_critical_path": 8}}
    status, error = refused(live, COMPLETIONS, body | {"max_tokens": num_slots})
    assert (status, error["code"]) == (400, "context_length_exceeded")
    told = re.search(r"has room for (\d+);", error["message"])
    assert told is not None
    most = int(told.group(1))
    assert live.ask("POST", COMPLETIONS, body | {"max_tokens": most})[0] == 200
    assert refused(live, COMPLETIONS, body | {"max_tokens": most + 1})[0] == 400


def test_too_many_choices_and_too_many_bytes_are_refused(live):
    status, error = refused(live, COMPLETIONS, {"prompt": ["a"] * 65, "n": 2})
    assert status == 400 and "130 choices; ask for at most 128" in error["message"]
    status, error = refused(live, COMPLETIONS, b'"' + b"a" * (MAX_BODY_BYTES + 1))
    assert (status, error["code"]) == (400, "request_too_large")


def test_fields_that_exclude_each_other_are_refused(live):
    watched = {"stream": True, "npr": {"branches": True}}
    for path, changes, told in (
        (CHAT, {"npr": {"branches": True}}, "npr.branches is given without stream"),
        (CHAT, {"stream_options": {"include_usage": True}}, "without stream"),
        (CHAT, watched | {"stop": "a"}, "exclude each other"),
        (CHAT, {"logprobs": True, "stop": "a"}, "exclude each other"),
        (CHAT, {"max_completion_tokens": 4}, "give one of them"),
        (CHAT, {"logprobs": True, "top_logprobs": 2}, "top_logprobs is not supported"),
        (COMPLETIONS, {"logprobs": 2}, "logprobs is 2"),
    ):
        status, error = refused(live, path, GOOD[path] | changes)
        assert status == 400 and told in error["message"], error


def test_fields_that_ask_for_nothing_are_harmless(live):
    neutral = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "me",
        "metadata": {"a": "b"},
        "stop": None,
        "seed": None,
        "max_completion_tokens": None,
    }
    assert live.ask("POST", CHAT, GOOD[CHAT] | neutral)[0] == 200


def test_unknown_fields_are_told_their_nearest(live):
    _, error = refused(live, CHAT, GOOD[CHAT] | {"temprature": 1})
    assert error["problems"] == [
        "temprature is no field that this server knows; did you mean temperature?"
    ]


def test_another_model_and_another_path_are_not_found(live):
    with pytest.raises(openai.NotFoundError, match="ask for 'speaker'"):
        live.client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.NotFoundError, match="not served here"):
        live.client.models.retrieve("gpt/5")
    with pytest.raises(openai.NotFoundError, match="there are /v1/chat/completions"):
        live.client.embeddings.create(model="speaker", input="a")
    status, _, told = live.ask("GET", CHAT)
    assert status == 405 and told["error"]["code"] == "not_found"


def test_the_client_raises_what_was_wrong(live):
    with pytest.raises(openai.BadRequestError) as refusal:
        live.client.chat.completions.create(
            model="speaker", messages=[{"role": "user", "content": QUESTION}], temperature=-1, n=0
        )
    assert refusal.value.code == "invalid_request"
    assert "n is 0" in refusal.value.message and "temperature is -1" in refusal.value.message


def test_requests_are_described(live):
    status, _, described = live.ask("GET", "/openapi.json")
    assert status == 200
    content = described["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]
    assert {"messages", "npr", "stop", "temperature"} <= set(content["schema"]["properties"])
