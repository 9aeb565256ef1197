"""Rows to ids: the fields that are wrong, the words of the prompt, the borders of the tree."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from npr_megatron.data.conversations import Exchange, Message, exchanges_of
from npr_megatron.data.problems import Problem
from npr_megatron.data.prompts import INSTRUCTION, PromptBuilder
from npr_megatron.data.rows import Fault, Row
from npr_megatron.data.tokenising import ExchangeReader, Tokenised, response_ids, turn_end_problem
from npr_megatron.data.tokenizer import Tokenizer, load_hf
from npr_megatron.topology.layout import layout_of
from tests.unit.data.test_samples import BRANCH_1, BRANCH_2, TAIL, TRUNK

TREE = (TRUNK + BRANCH_1 + BRANCH_2 + TAIL).removesuffix("<eos>")


def reader(tokenizer, max_tokens=5000, max_positions=5000) -> ExchangeReader:
    return ExchangeReader(tokenizer, max_tokens=max_tokens, max_positions=max_positions)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt": "p", "response": None}, "response is missing; it must be text"),
        ({"prompt": math.nan, "response": "r"}, "prompt is NaN; it must be text"),
        ({"prompt": " ", "response": "r"}, "prompt is empty"),
        ({"text": "p"}, 'its fields are text; give "prompt" and "response", or "messages"'),
        ({"prompt": "p", "messages": []}, 'both "prompt" and "messages" are there'),
        ({"messages": "hi"}, 'messages is "hi"; it must be a list of messages'),
        ({"messages": [{"role": "user", "content": "q"}]}, "holds no message of the role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages[0] is a response to"),
        ({"messages": [7]}, "messages[0] is 7"),
        (
            {"messages": [{"role": "user", "content": ["q"]}]},
            'messages[0].content is ["q"]; it must be text',
        ),
        (
            {"messages": [{"role": "user", "content": "q", "tool_calls": [1]}]},
            "messages[0].tool_calls is [1], which training would lose",
        ),
    ],
)
def test_a_bad_field_is_named(fields, complaint):
    (fault,) = exchanges_of(Row("train.jsonl:3", fields))
    assert isinstance(fault, Fault)
    assert str(fault).startswith("train.jsonl:3: ")
    assert complaint in str(fault)


def test_all_bad_fields_of_a_row_are_named():
    found = exchanges_of(Row("f:1", {"messages": [{"role": "user"}, {"content": 3}]}))
    assert [fault.message for fault in found] == [
        "messages[0].content is missing; it must be text",
        "messages[1].role is missing; it must be text",
        "messages[1].content is 3; it must be text",
    ]


def test_each_answer_of_a_conversation_is_learnt_behind_all_before_it():
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    messages = [{"role": role, "content": text, "name": None} for role, text in turns]
    first, second = exchanges_of(Row("f:1", {"messages": messages}))
    turns = tuple(Message(*turn) for turn in turns)
    assert first == Exchange("f:1 messages[1]", "a1", context=turns[:1])
    assert second == Exchange("f:1 messages[3]", "a2", context=turns[:3])


def test_a_tree_is_laid_out_by_the_grammar_behind_the_prompt_engines_are_asked_with(chat):
    sample = reader(chat).read(Exchange("f:1", TREE, prompt="Add up."))
    assert isinstance(sample, Tokenised)
    prompt = PromptBuilder(chat).prompt_ids(Problem(id="", question="Add up.", answer=""))
    ids = sample.token_ids.tolist()
    assert sample.prompt_length == len(prompt)
    assert ids[: len(prompt)] == list(prompt)
    assert chat.decode(ids[len(prompt) :]) == TREE + "<|im_end|>"
    expected = layout_of(ids, len(prompt), chat.vocabulary)
    np.testing.assert_array_equal(sample.layout.branch, expected.branch)
    assert set(sample.layout.branch.tolist()) == {0, 1, 2}


def test_plain_text_is_asked_for_without_the_instruction_to_branch(chat):
    sample = reader(chat).read(Exchange("f:1", "Four.", prompt="2 + 2?"))
    assert isinstance(sample, Tokenised)
    text = chat.decode(sample.token_ids[: sample.prompt_length])
    assert "2 + 2?" in text
    assert INSTRUCTION[:20] not in text
    assert not sample.layout.block.any()


def test_a_conversation_is_taken_word_for_word(chat):
    context = (Message("system", "Be short."), Message("user", "2 + 2?"))
    sample = reader(chat).read(Exchange("f:1", "Four.", context=context))
    assert isinstance(sample, Tokenised)
    assert chat.decode(sample.token_ids) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nFour.<|im_end|>"
    )


def test_a_conversation_needs_a_chat_template(sums):
    fault = reader(sums).read(Exchange("f:1", "4", context=(Message("user", "2"),)))
    assert isinstance(fault, Fault)
    assert "needs a chat template" in fault.message


def test_ids_are_cut_where_an_engine_cuts_them(chat):
    vocabulary = chat.vocabulary
    ids = response_ids("<step>\n1::=a</step>\n", chat)
    assert ids[:4] == list(vocabulary.step_header(1))
    assert ids[4:-3] == chat.encode(":=a")
    assert ids[-3:] == [vocabulary.step_close, vocabulary.newline, vocabulary.eos]


def test_the_end_token_stands_once_at_the_end(sums):
    eos = sums.vocabulary.eos
    assert response_ids("1+2<eos>", sums) == response_ids("1+2", sums) == [*sums.encode("1+2"), eos]
    fault = reader(sums).read(Exchange("f:1", "1<eos>2", prompt="p"))
    assert isinstance(fault, Fault)
    assert "the end token stands before its end" in fault.message


def test_a_broken_tree_is_named_by_rule_and_place(sums):
    broken = TREE.replace("2:3+4", "3:3+4")
    fault = reader(sums).read(Exchange("f:1", broken, prompt="a:1+2;b:3+4?"))
    assert isinstance(fault, Fault)
    assert fault.kind == "malformed"
    assert "does not start with its number" in fault.message
    assert "wrong_index, after" in fault.message


def test_unknown_characters_are_a_fault_of_the_row(sums):
    fault = reader(sums).read(Exchange("f:1", "ABC", prompt="p"))
    assert isinstance(fault, Fault)
    assert fault.kind == "corrupt"
    assert "no token for one of its characters" in fault.message


def test_what_fits_neither_row_nor_positions_is_over_long(sums):
    exchange = Exchange("f:1", "1+2=3", prompt="a:1+2?")
    fits = reader(sums, max_tokens=13, max_positions=13).read(exchange)
    assert isinstance(fits, Tokenised)
    assert len(fits.token_ids) == 13
    for limits in ({"max_tokens": 12}, {"max_positions": 12}):
        fault = reader(sums, **limits).read(exchange)
        assert isinstance(fault, Fault)
        assert fault.kind == "over_long"
    assert "7 tokens of prompt and 6 of response do not fit a row of 12" in str(
        reader(sums, max_tokens=12).read(exchange)
    )


def test_a_template_that_ends_turns_with_another_token_is_told(chat, chat_folder):
    assert turn_end_problem(chat) is None
    vocabulary = replace(chat.vocabulary, eos=chat.vocabulary.newline)
    problem = turn_end_problem(Tokenizer(load_hf(chat_folder), vocabulary))
    assert problem is not None
    assert "goes on behind an answer with '<|im_end|>" in problem


def test_turns_the_template_refuses_are_a_fault_of_the_row(chat_folder, chat):
    hf = load_hf(chat_folder)
    hf.chat_template = "{{ raise_exception('roles must alternate') }}"
    strict = reader(Tokenizer(hf, chat.vocabulary))
    fault = strict.read(Exchange("f:1", "a", context=(Message("user", "q"),)))
    assert isinstance(fault, Fault)
    assert "roles must alternate" in fault.message
