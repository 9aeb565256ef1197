"""Labels along the tree, on a hand-written response of two branches."""

from __future__ import annotations

import numpy as np
import pytest

from npr_megatron.data.packing import pack
from npr_megatron.data.samples import rl_sample, sft_sample
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.topology.layout import layout_of, plain_layout

PROMPT = "a:1+2;b:3+4?\n"
TRUNK = "<guideline>\n<plan>1:a</plan>\n<plan>2:b</plan>\n</guideline>\n"
BRANCH_1, BRANCH_2 = "<step>\n1:1+2=3</step>\n", "<step>\n2:3+4=7</step>\n"
TAIL = "<takeaway>\n3,7</takeaway>\n\\boxed{3,7}<eos>"


@pytest.fixture
def trajectory(sums):
    prompt_length = len(sums.encode(PROMPT))
    ids = sums.encode(PROMPT + TRUNK + BRANCH_1 + BRANCH_2 + TAIL)
    layout = layout_of(ids, prompt_length, sums.vocabulary)
    num = len(ids)
    return Trajectory(
        prompt_id="p",
        rollout=0,
        mode=DecodeMode.PARALLEL,
        prompt_length=prompt_length,
        token_ids=ids,
        position_ids=layout.position_ids,
        block=layout.block,
        branch=layout.branch,
        forced=layout.forced,
        logprobs=np.where(layout.forced, 0.0, -np.arange(num)),
        weight_versions=np.zeros(num),
        finish=FinishReason.STOP,
    )


def learnt_text(sums, sample):
    return sums.decode(sample.token_ids[sample.loss_mask])


def test_sft_learns_the_response_but_what_nothing_predicts(sums, trajectory):
    layout = layout_of(trajectory.token_ids, trajectory.prompt_length, sums.vocabulary)
    sample = sft_sample(trajectory.token_ids, trajectory.prompt_length, layout)
    # Nothing predicts the header of branch 2 or the first token after the join.
    unpredicted = BRANCH_2.removeprefix("<step>") + TAIL.removeprefix("<takeaway>")
    assert learnt_text(sums, sample) == TRUNK + BRANCH_1 + unpredicted


def test_plain_sft_learns_the_whole_response(sums, trajectory):
    layout = plain_layout(len(trajectory.token_ids))
    sample = sft_sample(trajectory.token_ids, trajectory.prompt_length, layout)
    assert learnt_text(sums, sample) == TRUNK + BRANCH_1 + BRANCH_2 + TAIL
    assert not sample.loss_mask[: trajectory.prompt_length].any()


def test_rl_learns_sampled_tokens_only(sums, trajectory):
    sample = rl_sample(trajectory, 0.5)
    sampled = TRUNK.removesuffix("\n") + "1+2=3</step>" + "3+4=7</step>"
    assert learnt_text(sums, sample) == sampled + TAIL.removeprefix("<takeaway>\n")
    assert sample.advantage == 0.5
    np.testing.assert_array_equal(sample.rollout_logprobs, trajectory.logprobs)


def test_rl_with_forced_tokens_learns_what_sft_learns(sums, trajectory):
    layout = layout_of(trajectory.token_ids, trajectory.prompt_length, sums.vocabulary)
    sft = sft_sample(trajectory.token_ids, trajectory.prompt_length, layout)
    rl = rl_sample(trajectory, 1.0, forced_tokens_in_loss=True)
    np.testing.assert_array_equal(rl.loss_mask, sft.loss_mask)
    np.testing.assert_array_equal(rl.predecessor, sft.predecessor)


def test_the_label_of_each_logit_is_the_next_token_of_its_own_branch(sums, trajectory):
    sample = rl_sample(trajectory, 1.0, forced_tokens_in_loss=True)
    (batch,) = pack([sample], row_tokens=128, rows_per_microbatch=1, num_replicas=1)
    pieces = sums.pieces(batch.token_ids[0])
    labels = [sums.decode([i]) if i >= 0 else None for i in batch.labels[0].tolist()]
    fork = len(sums.encode(PROMPT + TRUNK)) - 1
    assert (pieces[fork], labels[fork]) == ("\n", "<step>")
    first_end = fork + len(sums.encode(BRANCH_1))
    second_end = first_end + len(sums.encode(BRANCH_2))
    assert pieces[first_end] == pieces[second_end] == "\n"
    assert labels[first_end] is None, "branch 1 is taught to open branch 2"
    assert labels[second_end] is None, "branch 2 is taught to open the takeaway"
    assert labels[first_end + 1 : first_end + 4] == ["\n", "2", ":"]
    end = len(trajectory.token_ids) - 1
    assert (pieces[end], labels[end]) == ("<eos>", None)
