"""Attention of one new token per row over its cache, as a kernel for NVIDIA GPUs (Pallas, Triton).

Each program takes the queries of one head of keys of one row, and reads what that row has filled of
its cache and nothing behind it, once (online softmax, arXiv:2205.14135).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

_SLOTS = 32  # read at once
_WARPS, _STAGES = 2, 2  # as fast as a copy on an H100, as others are too within 5 %
_ROWS = 16  # the fewest that a tensor core multiplies
_NEVER = -1e30  # a score; -inf minus itself would not be a number


def flash_decode(
  q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, interpret: bool = False
) -> jax.Array:
  """The query of every row sees the slots of its cache up to its own position.

  Args:
    q: [B, 1, N, H]; keys, values: [B, K, C, H], H a power of two; positions: i32[B, 1].
    interpret: run it anywhere, slowly.
  Returns: [B, 1, N, H].
  """
  # Pallas takes a second to load, and only GPUs need it.
  from jax.experimental import pallas
  from jax.experimental.pallas import triton

  rows, _, heads, width = q.shape
  kv_heads, capacity = keys.shape[1:3]
  each = heads // kv_heads

  def one(*shape: int) -> Any:
    return pallas.BlockSpec((None, None, *shape), lambda row, head: (row, head, 0, 0))

  out = pallas.pallas_call(
    functools.partial(_kernel, block_rows=max(_ROWS, 1 << (each - 1).bit_length())),
    grid=(rows, kv_heads),
    in_specs=[
      one(each, width), one(capacity, width), one(capacity, width),
      pallas.BlockSpec((None,), lambda row, head: (row,)),
    ],
    out_specs=one(each, width),
    out_shape=jax.ShapeDtypeStruct((rows, kv_heads, each, width), q.dtype),
    compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
    interpret=interpret,
    name="flash_decode",
  )(
    q.reshape(rows, kv_heads, each, width), keys, values,
    jnp.minimum(positions[:, 0] + 1, capacity),
  )  # fmt: skip
  return out.reshape(q.shape)


def _kernel(q_ref: Any, keys_ref: Any, values_ref: Any, filled_ref: Any, out_ref: Any,
            block_rows: int) -> None:  # fmt: skip
  """q, out [M, H]; keys, values [C, H]; filled i32[], slots that are seen."""
  from jax.experimental import pallas
  from jax.experimental.pallas import triton

  each, width = q_ref.shape
  is_query = (jnp.arange(block_rows) < each)[:, None]
  q = triton.load(q_ref.at[pallas.ds(0, block_rows), :], mask=is_query, other=0.0)
  filled = filled_ref[()]

  def add(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    out, largest, total = carry
    at = pallas.ds(i * _SLOTS, _SLOTS)
    seen = i * _SLOTS + jnp.arange(_SLOTS) < filled
    keys = triton.load(keys_ref.at[at, :], mask=seen[:, None], other=0.0)
    scores = jnp.dot(q, keys.T, preferred_element_type=jnp.float32) * width**-0.5
    scores = jnp.where(seen[None], scores, _NEVER)
    new = jnp.maximum(largest, jnp.max(scores, axis=1))
    weights, kept = jnp.exp(scores - new[:, None]), jnp.exp(largest - new)
    values = triton.load(values_ref.at[at, :], mask=seen[:, None], other=0.0)
    own = jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return out * kept[:, None] + own, new, total * kept + jnp.sum(weights, axis=1)

  nothing = (
    jnp.zeros((block_rows, width), jnp.float32), jnp.full(block_rows, _NEVER, jnp.float32),
    jnp.zeros(block_rows, jnp.float32),
  )  # fmt: skip
  out, _, total = jax.lax.fori_loop(0, pallas.cdiv(filled, _SLOTS), add, nothing)
  out = (out / total[:, None]).astype(out_ref.dtype)
  triton.store(out_ref.at[pallas.ds(0, block_rows), :], out, mask=is_query)
