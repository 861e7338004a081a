"""On-device sampler: prefill, fork, decode, all inside jit.

One invariant carries everything: a row is a cache of `length` tokens plus one `token`
that stands behind them and has not been fed yet. Decoding feeds it and samples the next.
So a row can be forked at any position p of a finished row (keep p - 1 cached tokens, feed
token p - 1 again) without any prefill, and every sampled token costs one forward pass.

A row's samples depend on its own key and prefix only: step t of a row draws with
`fold_in(key, t)`, whatever the other rows do.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from spo_jax import model
from spo_jax.compiles import program
from spo_jax.config import ModelConfig
from spo_jax.sharding import take_rows
from spo_jax.structs import KVCache, Samples, Sampling


class Rows(struct.PyTreeNode):
  """Rows about to decode."""

  cache: KVCache
  token: jax.Array  # i32[B], the last token of the prefix, not in the cache
  stop_state: jax.Array  # i32[B], see stops.py, of the response so far; 0 for none
  keys: jax.Array  # key[B], one per row
  limit: jax.Array  # i32[B], most tokens to sample; 0 for an idle row


class _Loop(struct.PyTreeNode):
  step: jax.Array
  token: jax.Array
  stop_state: jax.Array
  cache: KVCache
  samples: Samples


def row_keys(key: jax.Array, ids: jax.Array) -> jax.Array:
  """One key per row identity: key, i32[B] -> key[B]."""
  return jax.vmap(partial(jax.random.fold_in, key))(ids)


def fork(cache: KVCache, rows: jax.Array, lengths: jax.Array) -> KVCache:
  """New rows grown from any row at any position.

  Args:
    rows: i32[B'], which row each new one continues; lengths: i32[B'], tokens to keep.
  """
  keys, values = take_rows((cache.keys, cache.values), rows, "cache")
  return KVCache(keys=keys, values=values, length=lengths)


def draw(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
  """Samples one token per row by the Gumbel-max trick.

  Args:
    keys: key[B]; logits: f32[B, V].
  Returns: tokens i32[B] and their logprobs f32[B] under softmax(logits / temperature)
    over the whole vocabulary, before top-p and top-k. Greedy (temperature 0) reports
    logprobs at temperature 1.
  """
  greedy = sampling.temperature == 0
  scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)
  allowed = truncate(scaled, sampling) if sampling.truncate else scaled
  noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
  tokens = jnp.argmax(allowed + jnp.where(greedy, 0.0, noise), axis=-1).astype(jnp.int32)
  logprobs = jax.nn.log_softmax(scaled, axis=-1)
  return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def truncate(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """-inf outside the top-k tokens and, among those, the smallest set of probability >= top_p.

  As in transformers, top-p looks at the distribution that top-k has left; equal logits stay
  or go together.
  """
  if sampling.top_k:  # k values instead of a sort of the whole vocabulary
    ordered, _ = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))
    logits = jnp.where(logits >= ordered[:, -1:], logits, -jnp.inf)
  else:
    ordered = jnp.sort(logits, axis=-1, descending=True)
  probs = jnp.exp(ordered - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
  above = jnp.cumsum(probs, axis=-1) - probs
  kept = (above < sampling.top_p) | (sampling.top_p >= 1)
  lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits >= lowest, logits, -jnp.inf)


def decode(
  config: ModelConfig, params: model.Params, rows: Rows, sampling: Sampling, max_tokens: int
) -> tuple[Samples, KVCache, jax.Array]:
  """Samples until every row has ended, by an end id or a stop string, or reached its limit.

  Args:
    max_tokens: T, width of the returned arrays; `rows.limit` must not exceed it.
  Returns: the samples, the cache (each row's last token is not in it) and the number of
    steps the loop took.
  """
  batch = rows.token.shape[0]
  end_ids = jnp.array(sampling.end_ids, jnp.int32)
  stop_table = sampling.stop_table

  def active(samples: Samples) -> jax.Array:
    return ~samples.finished & (samples.lengths < rows.limit)

  def body(loop: _Loop) -> _Loop:
    live = active(loop.samples)
    logits, cache = model.decode_step(config, params, loop.token, loop.cache)
    keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, loop.step)
    token, logprob = draw(keys, logits, sampling)
    is_end, stop_state = jnp.isin(token, end_ids), loop.stop_state
    if stop_table is not None:
      stop_state = stop_table[token, stop_state].astype(jnp.int32)
      is_end |= stop_state == stop_table.shape[1] - 1
    column = (0, loop.step)
    old = loop.samples
    samples = Samples(
      tokens=jax.lax.dynamic_update_slice(
        old.tokens, jnp.where(live, token, sampling.pad_id)[:, None], column
      ),
      logprobs=jax.lax.dynamic_update_slice(
        old.logprobs, jnp.where(live, logprob, 0.0)[:, None], column
      ),
      lengths=old.lengths + live,
      finished=old.finished | (live & is_end),
    )
    # A row that is done keeps its length: what it writes next lands behind its end.
    length = jnp.where(live, cache.length, loop.cache.length)
    cache, token = cache.replace(length=length), jnp.where(live, token, loop.token)
    return _Loop(
      step=loop.step + 1, token=token, stop_state=stop_state, cache=cache, samples=samples
    )

  start = Samples(
    tokens=jnp.full((batch, max_tokens), sampling.pad_id, jnp.int32),
    logprobs=jnp.zeros((batch, max_tokens), jnp.float32),
    lengths=jnp.zeros(batch, jnp.int32),
    finished=jnp.zeros(batch, bool),
  )
  end = jax.lax.while_loop(
    lambda loop: jnp.any(active(loop.samples)),
    body,
    _Loop(
      step=jnp.int32(0), token=rows.token, stop_state=rows.stop_state, cache=rows.cache,
      samples=start,
    ),
  )
  return end.samples, end.cache, end.step


@program(static_argnames=("config", "slots"))
def prefill(
  config: ModelConfig, params: model.Params, tokens: jax.Array, lengths: jax.Array, slots: int
) -> KVCache:
  """`model.prefill` as a program of its own: prompts i32[P, Lp] -> cache of P rows."""
  return model.prefill(config, params, tokens, lengths, slots)


@program(static_argnames=("config", "max_tokens", "keep_cache"))
def grow(
  config: ModelConfig,
  params: model.Params,
  cache: KVCache,
  parent: jax.Array,
  prefix: jax.Array,
  token: jax.Array,
  stop_state: jax.Array,
  key: jax.Array,
  ids: jax.Array,
  limit: jax.Array,
  sampling: Sampling,
  max_tokens: int,
  keep_cache: bool,
) -> tuple[Samples, KVCache | None, jax.Array]:
  """Forks rows and decodes them: the one program behind every rollout.

  Args:
    cache: rows to grow from; parent: i32[B], which of them; prefix: i32[B], tokens of
      context each new row starts with (at least 1); token: i32[B], the last of those.
    stop_state: i32[B], where those of them that are response have left the stop strings.
    key, ids: row b draws with fold_in(key, ids[b]); limit: i32[B].
    keep_cache: whether the new rows will be grown from in turn.
  Returns: see `decode`.
  """
  forked = fork(cache, parent, prefix - 1)
  rows = Rows(forked, token, stop_state, row_keys(key, ids), limit)
  samples, cache, steps = decode(config, params, rows, sampling, max_tokens)
  return samples, cache if keep_cache else None, steps
