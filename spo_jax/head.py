"""Log-probabilities of tokens, evaluated only where a mask asks for them.

At a vocabulary of 150,000 the head costs more than many layers, and its logits more memory
than the rest of an update. The positions of the mask are packed to the front and taken in
chunks of one static shape: the number of chunks follows the mask without a new program.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from spo_jax.sharding import constrain, row_parts

# Up to here every position is scored, as the recipes for small vocabularies were measured.
SMALL_VOCABULARY = 512
_CHUNK_LOGITS = 2**27  # logits held at once, 512 MiB of float32
_TILE = 16  # what units of matrices take at once: sizes of products are multiples of it
_FEWEST_TILES = 3  # of a chunk: each reads the whole head and adds to its whole gradient
_BLOCK = 2**23  # numbers of its gradient that are added at once, 32 MiB of float32 a device


def project(hidden: jax.Array, head: jax.Array, tied: bool = False) -> jax.Array:
  """Logits f32[..., V] of hidden [..., E], from the head as it is stored.

  Args:
    head: [E, V], or the embedding [V, E] where it is `tied`: no transposed copy is made of it. Its
      numbers are rounded to the type of `hidden`, sums are float32.
  """
  return _einsum("...e,ve->...v" if tied else "...e,ev->...v", hidden, head.astype(hidden.dtype))


def token_logprobs(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  temperature: float | jax.Array = 1.0,
  tied: bool = False,
) -> jax.Array:
  """Log-probability of the targets of the mask, without an array of [B, T, V].

    log softmax(hidden head / temperature)[target]

  Pass `hidden[:, :-1]` with `tokens[:, 1:]`: the state in front of a token predicts it.

  Args:
    hidden: [B, T, E], any float type.
    head: [E, V], [V, E] where it is `tied`, any float type; its gradient is summed up in float32.
    targets: i32[B, T] in 0..V-1.
    mask: bool[B, T], where the result is wanted.
    temperature: of the sampling policy, above 0.
  Returns: f32[B, T], nats, 0 outside the mask.
  """
  if head.shape[0 if tied else 1] <= SMALL_VOCABULARY:
    # Transposed it is small, and results are those of the recipes to the last bit.
    weights = head.T if tied else head
    return jnp.where(mask, chunked_logprobs(hidden, weights, targets, temperature), 0.0)
  return packed_logprobs(hidden, head, targets, mask, temperature, tied=tied)


def chunked_logprobs(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  temperature: float | jax.Array = 1.0,
  chunk_tokens: int | None = None,
) -> jax.Array:
  """`token_logprobs` of every position, as suits a small vocabulary.

  Args:
    chunk_tokens: columns of [B, T] per chunk. None: as many as keep a chunk within 2^27
      logits, and at most half of them.
  Raises: ValueError if `chunk_tokens` is below 1.
  """
  _check(hidden, head, targets, chunk_tokens)
  rows, length, width = hidden.shape
  if chunk_tokens is None:
    chunk_tokens = min(_CHUNK_LOGITS // max(rows * head.shape[1], 1), -(-length // 2))
  chunk = max(1, min(chunk_tokens, length))

  # Chunks run along T, not B: rows keep their sharding over devices.
  chunks = -(-length // chunk)
  padding = ((0, 0), (0, chunks * chunk - length))
  hidden = jnp.pad(hidden, (*padding, (0, 0))).reshape(rows, chunks, chunk, width)
  targets = jnp.pad(targets, padding).reshape(rows, chunks, chunk)
  weights = head.astype(jnp.float32)  # so that chunks add their gradients in float32

  def score(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    states, labels = inputs
    logits = jnp.einsum(
      "bte,ev->btv", states, weights.astype(states.dtype), preferred_element_type=jnp.float32
    )
    logits = logits / temperature
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)

  by_chunk = (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0))
  scores = jax.lax.map(jax.checkpoint(score, prevent_cse=False), by_chunk)
  return jnp.moveaxis(scores, 0, 1).reshape(rows, chunks * chunk)[:, :length]


def packed_logprobs(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  temperature: float | jax.Array = 1.0,
  chunk_tokens: int | None = None,
  tied: bool = False,
) -> jax.Array:
  """`token_logprobs` at a cost that follows the number of masked positions, chunk by chunk.

  On a mesh every part of the rows is packed on its own device; all take as many chunks as the
  fullest part needs. Logits and the gradient of the head stay shared out over `tensor`. The head
  is read, and its gradient summed up, in the layout in which it is stored.

  Args:
    chunk_tokens: positions of one chunk, on every part. None: a sixteenth of a part, at least
      48, and at most as many as make 2^27 logits; a multiple of 16.
  Raises: ValueError if `chunk_tokens` is below 1.
  """
  _check(hidden, head, targets, chunk_tokens)
  chex.assert_equal_shape([targets, mask])
  vocabulary = head.shape[0 if tied else 1]
  rows, length = targets.shape
  if not targets.size:
    return jnp.zeros(targets.shape, jnp.float32)
  parts = row_parts(rows)
  positions = rows * length // parts
  if chunk_tokens is None:
    tiles = max(-(-positions // (16 * _TILE)), _FEWEST_TILES)
    chunk_tokens = _TILE * min(tiles, _CHUNK_LOGITS // (vocabulary * _TILE))
  chunk = max(1, min(chunk_tokens, positions))
  hidden, targets, mask = (
    constrain(x.reshape(parts, positions, *x.shape[2:]), "rows")
    for x in (hidden, targets, mask != 0)
  )
  temperature = jnp.asarray(temperature, jnp.float32)
  logprobs = _packed(hidden, head, targets, mask, temperature, chunk, tied)
  return constrain(logprobs.reshape(rows, length), "rows")


def _check(
  hidden: jax.Array, head: jax.Array, targets: jax.Array, chunk_tokens: int | None
) -> None:
  if chunk_tokens is not None and chunk_tokens < 1:
    raise ValueError(f"chunk_tokens={chunk_tokens}: a chunk holds at least 1 token.")
  chex.assert_rank([hidden, head, targets], [3, 2, 2])
  chex.assert_equal_shape_prefix([hidden, targets], 2)


# One custom derivative, because the number of chunks is known only when the program runs, and a
# loop of that kind has no derivative of its own. S parts of M positions, C of them in a chunk.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _packed(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  temperature: jax.Array,
  chunk: int,
  tied: bool,
) -> jax.Array:
  """[S, M, E], [E, V] or [V, E], i32[S, M], bool[S, M], f32[] -> f32[S, M], 0 outside the mask."""
  return _forward(hidden, head, targets, mask, temperature, chunk, tied)[0]


def _forward(
  hidden: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  mask: jax.Array,
  temperature: jax.Array,
  chunk: int,
  tied: bool,
) -> tuple[jax.Array, Any]:
  chunks, order = _order(mask, chunk)
  weights = _weights(head, hidden, tied)

  def add(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    at = _slice(order, i, chunk)
    scaled = _logits(_take(hidden, at), weights, tied) / temperature
    largest = jnp.max(scaled, axis=-1)
    log_total = jnp.log(jnp.sum(jnp.exp(scaled - largest[..., None]), axis=-1))
    chosen = jnp.take_along_axis(scaled, _take(targets, at)[..., None], axis=-1)[..., 0]
    parts = (chosen - largest - log_total, largest, log_total)
    return tuple(_write(x, y, i) for x, y in zip(found, parts))

  nothing = constrain(jnp.zeros(order.shape, jnp.float32), "rows")
  # The largest logit and the rest of log-sum-exp apart: their sum would lose digits of softmax.
  logprobs, *normaliser = jax.lax.fori_loop(0, chunks, add, (nothing,) * 3)
  return _unpack(logprobs, mask), (hidden, head, targets, mask, temperature, *normaliser)


def _backward(chunk: int, tied: bool, saved: Any, cotangent: jax.Array) -> tuple[Any, ...]:
  hidden, head, targets, mask, temperature, largest, log_total = saved
  chunks, order = _order(mask, chunk)
  weights = _weights(head, hidden, tied)
  count = jnp.sum(mask, axis=1, keepdims=True)

  def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    by_state, by_head, by_temperature = sums
    at = _slice(order, i, chunk)
    states, labels = _take(hidden, at), _take(targets, at)
    inside = i * chunk + jnp.arange(chunk) < count
    scale = jnp.where(inside, _take(cotangent, at), 0.0)[..., None] / temperature
    scaled = _logits(states, weights, tied) / temperature
    is_target = jnp.arange(scaled.shape[-1]) == labels[..., None]
    high, rest = (_slice(x, i, chunk)[..., None] for x in (largest, log_total))
    by_logit = scale * (is_target - jnp.exp(scaled - high - rest))
    rounded = by_logit.astype(hidden.dtype)
    by_state = _write(by_state, project(rounded, weights, not tied), i)
    rows, columns = (rounded, states) if tied else (states, rounded)
    by_head = constrain(_add_products(by_head, rows, columns, shards), layout)
    return by_state, by_head, by_temperature - jnp.sum(by_logit * scaled)

  parts, _, width = hidden.shape
  layout = "tied_gradient" if tied else "vocabulary"
  shards = _tensor_shards(head.shape[0]) if tied else 1
  # Zeros that XLA does not know beforehand: it would keep one more array of them all the time.
  zero = jnp.minimum(chunks, 0).astype(jnp.float32)
  # A sum per part: added up over devices once, behind the loop.
  zeros = (
    constrain(jnp.zeros((*order.shape, width), jnp.float32), "rows"),
    constrain(jnp.broadcast_to(zero, (parts, *head.shape)), layout),
    jnp.zeros_like(temperature),
  )
  by_state, by_head, by_temperature = jax.lax.fori_loop(0, chunks, add, zeros)
  return (
    _unpack(by_state, mask).astype(hidden.dtype),
    by_head.sum(axis=0).astype(head.dtype),
    None,
    None,
    by_temperature,
  )


_packed.defvjp(_forward, _backward)


def _einsum(equation: str, *operands: jax.Array) -> jax.Array:
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _weights(head: jax.Array, hidden: jax.Array, tied: bool) -> jax.Array:
  """In the type of `hidden`, once for all chunks."""
  return constrain(head.astype(hidden.dtype), "tied_head" if tied else "head")


def _logits(states: jax.Array, weights: jax.Array, tied: bool) -> jax.Array:
  return constrain(project(states, weights, tied), "vocabulary")


def _tensor_shards(size: int) -> int:
  """Into how many parts `tensor` shares out a dimension."""
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else mesh.shape["tensor"]
  return shards if size % shards == 0 else 1


def _add_products(sums: jax.Array, rows: jax.Array, columns: jax.Array, shards: int) -> jax.Array:
  """[S, R, K] + the sum over C of rows [S, C, R] times columns [S, C, K].

  A block of rows at a time, so that nothing else has the size of `sums`: of every one of the
  `shards` that share out R.
  """
  parts, count, width = sums.shape
  shape, own = sums.shape, count // shards
  sums = sums.reshape(parts, shards, own, width)
  rows = rows.reshape(*rows.shape[:2], shards, own)
  block = min(max(_BLOCK // width // _TILE, 1) * _TILE, own)

  def add(i: jax.Array, sums: jax.Array) -> jax.Array:
    start = jnp.minimum(i * block, own - block)  # the last block begins within the one in front
    some = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=3)
    some = jnp.where(start + jnp.arange(block) < i * block, 0.0, some)
    new = _einsum("scgr,sck->sgrk", some, columns)
    new += jax.lax.dynamic_slice_in_dim(sums, start, block, axis=2)
    return jax.lax.dynamic_update_slice_in_dim(sums, new, start, axis=2)

  return jax.lax.fori_loop(0, -(-own // block), add, sums).reshape(shape)


def _order(mask: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
  """How many chunks hold a masked position, and positions i32[S, chunks * C], masked ones first.

  What is left over is filled up with the last masked position, so that nothing outside the
  mask is looked at.
  """
  positions = mask.shape[1]
  count = jnp.sum(mask, axis=1)
  slots = jnp.arange(-(-positions // chunk) * chunk)
  front = jnp.argsort(~mask, axis=1, stable=True)
  slots = jnp.clip(jnp.minimum(slots, count[:, None] - 1), 0)
  return -(-jnp.max(count) // chunk), jnp.take_along_axis(front, slots, axis=1)


def _unpack(packed: jax.Array, mask: jax.Array) -> jax.Array:
  """Values in packed order back to their positions, 0 outside the mask."""
  slot = jnp.clip(jnp.cumsum(mask, axis=1) - 1, 0)
  inside = mask.reshape(*mask.shape, *(1,) * (packed.ndim - 2))
  return jnp.where(inside, _take(packed, slot), 0.0)


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
  """x[s, at[s, c]] as [S, C, ...]."""
  at = at.reshape(*at.shape, *(1,) * (x.ndim - 2))
  return constrain(jnp.take_along_axis(x, at, axis=1), "rows")


def _slice(x: jax.Array, i: jax.Array, chunk: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _write(x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(x, part, i * part.shape[1], axis=1)
