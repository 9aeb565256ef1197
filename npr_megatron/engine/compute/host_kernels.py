"""What lies between the matrix products of a forward pass, compiled for the CPU at hand. fp32 only.

A decode step of a small model is hundreds of tiny operations, each of which costs torch more to
start than to compute. Here each is one loop, compiled by numba: a row of single queries reads its
keys where they lie in the pool instead of from a copy, and costs no more for being ragged.

All arrays are C contiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from npr_megatron.engine.compiled import compiled, inlined

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


_LINE = 16
"""Floats of a cache line."""
_FETCHED = 1 << 15
"""Floats asked for in advance: 128 KiB."""


@inlined
def exp(x: np.float32) -> np.float32:
    """Return e^x to one unit in the last place, in a form that vectorises (12 times as fast as
    calling the C library): 2^n times a polynomial of Cephes on [-ln 2 / 2, ln 2 / 2].

    Beyond +-87 it stands still, in place of 0 and infinity.
    """
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(87.0) if x > np.float32(87.0) else x
    power = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = x - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    value = np.float32(1.9875691500e-4)
    value = value * rest + np.float32(1.3981999507e-3)
    value = value * rest + np.float32(8.3334519073e-3)
    value = value * rest + np.float32(4.1665795894e-2)
    value = value * rest + np.float32(1.6666665459e-1)
    value = value * rest + np.float32(5.0000001201e-1)
    value = value * rest * rest + rest + np.float32(1.0)
    return value * np.int32((np.int32(power) + 127) << 23).view(np.float32)


def _prefetch_of(context: Any, array: Any, index: Any) -> tuple[Any, Any]:
    """Ask for the cache line of ``array[index]``; what LLVM calls ``llvm.prefetch``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        int32 = ir.IntType(32)
        kinds = [place.type, int32, int32, int32]
        fetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [place.type], ir.FunctionType(ir.VoidType(), kinds)
        )
        builder.call(fetch, [place, int32(0), int32(3), int32(1)])  # to read, soon, data
        return context.get_dummy_value()

    return types.void(array, index), generate


_prefetch: Any = intrinsic(_prefetch_of)


@compiled
def rms_norm(hidden: Floats, weight: Floats, eps: np.float32, out: Floats) -> None:
    """Write the [T, H] rows divided by their root mean square, times ``weight`` [H]."""
    num_rows, width = hidden.shape
    for row in range(num_rows):
        square = np.float32(0.0)
        for i in range(width):
            square += hidden[row, i] * hidden[row, i]
        scale = np.float32(1.0) / np.sqrt(square / np.float32(width) + eps)
        for i in range(width):
            out[row, i] = hidden[row, i] * scale * weight[i]


@compiled
def turn(
    heads: Floats,
    num_q: int,
    num_kv: int,
    norms: Floats,
    eps: np.float32,
    cos: Floats,
    signed_sin: Floats,
) -> None:
    """Normalise and rotate the queries and keys of ``heads`` [T, N + 2 K, D] in place.

    Args:
        norms: [2, D] weights of queries and of keys.
        cos: [T, 1, D] of the HF convention: the two halves of D are the pair.
        signed_sin: [T, 1, D], the first half negated.
    """
    num_rows, _, width = heads.shape
    half = width // 2
    for row in range(num_rows):
        for index in range(num_q + num_kv):
            head, norm = heads[row, index], norms[0 if index < num_q else 1]
            square = np.float32(0.0)
            for i in range(width):
                square += head[i] * head[i]
            scale = np.float32(1.0) / np.sqrt(square / np.float32(width) + eps)
            for i in range(half):
                left, right = head[i] * scale * norm[i], head[half + i] * scale * norm[half + i]
                head[i] = left * cos[row, 0, i] + right * signed_sin[row, 0, i]
                head[half + i] = right * cos[row, 0, half + i] + left * signed_sin[row, 0, half + i]


@compiled
def rotate(heads: Floats, num_turned: int, cos: Floats, signed_sin: Floats) -> None:
    """Rotate the first ``num_turned`` of ``heads`` [T, N + 2 K, D] in place, as :func:`turn` does
    behind its norm.
    """
    num_rows, _, width = heads.shape
    half = width // 2
    for row in range(num_rows):
        for index in range(num_turned):
            head = heads[row, index]
            for i in range(half):
                left, right = head[i], head[half + i]
                head[i] = left * cos[row, 0, i] + right * signed_sin[row, 0, i]
                head[half + i] = right * cos[row, 0, half + i] + left * signed_sin[row, 0, half + i]


@compiled
def gate(gate_up: Floats, out: Floats) -> None:
    """Write SiLU of the first half of [T, 2 I], times the second half, as [T, I]."""
    num_rows, width = out.shape
    for row in range(num_rows):
        for i in range(width):
            x = gate_up[row, i]
            out[row, i] = x / (np.float32(1.0) + exp(-x)) * gate_up[row, width + i]


