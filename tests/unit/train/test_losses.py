"""The three losses against closed forms."""

from __future__ import annotations

import pytest
import torch

from npr_megatron.config.training import LossConfig
from npr_megatron.train.losses import dapo, papo, sft, token_losses

BOUNDS = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}


def logits_and_labels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 9, (6,), generator=generator)
    advantages = torch.randn(6, generator=generator, dtype=torch.float64)
    return logits, labels, advantages


def label_logprobs(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def test_papo_gradient_is_advantage_times_score_over_num_tokens():
    logits, labels, advantages = logits_and_labels()
    loss = papo(label_logprobs(logits, labels), advantages).sum() / len(labels)
    (gradient,) = torch.autograd.grad(loss, logits)

    probabilities = logits.detach().softmax(-1)
    score = torch.nn.functional.one_hot(labels, 9) - probabilities
    expected = -advantages[:, None] * score / len(labels)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(loss.detach(), -advantages.mean())


def test_sft_gradient_is_softmax_minus_one_hot():
    logits, labels, _ = logits_and_labels()
    (gradient,) = torch.autograd.grad(sft(label_logprobs(logits, labels)).sum(), logits)
    expected = logits.detach().softmax(-1) - torch.nn.functional.one_hot(labels, 9)
    torch.testing.assert_close(gradient, expected)


def test_dapo_on_policy_is_papo():
    logits, labels, advantages = logits_and_labels()
    policy = label_logprobs(logits, labels)
    on_policy = dapo(policy, policy.detach(), advantages, **BOUNDS)
    torch.testing.assert_close(on_policy, papo(policy, advantages))
    (from_dapo,) = torch.autograd.grad(on_policy.sum(), logits, retain_graph=True)
    (from_papo,) = torch.autograd.grad(papo(policy, advantages).sum(), logits)
    torch.testing.assert_close(from_dapo, from_papo)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected_loss", "gets_gradient"),
    [
        (1.1, 2.0, -2.2, True),  # inside the bounds
        (1.5, 2.0, -2.56, False),  # gained enough: held at 1.28
        (0.5, 2.0, -1.0, True),  # lost probability, wants it back
        (0.5, -2.0, 1.6, False),  # lost enough: held at 0.8
        (1.5, -2.0, 3.0, True),  # gained where it should lose
        (12.0, -2.0, 20.0, False),  # bounded by the dual clip at 10 |A|
    ],
)
def test_dapo_clips_where_the_paper_says(ratio, advantage, expected_loss, gets_gradient):
    rollout = torch.tensor([-3.0], dtype=torch.float64)
    policy = (rollout + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_()
    loss = dapo(policy, rollout, torch.tensor([advantage], dtype=torch.float64), **BOUNDS)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert loss.item() == pytest.approx(expected_loss)
    assert gradient.item() == pytest.approx(-advantage * ratio if gets_gradient else 0.0)


@pytest.mark.parametrize("kind", ["sft", "dapo", "papo"])
def test_tokens_without_loss_add_nothing(kind):
    nothing = torch.zeros(3)
    losses = token_losses(nothing, nothing, nothing, LossConfig(kind=kind))
    assert losses.abs().sum() == 0


def test_the_configured_bounds_reach_dapo():
    policy, rollout, advantage = torch.tensor([0.5]), torch.zeros(1), torch.ones(1)
    loss = token_losses(policy, rollout, advantage, LossConfig(kind="dapo", clip_high=0.1))
    assert loss.item() == pytest.approx(-1.1)
