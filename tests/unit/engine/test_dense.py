"""Dense products, below and above the size from which another library computes them."""

from __future__ import annotations

import pytest
import torch

from npr_megatron.engine.compute.dense import dense_product


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 33])
def test_products_of_any_size_are_those_of_float64(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    weight = torch.randn(768, 128, generator=generator)
    inputs = torch.randn(num_tokens, 128, generator=generator)
    expected = (inputs.double() @ weight.double().t()).float()
    torch.testing.assert_close(dense_product(inputs, weight), expected, rtol=0, atol=3e-5)


def test_a_product_sees_weights_written_in_place() -> None:
    weight = torch.ones(768, 128)
    inputs = torch.ones(32, 128)
    assert float(dense_product(inputs, weight)[3, 5]) == 128.0
    weight[5] = 2.0
    assert float(dense_product(inputs, weight)[3, 5]) == 256.0
