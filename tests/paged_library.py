"""FlashInfer's paged wrappers as their documentation describes them, in plain torch, for machines
without a GPU: the same constructors, plans and runs, and the same demands on what they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Wrapper:
    """What all wrappers check and do."""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert layout == "NHD"
        assert not workspace.any()
        self.num_plans = 0

    def _keep(
        self,
        query_indptr: Tensor,
        key_indptr: Tensor,
        slots: Tensor,
        last_page_len: Tensor,
        heads: tuple[int, int, int],
        page_size: int,
    ) -> None:
        for array in (query_indptr, key_indptr, slots, last_page_len):
            assert array.dtype == torch.int32
        assert page_size == 1
        assert (last_page_len == 1).all()
        assert len(slots) == key_indptr[-1]
        assert len(query_indptr) == len(key_indptr) == len(last_page_len) + 1
        self._query_indptr, self._key_indptr, self._slots = query_indptr, key_indptr, slots
        self._heads = heads
        self._is_causal, self._mask = False, None
        self.num_plans += 1

    def run(
        self, queries: Tensor, pages: Tensor, return_lse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return [Q, N, D], and the base-2 log-sum-exp [Q, N] if asked for."""
        num_q, num_kv, head = self._heads
        assert queries.shape == (self._query_indptr[-1], num_q, head)
        assert pages.shape[1:] == (2, 1, num_kv, head)
        parts: list[tuple[Tensor, Tensor]] = []
        mask_start = 0
        for row in range(len(self._query_indptr) - 1):
            own = queries[self._query_indptr[row] : self._query_indptr[row + 1]]
            slots = self._slots[self._key_indptr[row] : self._key_indptr[row + 1]].long()
            size = len(own) * len(slots)
            mask = torch.ones(len(own), len(slots), dtype=torch.bool)
            if self._mask is not None:
                mask = self._mask[mask_start : mask_start + size].view(mask.shape)
                mask_start += size
            elif self._is_causal:
                mask = mask.tril(len(slots) - len(own))
            parts.append(_attend(own, pages[slots, :, 0], mask))
        assert self._mask is None or mask_start == len(self._mask)
        out, lse = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return (out, lse * torch.log2(torch.tensor(torch.e))) if return_lse else out


def _attend(queries: Tensor, keys_values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return results and natural log-sum-exps of [Q, N, D] over [L, 2, K, D]."""
    repeated = keys_values.repeat_interleave(queries.shape[1] // keys_values.shape[2], dim=2)
    keys, values = repeated.unbind(1)
    scores = torch.einsum("qnd,knd->qnk", queries, keys) * queries.shape[-1] ** -0.5
    scores.masked_fill_(~mask[:, None], -torch.inf)
    return torch.einsum("qnk,knd->qnd", scores.softmax(-1), values), scores.logsumexp(-1)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """One query per row, as a graph uses it: planning rewrites the buffers given at the start."""

    def __init__(
        self,
        workspace: Tensor,
        layout: str,
        *,
        use_cuda_graph: bool,
        use_tensor_cores: bool,
        paged_kv_indptr_buffer: Tensor,
        paged_kv_indices_buffer: Tensor,
        paged_kv_last_page_len_buffer: Tensor,
    ) -> None:
        super().__init__(workspace, layout)
        assert use_cuda_graph
        assert isinstance(use_tensor_cores, bool)
        self._buffers = (
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
        )

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_q: int,
        num_kv: int,
        head: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        """Lay the rows out; their number is that of the buffers."""
        starts, slots, lengths = self._buffers
        assert len(last_page_len) == len(lengths)
        starts.copy_(indptr)
        slots[: len(indices)].copy_(indices)
        lengths.copy_(last_page_len)
        every = torch.arange(len(indptr), dtype=torch.int32)
        heads = (num_q, num_kv, head)
        self._keep(every, starts, slots[: len(indices)], lengths, heads, page_size)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Any number of queries per row, causal, masked or seeing all."""

    def __init__(self, workspace: Tensor, layout: str, backend: str) -> None:
        super().__init__(workspace, layout)
        assert backend in ("fa2", "auto")

    def plan(
        self,
        query_indptr: Tensor,
        key_indptr: Tensor,
        slots: Tensor,
        last_page_len: Tensor,
        num_q: int,
        num_kv: int,
        head: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        causal: bool = False,
        custom_mask: Tensor | None = None,
    ) -> None:
        """Lay the rows out."""
        heads = (num_q, num_kv, head)
        self._keep(query_indptr, key_indptr, slots, last_page_len, heads, page_size)
        self._is_causal, self._mask = causal, custom_mask


class MultiLevelCascadeAttentionWrapper:
    """The same queries on several levels, merged by log-sum-exp."""

    def __init__(self, num_levels: int, workspace: Tensor, layout: str) -> None:
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(workspace, layout, "auto")
            for _ in range(num_levels)
        ]
        self.num_plans = 0

    def plan(
        self,
        query_indptrs: Sequence[Tensor],
        key_indptrs: Sequence[Tensor],
        slots: Sequence[Tensor],
        last_page_lens: Sequence[Tensor],
        *heads_and_page: int,
        **dtypes: Any,
    ) -> None:
        """Lay the rows of every level out."""
        levels = (self._levels, query_indptrs, key_indptrs, slots, last_page_lens)
        for level, *arrays in zip(*levels, strict=True):
            level.plan(*arrays, *heads_and_page, **dtypes)
        self.num_plans += 1

    def run(self, queries: Tensor, pages: Tensor) -> Tensor:
        """Return [Q, N, D]."""
        results = [level.run(queries, pages, return_lse=True) for level in self._levels]
        outs = torch.stack([out for out, _ in results])
        weights = torch.stack([lse for _, lse in results]).mul(torch.log(torch.tensor(2.0)))
        return (outs * weights.softmax(0)[..., None]).sum(0)
