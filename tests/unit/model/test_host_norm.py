"""The norm of the CPU is torch's, in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npr_megatron.model.host_norm import host_rms_norm

EPS = 1e-6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}


def measured(norm, hidden: Tensor, weight: Tensor, grad_out: Tensor) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    output = norm(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_out)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 16), (7, 2, 4, 8)], ids=str)
def test_values_and_gradients_are_those_of_torch(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    double = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape)]
    hidden, grad_out = (tensor.to(dtype).transpose(0, 1) for tensor in double)
    weight = (torch.arange(shape[-1], dtype=torch.float64) * 0.1 + 0.5).to(dtype)
    found = measured(lambda x, w: host_rms_norm(x, w, EPS), hidden, weight, grad_out)
    exact = [tensor.double() for tensor in (hidden, weight, grad_out)]
    expected = measured(lambda x, w: F.rms_norm(x, w.shape, w, EPS), *exact)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_a_vector_of_zeros_has_a_gradient():
    hidden = torch.zeros(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(host_rms_norm(hidden, torch.ones(4), EPS).sum(), hidden)
    assert torch.isfinite(gradient).all()
