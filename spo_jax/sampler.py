"""On-device sampler: prefill, and rows that grow from anywhere, all inside jit.

One invariant carries everything: a row is a cache of `length` tokens plus one `token`
that stands behind them and has not been fed yet. Decoding feeds it and samples the next.
So a row can be grown from any position p of a finished row (keep p - 1 cached tokens, feed
token p - 1 again) without any prefill, and every sampled token costs one forward pass.

Rows wait in a queue for one of a fixed number of slots. A slot whose row has ended is handed
the next one inside the decode loop: its context is copied together from the pieces that are
stored once for all rows, what it grows is copied out when it has ended.

A row's samples depend on its own key and context only: step t of a row draws with
`fold_in(key, t)`, whatever the other rows do, and whichever slot it is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from spo_jax import model
from spo_jax.attention import attention_dtype
from spo_jax.compiles import program
from spo_jax.config import ModelConfig
from spo_jax.sharding import on_shards, row_parts
from spo_jax.structs import KVCache, KVStore, Requests, Samples, Sampling

_NONE = -1  # the request of an idle slot
_PARTS = 128  # of the vocabulary, where it can be divided so


class _Rows(struct.PyTreeNode):
  """What is known of the row in each of S slots, but for its keys and values."""

  request: jax.Array  # i32[S], among those of its shard
  length: jax.Array  # i32[S], tokens cached
  token: jax.Array  # i32[S], the last one, not in the cache
  stop_state: jax.Array  # i32[S]
  ids: jax.Array  # i32[S]
  limit: jax.Array  # i32[S]
  samples: Samples  # [S, T]

  @property
  def busy(self) -> jax.Array:
    return self.request != _NONE

  @property
  def ended(self) -> jax.Array:
    return self.busy & (self.samples.finished | (self.samples.lengths >= self.limit))


class _Queue(struct.PyTreeNode):
  """What slots are filled from."""

  stores: tuple[KVStore, ...]
  requests: Requests
  order: jax.Array  # i32[R], requests of a shard in the order in which slots take them
  waiting: jax.Array  # i32[shards], how many there are without fillers


class _Desk(struct.PyTreeNode):
  """The slots, and where a row goes that has ended."""

  slots: KVStore
  rows: _Rows
  samples: Samples  # [R, T]
  kept: KVStore | None  # per layer [R, K, T, H]
  taken: jax.Array  # i32[shards], requests that have had a slot


def row_keys(key: jax.Array, ids: jax.Array) -> jax.Array:
  """One key per row identity: key, i32[B] -> key[B]."""
  return jax.vmap(partial(jax.random.fold_in, key))(ids)


def draw(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
  """Samples one token per row: a block of the vocabulary by its share, then a token of the block.

  Two uniform numbers per row, where Gumbel noise would take one for every token.

  Args:
    keys: key[B]; logits: f32[B, V].
  Returns: tokens i32[B] and their logprobs f32[B] under softmax(logits / temperature)
    over the whole vocabulary, before top-p and top-k. Greedy (temperature 0) reports
    logprobs at temperature 1.
  """
  greedy = sampling.temperature == 0
  scaled = logits / jnp.where(greedy, 1.0, sampling.temperature)
  largest = jnp.max(scaled, axis=-1, keepdims=True)
  shares = jnp.exp(scaled - largest)
  allowed = jnp.where(greedy, scaled == largest, shares)
  if sampling.truncate:
    allowed = jnp.where(jnp.isneginf(truncate(scaled, sampling)), 0, allowed)
  # Uniform numbers are multiples of 2^-23; halfway to the next there is neither 0 nor 1. Greedy,
  # 0 takes the first of those that are largest.
  chance = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys) + 2**-24
  tokens = _by_share(allowed, jnp.where(greedy, 0.0, chance))
  chosen = jnp.take_along_axis(scaled - largest, tokens[:, None], axis=-1)[:, 0]
  return tokens, chosen - jnp.log(jnp.sum(shares, axis=-1))


def _by_share(shares: jax.Array, chance: jax.Array) -> jax.Array:
  """Index i with probability shares[:, i] / sum: f32[B, V], f32[B, 2] below 1 -> i32[B]."""
  rows, size = shares.shape
  # What the devices of a `tensor` axis have of the vocabulary is a number of whole parts.
  parts = math.gcd(size, _PARTS)
  part = size // parts
  count = math.ceil(part / math.isqrt(size))
  width = math.ceil(part / count)
  filled = jnp.pad(shares.reshape(rows, parts, part), ((0, 0), (0, 0), (0, count * width - part)))
  blocks = filled.reshape(rows, parts * count, width)
  block = _passed(jnp.sum(blocks, axis=-1), chance[:, 0])
  own = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  index = block // count * part + block % count * width + _passed(own, chance[:, 1])
  return jnp.minimum(index, size - 1)


def _passed(shares: jax.Array, chance: jax.Array) -> jax.Array:
  """The first index at which the running sum is beyond `chance` of the whole, i32[B].

  Rounding may let the running sum move where nothing is added, so a share must be positive too.
  """
  running, possible = jnp.cumsum(shares, axis=-1), shares > 0
  whole = jnp.max(jnp.where(possible, running, 0), axis=-1)
  is_beyond = possible & (running > (chance * whole)[:, None])
  # Not argmax, whose loop a CPU cannot vectorise.
  last = shares.shape[-1] - 1
  return jnp.min(jnp.where(is_beyond, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


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


def _none_sampled(rows: int, max_tokens: int) -> Samples:
  return Samples(
    tokens=jnp.zeros((rows, max_tokens), jnp.int32),
    logprobs=jnp.zeros((rows, max_tokens), jnp.float32),
    lengths=jnp.zeros(rows, jnp.int32),
    finished=jnp.zeros(rows, bool),
  )


def _step(
  config: ModelConfig,
  params: model.Params,
  slots: KVStore,
  rows: _Rows,
  key: jax.Array,
  sampling: Sampling,
) -> tuple[KVStore, _Rows]:
  """One more token for every busy row."""
  live, old = rows.busy, rows.samples
  cache = KVCache(slots.keys, slots.values, rows.length)
  logits, cache = model.decode_step(config, params, rows.token, cache)
  keys = jax.vmap(jax.random.fold_in)(row_keys(key, rows.ids), old.lengths)
  token, logprob = draw(keys, logits, sampling)
  is_end, stop_state = jnp.isin(token, jnp.array(sampling.end_ids, jnp.int32)), rows.stop_state
  if (stop_table := sampling.stop_table) is not None:
    stop_state = stop_table[token, stop_state].astype(jnp.int32)
    is_end |= stop_state == stop_table.shape[1] - 1
  column = live[:, None] & (jnp.arange(old.tokens.shape[1]) == old.lengths[:, None])
  return KVStore(cache.keys, cache.values), rows.replace(
    # An idle row keeps its length: what it writes next lands where nobody looks.
    length=jnp.where(live, cache.length, rows.length),
    token=jnp.where(live, token, rows.token),
    stop_state=stop_state,
    samples=Samples(
      tokens=jnp.where(column, token[:, None], old.tokens),
      logprobs=jnp.where(column, logprob[:, None], old.logprobs),
      lengths=old.lengths + live,
      finished=old.finished | (live & is_end),
    ),
  )


def _at(tree: Any, row: int | jax.Array) -> Any:
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, row, 0, keepdims=False), tree)


def _put(tree: Any, row: jax.Array, new: Any) -> Any:
  return jax.tree.map(
    lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, row, 0), tree, new
  )


def _context(request: Requests, width: int, stores: Sequence[jax.Array]) -> jax.Array:
  """The keys or values that a request starts with, [1, K, C, H], from pieces [P, K, Cp, H]."""
  _, heads, _, channels = stores[0].shape
  context = jnp.zeros((1, heads, width, channels), stores[0].dtype)
  for i, pieces in enumerate(stores):
    # They are numbered across shards, and lie on that of their request.
    piece = jax.lax.dynamic_slice_in_dim(pieces, request.pieces[i] % len(pieces), 1)
    context = jax.lax.dynamic_update_slice_in_dim(context, piece, request.offsets[i], 2)
  return context


def _hand_out(queue: _Queue, desk: _Desk) -> _Desk:
  """Fills idle slots, one by one, while requests wait."""

  def fill(desk: _Desk) -> _Desk:
    slot, number = jnp.argmin(desk.rows.busy), queue.order[desk.taken[0]]
    request = _at(queue.requests, number)
    slots = jax.tree.map(
      # A context is made before it goes into its slot: only a single update is in place.
      lambda old, *pieces: jax.lax.dynamic_update_slice_in_dim(
        old, _context(request, old.shape[2], pieces), slot, 0
      ),
      desk.slots, *queue.stores,
    )  # fmt: skip
    row = _Rows(
      request=number, length=request.prefix - 1, token=request.token,
      stop_state=request.stop_state, ids=request.ids, limit=request.limit,
      samples=_at(_none_sampled(1, desk.samples.tokens.shape[1]), 0),
    )  # fmt: skip
    return desk.replace(slots=slots, rows=_put(desk.rows, slot, row), taken=desk.taken + 1)

  return jax.lax.while_loop(
    lambda desk: jnp.any(~desk.rows.busy) & (desk.taken < queue.waiting)[0], fill, desk
  )


def _take_back(desk: _Desk) -> _Desk:
  """Copies out what rows have grown that have ended, and makes their slots idle."""

  def empty(desk: _Desk) -> _Desk:
    slot = jnp.argmax(desk.rows.ended)
    row = _at(desk.rows, slot)

    def copy(old: jax.Array, cache: jax.Array) -> jax.Array:
      start = (slot, 0, row.length - row.samples.lengths, 0)
      own = jax.lax.dynamic_slice(cache, start, (1, *old.shape[1:]))
      return jax.lax.dynamic_update_slice(old, own, (row.request, 0, 0, 0))

    return desk.replace(
      rows=desk.rows.replace(request=desk.rows.request.at[slot].set(_NONE)),
      samples=_put(desk.samples, row.request, row.samples),
      kept=None if desk.kept is None else jax.tree.map(copy, desk.kept, desk.slots),
    )

  return jax.lax.while_loop(lambda desk: jnp.any(desk.rows.ended), empty, desk)


def _refill(queue: _Queue, desk: _Desk) -> _Desk:
  # Two loops: one that read and wrote slots would copy all of them. Both cost nothing in a step
  # in which no row ends.
  return _hand_out(queue, _take_back(desk))


def empty_store(config: ModelConfig, rows: int, width: int) -> KVStore:
  """Room for `rows` pieces of `width` tokens."""
  shape = (rows, config.num_kv_heads, width, model.head_width(config))
  dtype = attention_dtype(config.compute_dtype)
  layers = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
  return KVStore(keys=layers, values=layers)


def store_width(store: KVStore) -> int:
  return store.keys[0].shape[2]


def store_bytes(config: ModelConfig, rows: int, width: int) -> int:
  shapes = jax.eval_shape(lambda: empty_store(config, rows, width))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


@program(static_argnames="config")
def prefill(
  config: ModelConfig, params: model.Params, tokens: jax.Array, lengths: jax.Array
) -> KVStore:
  """Encodes prompts once: i32[P, Lp], lengths i32[P] -> P pieces of width Lp."""
  return KVStore(*model.prefill(config, params, tokens, lengths))


@program(static_argnames=("config", "slots", "width", "max_tokens", "keep"))
def grow(
  config: ModelConfig,
  params: model.Params,
  stores: tuple[KVStore, ...],
  requests: Requests,
  key: jax.Array,
  sampling: Sampling,
  slots: int,
  width: int,
  max_tokens: int,
  keep: bool,
) -> tuple[Samples, KVStore | None, jax.Array]:
  """Grows R rows in S slots: the one program behind every rollout.

  Every row samples until it ends by an end id or a stop string or reaches its limit. Slots take
  the rows with the highest limit first, so that what ends last has begun first.

  Args:
    params: rounded (`model.rounded`), or every step rounds them.
    stores: of which contexts are made; on a mesh the pieces of a request lie on its own shard,
      and shards divide slots, requests and pieces.
    slots: S; width: C, which no context with its limit may exceed; max_tokens: T, width of what
      is returned, which `requests.limit` must not exceed.
    keep: whether to keep the new rows as pieces. Theirs begins at `prefix - 1`, with the last
      token of their context, and lacks their own last token.
  Returns: samples of all requests, their store or None, and slots x steps taken.
  """
  count = len(requests.limit)
  # Each shard has a queue of its own.
  limit = requests.limit.reshape(row_parts(count), -1)
  queue = _Queue(
    stores, requests, order=jnp.argsort(-limit, axis=1, stable=True).astype(jnp.int32).reshape(-1),
    waiting=jnp.sum(limit > 0, axis=1, dtype=jnp.int32),
  )  # fmt: skip
  nobody, nothing = jnp.full(slots, _NONE), jnp.zeros(slots, jnp.int32)
  desk = _Desk(
    slots=empty_store(config, slots, width),
    rows=_Rows(nobody, *(nothing,) * 5, _none_sampled(slots, max_tokens)),
    samples=_none_sampled(count, max_tokens),
    kept=empty_store(config, count, max_tokens) if keep else None,
    taken=jnp.zeros_like(queue.waiting),
  )

  def body(loop: tuple[jax.Array, _Desk]) -> tuple[jax.Array, _Desk]:
    steps, desk = loop
    new, rows = _step(config, params, desk.slots, desk.rows, key, sampling)
    return steps + slots, on_shards(_refill, queue, desk.replace(slots=new, rows=rows))

  slot_steps, desk = jax.lax.while_loop(
    lambda loop: jnp.any(loop[1].rows.busy), body, (jnp.int32(0), on_shards(_hand_out, queue, desk))
  )
  is_sampled = jnp.arange(max_tokens) < desk.samples.lengths[:, None]
  tokens = jnp.where(is_sampled, desk.samples.tokens, sampling.pad_id)
  return desk.samples.replace(tokens=tokens), desk.kept, slot_steps
