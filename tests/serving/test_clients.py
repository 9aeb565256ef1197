"""The official client of OpenAI's: chat and completions, streamed or not, many at once."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from typing import Any

import pytest

from tests.serving.live import QUESTION, Live

PROMPT = f"{QUESTION}\n"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
SEEDS = range(12)


def chat(live: Live, seed: int, **options: Any) -> Any:
    return live.client.chat.completions.create(
        model="speaker", messages=MESSAGES, seed=seed, **options
    )


def text_of(chunks: list[Any]) -> str:
    return "".join(
        choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.delta
    )


def test_the_model_is_listed_by_its_name(live):
    models = live.client.models
    assert [model.id for model in models.list()] == ["speaker"]
    assert models.retrieve("speaker").id == "speaker"


def test_chat_answers_branch_and_tell_their_usage(live):
    answer = chat(live, 1)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content.startswith("<guideline>\n<plan>1:aa</plan>\n")
    assert "<eos>" not in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(live.served.tokenizer.encode(PROMPT))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    spoken = live.served.tokenizer.encode(choice.message.content)
    assert answer.usage.completion_tokens == len(spoken) + 1  # the end token
    assert answer.usage.npr["critical_path_tokens"] <= answer.usage.completion_tokens


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_plain_stream_is_the_text_that_is_returned_without_one(live, mode):
    seen = set()
    for seed in SEEDS[:6]:
        extra = {"npr": {"mode": mode}}
        whole = chat(live, seed, extra_body=extra)
        options = {"include_usage": True}
        chunks = list(chat(live, seed, stream=True, stream_options=options, extra_body=extra))
        assert text_of(chunks) == whole.choices[0].message.content
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-2].choices[0].npr == whole.choices[0].npr
        assert chunks[-1].usage == whole.usage
        assert all(chunk.id == chunks[0].id for chunk in chunks)
        seen.add(whole.choices[0].npr["num_blocks"])
    assert (max(seen) > 1) == (mode == "parallel")


def test_branches_are_longer_together_than_the_path_through_them(live):
    shapes = [chat(live, seed).choices[0].npr for seed in SEEDS[:6]]
    assert any(npr["critical_path_tokens"] < npr["completion_tokens"] for npr in shapes)


def test_completions_take_text_ids_and_several_prompts(live):
    completions = live.client.completions
    ids = live.served.tokenizer.encode(PROMPT)
    asked: list[Any] = [PROMPT, ids, [PROMPT, PROMPT], [ids, ids]]
    answers = [completions.create(model="speaker", prompt=x, seed=5, n=2) for x in asked]
    texts = [[choice.text for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1] and texts[2] == texts[3]
    assert texts[2][:2] == texts[0]
    assert len(set(texts[2])) == 4  # every choice draws its own
    assert [choice.index for choice in answers[2].choices] == [0, 1, 2, 3]
    assert answers[2].usage.prompt_tokens == 2 * len(ids)
    assert texts[0][0] == chat(live, 5).choices[0].message.content


def test_choices_of_a_stream_are_told_apart(live):
    asked: dict[str, Any] = {"model": "speaker", "prompt": [PROMPT, PROMPT], "seed": 5, "n": 2}
    completions = live.client.completions
    whole = completions.create(**asked)
    texts: dict[int, str] = defaultdict(str)
    for chunk in completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}


def rebuilt(chunks: list[Any]) -> tuple[str, list[list[str]]]:
    """Return the linear text of a watched stream, and the texts of the branches of each block."""
    stages: list[list[str]] = [[""]]
    for chunk in chunks:
        tag = chunk.npr if chunk.choices[0].delta.role is None else {"event": "opening"}
        match tag:
            case {"event": "token", "block": block, "branch": branch}:
                assert (block > 0) == (branch > 0) == (len(stages) % 2 == 0)
                assert block in (0, len(stages) // 2)
                stages[-1][max(branch - 1, 0)] += chunk.choices[0].delta.content
            case {"event": "fork", "block": block, "num_branches": count}:
                assert block == (len(stages) + 1) // 2
                stages.append([""] * count)
            case {"event": "join", "block": block}:
                assert block == len(stages) // 2
                stages.append([""])
    return "".join(text for stage in stages for text in stage), stages[1::2]


def test_a_watched_stream_rebuilds_the_tree(live):
    num_branches = set()
    for seed in SEEDS:
        whole = chat(live, seed)
        chunks = list(chat(live, seed, stream=True, extra_body={"npr": {"branches": True}}))
        text, blocks = rebuilt(chunks)
        assert text == whole.choices[0].message.content
        assert len(blocks) == whole.choices[0].npr["num_blocks"]
        assert all(x.startswith(f"<step>\n{i}:") for b in blocks for i, x in enumerate(b, start=1))
        assert chunks[-1].npr == {"event": "finish"}
        num_branches |= {len(branches) for branches in blocks}
    assert num_branches == {1, 2, 3}


def test_branches_of_a_watched_stream_run_at_the_same_time(live):
    order = []
    for seed in SEEDS[:6]:
        for chunk in chat(live, seed, stream=True, extra_body={"npr": {"branches": True}}):
            tag = getattr(chunk, "npr", None) or {}
            order.append((seed, tag.get("block"), tag.get("branch")))
    places = [place for place in order if place[2]]
    # Branch 1 is heard again after branch 2 was: they were not sent one after the other.
    pairs = itertools.pairwise(places)
    assert any(a[:2] == b[:2] and a[2] > b[2] for a, b in pairs)


def test_equal_requests_get_equal_answers_whatever_else_is_asked(live):
    async def ask(count: int) -> list[str]:
        async with live.async_client() as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="speaker", messages=MESSAGES, seed=seed % 4
                    )
                    for seed in range(count)
                )
            )
        return [answer.choices[0].message.content or "" for answer in answers]

    few, many = asyncio.run(ask(4)), asyncio.run(ask(32))
    assert many == few * 8
    assert len(set(few)) > 1


def test_64_answers_at_once_streamed_and_not(live):
    async def ask() -> list[str]:
        async with live.async_client() as client:

            async def one(seed: int) -> str:
                asked: dict[str, Any] = {"model": "speaker", "messages": MESSAGES, "seed": seed}
                if seed % 2:
                    answer = await client.chat.completions.create(**asked)
                    return answer.choices[0].message.content or ""
                stream = await client.chat.completions.create(**asked, stream=True)
                return text_of([chunk async for chunk in stream])

            return await asyncio.gather(*(one(seed) for seed in range(64)))

    texts = asyncio.run(ask())
    assert len(texts) == 64 and len(set(texts)) > 32
    assert all(text.startswith("<guideline>") for text in texts)
    for seed in (2, 3, 40, 63):
        assert texts[seed] == chat(live, seed).choices[0].message.content
    live.wait_until_free()


def test_without_a_seed_answers_differ(live):
    client = live.client
    answers = {
        client.completions.create(model="speaker", prompt=PROMPT).choices[0].text for _ in range(6)
    }
    assert len(answers) > 1


def test_an_answer_ends_before_the_first_stop(live):
    for seed in SEEDS[:4]:
        whole = chat(live, seed).choices[0].message.content
        for stops in (["</takeaway>"], "2:", ["\nnever", "</step>\n", "zzzzz"]):
            listed = [stops] if isinstance(stops, str) else stops
            places = [place for stop in listed if (place := whole.find(stop)) >= 0]
            expected = whole[: min(places)] if places else whole
            stopped = chat(live, seed, stop=stops)
            assert stopped.choices[0].message.content == expected
            assert stopped.choices[0].npr["finish"] == ("stop_text" if places else "stop")
            chunks = list(chat(live, seed, stop=stops, stream=True))
            assert text_of(chunks) == expected
            assert chunks[-1].choices[0].npr == stopped.choices[0].npr
    live.wait_until_free()


def test_limits_end_an_answer_and_say_which(live):
    cut = chat(live, 1, max_tokens=7)
    assert cut.choices[0].finish_reason == "length"
    assert cut.choices[0].npr["finish"] == "length"
    assert cut.usage.completion_tokens == 7
    also = chat(live, 1, max_completion_tokens=7)
    assert also.choices[0].message.content == cut.choices[0].message.content
    path = chat(live, 1, extra_body={"npr": {"max_critical_path": 9}})
    assert path.choices[0].npr["finish"] == "critical_path"
    assert path.choices[0].npr["critical_path_tokens"] == 9


def test_log_probs_are_told_per_token(live):
    answer = chat(live, 3, logprobs=True)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    assert "".join(t.token for t in tokens) == answer.choices[0].message.content + "<eos>"
    assert all(token.logprob <= 0 for token in tokens) and any(t.logprob < -0.5 for t in tokens)
    streamed = [
        token
        for chunk in chat(live, 3, logprobs=True, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in tokens], abs=1e-6)
    completion = live.client.completions.create(model="speaker", prompt=PROMPT, seed=3, logprobs=0)
    assert completion.choices[0].logprobs.tokens == [token.token for token in tokens]
    assert completion.choices[0].logprobs.token_logprobs == [token.logprob for token in tokens]
