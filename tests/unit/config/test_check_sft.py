"""Every problem of an SFT run file at once."""

from __future__ import annotations

import pytest

from npr_megatron.config.check_sft import check_sft
from npr_megatron.config.loader import load_as
from npr_megatron.config.sft import SftConfig
from npr_megatron.errors import ConfigError

GOOD = """
[run]
name = "mine"
[model.architecture]
num_hidden_layers = 2
hidden_size = 32
num_attention_heads = 2
num_key_value_heads = 2
head_dim = 16
intermediate_size = 48
vocab_size = 64
[data]
train = ["train.jsonl"]
[sft]
num_epochs = 1
rows_per_step = 16
optimizer = { learning_rate = 1e-3 }
"""


def loaded(tmp_path, *overrides: str) -> SftConfig:
    path = tmp_path / "run.toml"
    path.write_text(GOOD)
    return load_as(SftConfig, path, overrides)


def test_a_good_file_has_no_problem(tmp_path):
    assert check_sft(loaded(tmp_path)) == []


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("run.name=a/b", "run.name 'a/b' names a folder"),
        ("model.path=x", "[model] must name one model"),
        ("sft.num_steps=3", "set just one"),
        ("data.validation_frac=0.1", None),
        ("parallel.dp_size=3", "rows_per_step 16 is not a multiple of parallel.dp_size 3"),
        ("parallel.tp_size=5", "tp_size"),
        ("model.architecture.has_qk_norm=false", "has_qk_norm is false"),
    ],
)
def test_each_rule_speaks_up(tmp_path, override, complaint):
    problems = check_sft(loaded(tmp_path, override))
    assert (complaint is None) == (problems == [])
    assert complaint is None or any(complaint in problem for problem in problems)


def test_all_problems_come_at_once(tmp_path):
    problems = check_sft(
        loaded(
            tmp_path,
            "model.path=x",
            "data.validation=['v.jsonl']",
            "data.validation_frac=0.5",
            "sft.num_steps=5",
            "sft.optimizer.warmup_steps=5",
        )
    )
    assert len(problems) == 4


def test_wrong_fields_are_explained_in_the_words_of_this_file(tmp_path):
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, "data.over_long=cut", "sft.rows_per_stp=4", "data.train=[]")
    assert any('set it to "refuse" or "skip"' in problem for problem in error.value.problems)
    assert any("did you mean rows_per_step?" in problem for problem in error.value.problems)
    assert any(problem.startswith("data.train") for problem in error.value.problems)
