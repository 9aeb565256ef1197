"""Core attention is one function: under a dense mask, by segments, and block-sparse for CUDA."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from npr_megatron.records.sample import PackedBatch
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL
from tests.distributed.samples import packed


def by_predicate(mask, rows):
    """Return what the predicate of a block mask says of every query and key."""
    length, num_keys = mask.shape[-2:]
    index = torch.meshgrid(
        torch.arange(rows), torch.arange(length), torch.arange(num_keys), indexing="ij"
    )
    return mask.mask_mod(index[0], 0, index[1], index[2])


def masks_of_slices(rank, world_size, init_method, batch: PackedBatch):
    """Return the two forms of the mask of each of two context-parallel ranks."""
    import npr_megatron.model.attention as attention
    from npr_megatron.runtime.device import install_cuda_stand_in
    from npr_megatron.topology.context_slices import gathered_columns, own_columns
    from npr_megatron.topology.visibility import dense_mask

    install_cuda_stand_in()
    streams = [torch.from_numpy(s) for s in (batch.segment, batch.block, batch.branch)]
    rows, length = batch.shape
    keys = torch.from_numpy(gathered_columns(length, 2))
    pairs = []
    for slice_rank in range(2):
        queries = torch.from_numpy(own_columns(length, slice_rank, 2))
        sparse = attention.block_mask(*streams, queries, keys)
        dense = dense_mask(*streams)[:, queries][..., keys]
        pairs.append((by_predicate(sparse, rows).numpy(), dense.numpy()))
    return pairs


def attend_all_ways(rank, world_size, init_method, batch: PackedBatch, device_name: str):
    """Return visibility, and outputs and gradients under (dense, segments, flex).

    Flex has gradients on CUDA only; segments compute in bf16 there, and are left out.
    """
    import npr_megatron.model.attention as attention
    from npr_megatron.runtime.device import install_cuda_stand_in
    from npr_megatron.topology.attention_plan import attention_plan
    from npr_megatron.topology.visibility import dense_mask

    install_cuda_stand_in()
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    device = torch.device(device_name)
    streams = [
        torch.from_numpy(stream).to(device) for stream in (batch.segment, batch.block, batch.branch)
    ]
    rows, length = batch.shape
    everything = torch.arange(length, device=device)
    dense = dense_mask(*streams)
    sparse = attention.block_mask(*streams, everything, everything)
    of_predicate = by_predicate(sparse, rows)

    plan = attention_plan(batch.segment, batch.block, batch.branch, ((0, length),))
    on_cuda = device.type == "cuda"
    cos, sin = attention.rotary_tables(batch, MODEL, torch.float32, device)
    core = attention.BranchCore(SimpleNamespace(kv_channels=MODEL.head_dim))
    generator = torch.Generator().manual_seed(0)
    is_token = torch.from_numpy(batch.segment >= 0).t()[..., None].to(device)
    outputs, gradients = [], []
    for visibility in (attention.score_bias(dense, torch.float32), plan, sparse):
        if on_cuda and visibility is plan:
            continue
        generator.manual_seed(0)
        heads = [
            torch.randn(length, rows, count, MODEL.head_dim, generator=generator).to(device)
            for count in (4, 2, 2)
        ]
        heads = [tensor.requires_grad_(on_cuda or visibility is not sparse) for tensor in heads]
        context = attention.BranchContext(rotary_cos=cos, rotary_sin=sin, visibility=visibility)
        output = core(*heads, None, packed_seq_params=context) * is_token
        outputs.append(output.detach().cpu().numpy())
        if output.requires_grad:
            grads = torch.autograd.grad(output.square().sum(), heads)
            gradients.append([gradient.cpu().numpy() for gradient in grads])
    return dense.cpu().numpy(), of_predicate.cpu().numpy(), outputs, gradients


def test_block_mask_segments_and_their_attention_equal_the_dense_ones(tmp_path):
    batch = packed(5, num_replicas=1, rows_per_microbatch=2)[0]
    ((dense, sparse, outputs, gradients),) = run_ranks(attend_all_ways, 1, tmp_path, batch, "cpu")
    np.testing.assert_array_equal(sparse, dense)
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=2e-6)
    for by_segments, by_mask in zip(gradients[1], gradients[0], strict=True):
        np.testing.assert_allclose(by_segments, by_mask, atol=1e-5)


def test_the_block_mask_of_a_slice_equals_the_dense_one(tmp_path):
    batch = packed(5, num_replicas=1, rows_per_microbatch=2)[0]
    (pairs,) = run_ranks(masks_of_slices, 1, tmp_path, batch)
    for sparse, dense in pairs:
        np.testing.assert_array_equal(sparse, dense)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_flex_attention_equals_sdpa_forward_and_backward(tmp_path):
    batch = packed(5, num_replicas=1, rows_per_microbatch=2)[0]
    ((_, _, outputs, gradients),) = run_ranks(
        attend_all_ways, 1, tmp_path, batch, "cuda", timeout_s=600
    )
    np.testing.assert_allclose(outputs[1], outputs[0], atol=2e-3)
    for flex, dense in zip(gradients[1], gradients[0], strict=True):
        np.testing.assert_allclose(flex, dense, atol=1e-2)
