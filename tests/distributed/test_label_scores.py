"""Log-probs, entropies and gradients of sliced logits against float64 over whole ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.harness import run_ranks

TOLERANCE = 1e-5
LENGTH, ROWS, CHANNELS, VOCABULARY = 12, 3, 8, 60


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is scored, and how."""

    name: str
    dtype: torch.dtype = torch.float32
    width: int = 7
    """Of a slice of the vocabulary."""
    unlabelled_frac: float = 0.4
    scale: float = 1.0
    """Of hidden states."""
    is_sequence_parallel: bool = False


CASES = (
    Case(name="many slices"),
    Case(name="one slice", width=1000, unlabelled_frac=0.0),
    Case(name="one label", unlabelled_frac=0.97),
    Case(name="no label", unlabelled_frac=1.0),
    Case(name="sure of itself", scale=60.0),
    Case(name="sequence parallel", is_sequence_parallel=True),
    Case(name="bf16", dtype=torch.bfloat16),
)


def tensors_of(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states [S, B, H], weight [V, H], labels [S, B] and the gradient [S, B]."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(LENGTH, ROWS, CHANNELS, generator=generator) * case.scale
    weight = torch.randn(VOCABULARY, CHANNELS, generator=generator)
    labels = torch.randint(0, VOCABULARY, (LENGTH, ROWS), generator=generator)
    labels[torch.rand(LENGTH, ROWS, generator=generator) < case.unlabelled_frac] = -1
    gradient = torch.randn(LENGTH, ROWS, generator=generator)
    return hidden.to(case.dtype), weight.to(case.dtype), labels, gradient


def score(rank: int, world_size: int, init_method: str) -> list[list[np.ndarray]]:
    """Return scores and gradients of every case, of this rank's share of weight and tokens."""
    from megatron.core import parallel_state

    from npr_megatron.config.training import ParallelConfig
    from npr_megatron.model import logprobs as module
    from npr_megatron.runtime import process_group
    from npr_megatron.runtime.device import current_device, device_scope

    found = []
    with device_scope():
        info = process_group.RankInfo(rank=rank, world_size=world_size, init_method=init_method)
        process_group.start(info, ParallelConfig(tp_size=world_size))
        group: Any = parallel_state.get_tensor_model_parallel_group()
        for case in CASES:
            module.slice_width = lambda *_, width=case.width: width
            hidden, weight, labels, gradient = tensors_of(case)
            if case.is_sequence_parallel:
                hidden = hidden.chunk(world_size)[rank]
            weight = weight.chunk(world_size)[rank]
            hidden, weight = (
                tensor.to(current_device(), copy=True).requires_grad_()
                for tensor in (hidden, weight)
            )
            logprobs, entropies = module.label_scores(
                hidden,
                weight,
                labels,
                group=group,
                is_sequence_parallel=case.is_sequence_parallel,
            )
            assert not entropies.requires_grad
            logprobs.backward(gradient.to(current_device()))
            parts = (logprobs.detach(), entropies, hidden.grad, weight.grad)
            found.append([part.float().cpu().numpy() for part in parts if part is not None])
        process_group.stop()
    return found


def oracle(case: Case) -> list[np.ndarray]:
    """Return the same of a whole softmax in float64, of logits as they are computed."""
    hidden, weight, labels, gradient = tensors_of(case)
    rounded = (hidden @ weight.t()).double()
    hidden, weight = (t.double().requires_grad_() for t in (hidden, weight))
    logits = hidden @ weight.t()
    logits = logits + (rounded - logits).detach()
    whole = logits.log_softmax(-1)
    has_label = labels >= 0
    logprobs = whole.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * has_label
    entropies = -(whole.exp() * whole).sum(-1) * has_label
    logprobs.backward(gradient.double())
    assert hidden.grad is not None and weight.grad is not None
    parts = (logprobs.detach(), entropies.detach(), hidden.grad, weight.grad)
    return [part.numpy() for part in parts]


def check_scores(ranks: list[list[list[np.ndarray]]]) -> None:
    """Compare what the ranks found with the oracle."""
    for number, case in enumerate(CASES):
        shares = [rank[number] for rank in ranks]
        (logprobs, entropies), gradients = shares[0][:2], [share[2:] for share in shares]
        for share in shares[1:]:
            assert all(map(np.array_equal, share[:2], (logprobs, entropies))), "ranks disagree"
        hidden = gradients[0][0]
        if case.is_sequence_parallel:
            hidden = np.concatenate([hidden for hidden, _ in gradients])
        found = (logprobs, entropies, hidden, np.concatenate([weight for _, weight in gradients]))
        of_gradients = 2e-2 if case.dtype == torch.bfloat16 else TOLERANCE
        for bound, name, got, want in zip(
            (TOLERANCE, TOLERANCE, of_gradients, of_gradients),
            ("log-probs", "entropies", "gradient of hidden states", "gradient of the weight"),
            found,
            oracle(case),
            strict=True,
        ):
            largest = max(np.abs(want).max(), 1e-30)
            difference = np.abs(got - want).max() / largest
            assert difference <= bound, f"{case.name}: {name} differ by {difference:.1e}"
        assert (logprobs[tensors_of(case)[2].numpy() < 0] == 0).all()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_sliced_scores_are_those_of_whole_logits(tp_size, tmp_path):
    check_scores(run_ranks(score, tp_size, tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sliced_scores_on_cuda_are_those_of_whole_logits(tmp_path):
    check_scores(run_ranks(score, 1, tmp_path))


def score_huge(rank: int, world_size: int, init_method: str) -> list[list[float]]:
    """Return the log-probs of the likeliest and the unlikeliest of logits around 1e7."""
    import torch.distributed as dist

    from npr_megatron.model.logprobs import label_scores
    from npr_megatron.runtime.device import device_scope

    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    group: Any = dist.group.WORLD
    with device_scope(), torch.no_grad():
        logits = torch.tensor([1e7, 1e7 + 1, 1e7 + 2, -1e7])  # exact in fp32
        labels = torch.tensor([[2], [0], [3]])
        scores = label_scores(torch.ones(3, 1, 1), logits[:, None], labels, group=group)
    dist.destroy_process_group()
    return [score.flatten().tolist() for score in scores]


def test_huge_logits_lose_no_digit(tmp_path):
    ((found, entropies),) = run_ranks(score_huge, 1, tmp_path)
    exact = torch.tensor([0.0, 1.0, 2.0, -2e7], dtype=torch.float64).log_softmax(0)
    np.testing.assert_allclose(found, exact[[2, 0, 3]], rtol=1e-6)
    np.testing.assert_allclose(entropies, -(exact.exp() * exact).sum(), rtol=1e-6)


class LargestMade(TorchDispatchMode):
    """Remembers the most elements that any operation has returned in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def measure(rank: int, world_size: int, init_method: str) -> dict[str, int]:
    """Return the largest tensors that are made, and the elements that are saved."""
    import torch.distributed as dist

    from npr_megatron.model import logprobs as module
    from npr_megatron.runtime.device import device_scope

    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    group: Any = dist.group.WORLD
    module.slice_width = lambda *_: 128
    num_tokens, channels, vocabulary = 64, 8, 2048
    hidden = torch.randn(num_tokens, 1, channels, requires_grad=True)
    weight = torch.randn(vocabulary, channels, requires_grad=True)
    labels = torch.arange(num_tokens)[:, None]
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    found = {}
    with device_scope(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with LargestMade() as made:
            logprobs, _ = module.label_scores(hidden, weight, labels, group=group)
            logprobs.sum().backward()
        found["made"] = made.elements
        found["saved"] = sum(tensor.numel() for tensor in saved if tensor is not weight)
        saved.clear()
        with torch.no_grad():
            logprobs, _ = module.label_scores(hidden, weight, labels, group=group)
        found["saved for scores alone"] = len(saved) + logprobs.requires_grad
    dist.destroy_process_group()
    return found


def test_no_tensor_is_as_large_as_the_logits_and_scores_alone_keep_nothing(tmp_path):
    (found,) = run_ranks(measure, 1, tmp_path)
    assert found["made"] == 2048 * 8, "the gradient of the weight is the largest"
    assert found["saved"] <= 64 * (8 + 8), "hidden states and a few numbers for each token"
    assert found["saved for scores alone"] == 0
