"""FP8 weights of an engine: exact against the plain model of the same numbers, bytes as published.

The product of Hopper GPUs needs one; here its activations are checked on the CPU, and the layouts
it hands over by torch's own rules for them (shape inference, no data).
"""

from __future__ import annotations

import pytest
import torch

from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.engine.compute.attention import DenseAttention
from npr_megatron.engine.compute.model import EngineModel, storage_layout
from npr_megatron.engine.compute.quantised import (
    BlockScaled,
    linear,
    quantise_tokens,
    quantising_reader,
    scaled_product,
)
from npr_megatron.engine.live_weights import LiveWeights
from npr_megatron.errors import DivergenceError, LayoutError
from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.hf import random_init
from npr_megatron.weights.layouts.served import Quantisation, scales_of
from npr_megatron.weights.quantise import QUANTISED, dequantise, quantise
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles

MODEL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=200,  # the last block of a row is cut by the edge of the matrix
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=32,
    intermediate_size=256,
    vocab_size=64,
    max_position_embeddings=64,
)
QUANTISATION = Quantisation.of(MODEL)
WEIGHTS = random_init(MODEL, InitConfig(embedding_std=0.3), seed=2)
CPU = torch.device("cpu")


def served(weights):
    """Each matrix quantised whole: what an FP8 checkpoint of ``weights`` holds."""
    tensors = dict(weights)
    for name in QUANTISATION.shapes:
        tensors[name], tensors[scales_of(name)] = quantise(weights[name], 128, "exact")
    return tensors


def model_with(tensors, weights="as_trained", dtype=torch.float32):
    model = EngineModel(MODEL, num_slots=1, dtype=dtype, device=CPU, weights=weights)
    load_tiles(storage_layout(MODEL, weights=weights).ranks[0], box_reader(tensors), model.weights)
    return model


@torch.inference_mode()
def logits_of(model):
    ids = torch.arange(40) % MODEL.vocab_size
    visible = torch.ones(1, 1, 40, 40).tril().bool()
    attend = DenseAttention(visible, model.num_kv)
    return model.logits(model.hidden(ids, torch.arange(40), attend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_equals_the_plain_model_of_the_dequantised_weights(dtype):
    quantised = served(WEIGHTS)
    plain = dict(WEIGHTS)
    for name in QUANTISATION.shapes:
        plain[name] = dequantise(quantised[name], quantised[scales_of(name)], 128)
    exact = logits_of(model_with(quantised, "fp8", dtype))
    assert torch.equal(exact, logits_of(model_with(plain, dtype=dtype)))
    assert not torch.equal(exact, logits_of(model_with(WEIGHTS, dtype=dtype)))  # it is FP8
    name = scales_of("model.layers.1.mlp.down_proj.weight")
    quantised[name] = quantised[name].flip(-1)  # every scale is that of its own block
    assert not torch.equal(exact, logits_of(model_with(quantised, "fp8", dtype)))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_reading_a_plain_checkpoint_gives_the_bytes_of_the_fp8_checkpoint(tp_size):
    for rank_layout in storage_layout(MODEL, tp_size, "fp8").ranks:
        made, published = (empty_storages(rank_layout, torch.float32) for _ in range(2))
        load_tiles(rank_layout, quantising_reader(box_reader(WEIGHTS), QUANTISATION), made)
        load_tiles(rank_layout, box_reader(served(WEIGHTS)), published)
        for name, tensor in published.items():
            assert torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8)), name
        assert made["layers.0.qkv_proj.weight"].dtype == QUANTISED


def test_ranks_that_would_cut_a_block_are_refused():
    with pytest.raises(LayoutError, match="whole blocks of 128 x 128"):
        storage_layout(MODEL, 4, "fp8")


def test_a_scale_reaches_its_block_only():
    weight, inputs = torch.randn(256, 384), torch.eye(384)
    quantised = BlockScaled(*quantise(weight, 128, "exact"))
    before = linear(inputs, quantised).t()
    quantised.scales[1, 2] *= 2
    ratio = linear(inputs, quantised).t() / before
    block = Box((128, 256), (256, 384))
    assert (ratio[block.slices].nan_to_num(2.0) == 2.0).all()
    assert int((ratio.nan_to_num(1.0) == 2.0).sum()) <= block.num_elements


def test_activations_lose_no_more_than_a_rounding_of_e4m3():
    inputs = torch.randn(5, 384) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 1e-30])[:, None]
    values, scales = quantise_tokens(inputs)
    assert values.dtype == QUANTISED and scales.shape == (5, 3)
    restored = (values.float().unflatten(-1, (3, 128)) * scales[..., None]).flatten(-2)
    step = scales.repeat_interleave(128, -1) * 2.0**-9  # between subnormal numbers
    assert ((restored - inputs).abs() <= inputs.abs() / 16 + step / 2).all()


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 33])
@pytest.mark.parametrize("shape", [(128, 128), (256, 128), (384, 640), (128, 1024)])
def test_what_the_fp8_product_is_given_is_laid_out_as_torch_wants_it(num_tokens, shape):
    height, width = shape
    weight = BlockScaled(
        torch.empty(shape, dtype=QUANTISED, device="meta"),
        torch.empty(height // 128, width // 128, device="meta"),
    )
    inputs = torch.empty(num_tokens, width, dtype=torch.bfloat16, device="meta")
    product = scaled_product(inputs, weight)
    assert (product.shape, product.dtype) == ((num_tokens, height), torch.bfloat16)
    with pytest.raises(RuntimeError, match="scale"):
        scaled_product(inputs, weight._replace(scales=torch.empty(9, 9, device="meta")))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("num_tokens", [1, 3, 64])
def test_the_fp8_product_is_that_of_the_dequantised_operands(num_tokens):
    weight = BlockScaled(*quantise(torch.randn(256, 640, device="cuda"), 128, "exact"))
    inputs = torch.randn(num_tokens, 640, device="cuda").bfloat16()
    values, scales = quantise_tokens(inputs)
    left = (values.float().unflatten(-1, (-1, 128)) * scales[..., None]).flatten(-2)
    expected = left @ dequantise(*weight, 128).t()
    error = (linear(inputs, weight).float() - expected).abs().max() / expected.abs().max()
    assert error < 0.01


def test_a_nan_among_fp8_weights_is_refused_and_so_are_weights_without_scales():
    model = model_with(served(WEIGHTS), "fp8")
    live = LiveWeights(model.weights)
    staged = live.staging()
    for name, tensor in model.weights.items():
        staged[name].copy_(tensor)
    live.commit(1)
    before = logits_of(model)
    name = "layers.1.o_proj.weight"
    for bits in (0x7F, 0xFF):  # the two NaNs of e4m3
        spoiled = live.staging()[name].view(torch.uint8)
        kept = spoiled[3, 5].clone()
        spoiled[3, 5] = bits
        with pytest.raises(DivergenceError, match=r"layers\.1\.o_proj"):
            live.commit(2)
        spoiled[3, 5] = kept
    live.commit(2)
    plain = {name: tensor.float() for name, tensor in model.weights.items()}
    with pytest.raises(LayoutError, match="float8_e4m3fn with its scales"):
        live.load(plain, 3)
    assert live.version == 2 and torch.equal(logits_of(model), before)
