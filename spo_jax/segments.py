"""Segments: which tokens share one credit.

A partition is an i32[B, T] of segment ids: 0, 1, 2, ... along each row, -1 where a token
belongs to no segment (padding, or before the first boundary). A boundary stands in front
of the first token of its segment. `logprobs[:, t]` scores `tokens[:, t]`.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def uncertain_tokens(logprobs: jax.Array, mask: jax.Array, threshold: float) -> jax.Array:
  """Tokens at which the sampling policy hesitated: the cutpoints, and the probability mask.

    uncertain_t = p(y_t | s_t) < rho             SPO, arXiv:2505.23564

  Args:
    logprobs: f32[B, T] at the sampling temperature, before top-p or top-k.
    mask: bool[B, T], True on response tokens.
    threshold: rho, a probability.
  Returns: bool[B, T]; False outside the mask.
  """
  chex.assert_rank([logprobs, mask], 2)
  chex.assert_equal_shape([logprobs, mask])
  return (jnp.exp(logprobs) < threshold) & (mask != 0)


def segments_from_starts(starts: jax.Array, mask: jax.Array) -> jax.Array:
  """Segment ids from the tokens that open a segment (for VinePPO: each line's first token).

  Args:
    starts: bool[B, T], True on the first token of every segment.
    mask: bool[B, T], True on response tokens.
  Returns: i32[B, T]; -1 before the first start and outside the mask.
  """
  chex.assert_rank([starts, mask], 2)
  chex.assert_equal_shape([starts, mask])
  inside = mask != 0
  return jnp.where(inside, jnp.cumsum(starts & inside, axis=1, dtype=jnp.int32) - 1, -1)


def cutpoint_segments(
  logprobs: jax.Array, mask: jax.Array, threshold: float, interval: int
) -> jax.Array:
  """SPO-chain: boundaries in front of cutpoints number 0, k, 2k, ...

  Equal numbers of cutpoints minimise sum_k (cutpoints in segment k)^2, the partition
  objective of SPO, arXiv:2505.23564.

  Args:
    logprobs: f32[B, T] at the sampling temperature, before top-p or top-k.
    mask: bool[B, T], True on response tokens.
    threshold: rho, a probability.
    interval: k, cutpoints per segment (the last segment may hold fewer).
  Returns: i32[B, T]; -1 before the first boundary and outside the mask.
  Raises: ValueError if `interval` is below 1.
  """
  if isinstance(interval, int) and interval < 1:
    raise ValueError(f"interval={interval}: a segment holds at least 1 cutpoint.")
  uncertain = uncertain_tokens(logprobs, mask, threshold)
  number = jnp.cumsum(uncertain, axis=1, dtype=jnp.int32) - 1
  return segments_from_starts(uncertain & (number % interval == 0), mask)


def even_segments(lengths: jax.Array, num_segments: int, T: int) -> jax.Array:
  """Each response in equal parts, the "naive cut" ablation of SPO, arXiv:2505.23564.

  n tokens in k parts: the first n mod k parts are one token longer, so a response shorter
  than k has n parts of one token.

  Args:
    lengths: i32[B], response tokens.
    num_segments: k.
    T: width of the result, tokens.
  Returns: i32[B, T]; -1 on padding.
  Raises: ValueError if `num_segments` is below 1.
  """
  if isinstance(num_segments, int) and num_segments < 1:
    raise ValueError(f"num_segments={num_segments}: a response has at least 1 segment.")
  chex.assert_rank(lengths, 1)
  short, longer = (x[:, None] for x in jnp.divmod(lengths, num_segments))
  token = jnp.arange(T, dtype=jnp.int32)[None, :]
  tail = token - longer * (short + 1)  # tokens past the longer parts
  segment = jnp.where(tail < 0, token // (short + 1), longer + tail // jnp.maximum(short, 1))
  return jnp.where(token < lengths[:, None], segment, -1).astype(jnp.int32)


def whole_segments(lengths: jax.Array, T: int) -> jax.Array:
  """One segment per response, as in GRPO (arXiv:2402.03300): i32[B, T], -1 on padding."""
  return even_segments(lengths, 1, T)


def token_segments(lengths: jax.Array, T: int) -> jax.Array:
  """One segment per token, as in PPO (arXiv:1707.06347): i32[B, T], -1 on padding."""
  chex.assert_rank(lengths, 1)
  token = jnp.arange(T, dtype=jnp.int32)[None, :]
  return jnp.where(token < lengths[:, None], token, -1)


def num_segments(segment: jax.Array) -> jax.Array:
  """Segments of each row.

  Args:
    segment: i32[B, T], -1 where a token belongs to no segment.
  Returns: i32[B].
  """
  chex.assert_rank(segment, 2)
  return jnp.max(segment, axis=1, initial=-1) + 1


def segment_starts(segment: jax.Array, max_segments: int) -> jax.Array:
  """Where continuations are sampled from: the boundary in front of every segment.

  Args:
    segment: i32[B, T], -1 where a token belongs to no segment.
    max_segments: S, static. Segments past it are left out.
  Returns: i32[B, S], index of the segment's first token; T where there is no such segment.
  """
  chex.assert_rank(segment, 2)
  rows, length = segment.shape
  slot = jnp.where(segment >= 0, segment, max_segments)  # S is out of bounds: dropped
  token = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segment.shape)
  empty = jnp.full((rows, max_segments), length, jnp.int32)
  return empty.at[jnp.arange(rows)[:, None], slot].min(token, mode="drop")
