"""Peak memory of a piece of work, and what the log-probs of labels take of it."""

from __future__ import annotations

import ctypes
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from bench_figures import Figure, bests
from torch import Tensor

from npr_megatron.model.logprobs import label_scores

_MEBIBYTE = 2**20


def peak_bytes(part: Callable[[], object], device: torch.device) -> int:
    """Return how far the memory of this process, or of its GPU, rises while ``part`` runs."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        part()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what was freed before is used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present
    before = _kibibytes("VmRSS")
    part()
    return (_kibibytes("VmHWM") - before) * 1024


def _kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def logprob_figures(
    num_tokens: int, vocab_size: int, hidden_size: int, repeats: int, device: torch.device
) -> list[Figure]:
    """Log-probs of labels from hidden states, forward and backward, against
    ``(hidden @ weight.T).float().log_softmax(-1)``: peak memory beside inputs and their gradients.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 1, hidden_size, generator=generator).to(device)
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) * 0.05).to(device)
    labels = torch.randint(0, vocab_size, (num_tokens, 1), generator=generator)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight)]

    def backward(logprobs: Callable[[], Tensor]) -> None:
        torch.autograd.grad(logprobs().sum(), inputs)

    def plain() -> Tensor:
        every = (hidden @ weight.t()).float().log_softmax(-1)
        return every.gather(-1, labels.to(device)[..., None])[..., 0]

    with _world_of_one() as group:
        runs = [
            partial(backward, logprobs)
            for logprobs in (lambda: label_scores(hidden, weight, labels, group=group)[0], plain)
        ]
        ours_s, plain_s = bests(runs, repeats)
        gradients = (hidden.numel() + weight.numel()) * 4
        ours, theirs = (max(peak_bytes(run, device) - gradients, 1) for run in runs)
    sizes = f"{num_tokens} tokens x {vocab_size} logits"
    detail = f"{sizes}; {ours / _MEBIBYTE:.0f} of {theirs / _MEBIBYTE:.0f} MiB"
    return [
        Figure("log-prob memory / log_softmax", ours / theirs, "x", 0.5, True, detail),
        Figure("log-prob time / log_softmax", ours_s / plain_s, "x", None, True, sizes),
    ]


@contextmanager
def _world_of_one() -> Iterator[dist.ProcessGroup]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            group = dist.group.WORLD
            assert group is not None
            yield group
        finally:
            dist.destroy_process_group()