@compiled
def store(heads: Floats, slots: Indices, cache: Floats) -> None:
    """Copy the keys and values, the last 2 K of ``heads`` [T, N + 2 K, D], to their slots."""
    num_rows, num_heads, width = heads.shape
    num_stored = cache.shape[1]
    first = num_heads - num_stored
    for row in range(num_rows):
        slot = slots[row]
        for index in range(num_stored):
            for i in range(width):
                cache[slot, index, i] = heads[row, first + index, i]


@compiled
def attend(
    heads: Floats,
    cache: Floats,
    keys: Indices,
    lengths: Indices,
    scale: np.float32,
    out: Floats,
) -> None:
    """Write the attention of single queries over the slots each one reads.

    Args:
        heads: [T, N + 2 K, D], of which the first N are queries.
        cache: [slots, 2 K, D] keys, then values.
        keys: [T, L] slots, of which row t reads the first ``lengths[t]``, at least one.
        out: [T, N, D].
    """
    num_rows, num_q, _ = out.shape
    num_kv = cache.shape[1] // 2
    group = num_q // num_kv
    weights = np.empty((group, keys.shape[1]), np.float32)
    _fetch(cache, keys[0, : lengths[0]])
    for row in range(num_rows):
        slots = keys[row, : lengths[row]]
        if row + 1 < num_rows:
            _fetch(cache, keys[row + 1, : lengths[row + 1]])
        for kv in range(num_kv):
            mine = slice(kv * group, kv * group + group)
            _score(heads[row, mine], cache, slots, kv, scale, weights)
            for g in range(group):
                _softmax(weights[g, : len(slots)])
            _mix(weights, cache, slots, num_kv + kv, out[row, mine])


@inlined
def _fetch(cache: Floats, slots: Indices) -> None:
    """Ask for the slots of the row after this one, as far as the first cache has room for both: a
    processor cannot guess where they lie (a step of 32 streams in half the time).
    """
    size = cache.shape[1] * cache.shape[2]
    floats = cache.reshape(-1)
    for j in range(min(len(slots), _FETCHED // size)):
        for i in range(0, size, _LINE):
            _prefetch(floats, slots[j] * size + i)


@inlined
def _score(
    queries: Floats, cache: Floats, slots: Indices, kv: int, scale: np.float32, weights: Floats
) -> None:
    """Write [G, L] products of G queries with head ``kv`` of the slots.

    Four keys at a time: sums that do not wait for each other.
    """
    group, width = queries.shape
    whole = len(slots) - len(slots) % 4
    for j in range(0, whole, 4):
        key0, key1 = cache[slots[j], kv], cache[slots[j + 1], kv]
        key2, key3 = cache[slots[j + 2], kv], cache[slots[j + 3], kv]
        for g in range(group):
            sum0 = sum1 = sum2 = sum3 = np.float32(0.0)
            for i in range(width):
                query = queries[g, i]
                sum0 += query * key0[i]
                sum1 += query * key1[i]
                sum2 += query * key2[i]
                sum3 += query * key3[i]
            weights[g, j], weights[g, j + 1] = sum0 * scale, sum1 * scale
            weights[g, j + 2], weights[g, j + 3] = sum2 * scale, sum3 * scale
    for j in range(whole, len(slots)):
        key0 = cache[slots[j], kv]
        for g in range(group):
            sum0 = np.float32(0.0)
            for i in range(width):
                sum0 += queries[g, i] * key0[i]
            weights[g, j] = sum0 * scale


@inlined
def _mix(weights: Floats, cache: Floats, slots: Indices, kv: int, out: Floats) -> None:
    """Write the means of head ``kv`` of the slots, weighted by [G, L]."""
    group, width = out.shape
    whole = len(slots) - len(slots) % 4
    out[:] = np.float32(0.0)
    for j in range(0, whole, 4):
        value0, value1 = cache[slots[j], kv], cache[slots[j + 1], kv]
        value2, value3 = cache[slots[j + 2], kv], cache[slots[j + 3], kv]
        for g in range(group):
            weight0, weight1 = weights[g, j], weights[g, j + 1]
            weight2, weight3 = weights[g, j + 2], weights[g, j + 3]
            for i in range(width):
                pair0 = weight0 * value0[i] + weight1 * value1[i]
                out[g, i] += pair0 + weight2 * value2[i] + weight3 * value3[i]
    for j in range(whole, len(slots)):
        value0 = cache[slots[j], kv]
        for g in range(group):
            for i in range(width):
                out[g, i] += weights[g, j] * value0[i]


@inlined
def _softmax(scores: Floats) -> None:
    """Turn scores into weights, in place."""
    top = scores[0]
    for j in range(len(scores)):
        top = scores[j] if scores[j] > top else top
    total = np.float32(0.0)
    for j in range(len(scores)):
        scores[j] = exp(scores[j] - top)
        total += scores[j]
    inverse = np.float32(1.0) / total
    for j in range(len(scores)):
        scores[j] *= inverse
