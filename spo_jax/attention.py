"""Attention, with the kernel of each platform behind one function.

`dense` is the definition, and what runs on a CPU and where a TPU decodes. Over whole rows a TPU
runs Pallas splash attention and an NVIDIA GPU cuDNN's: neither makes an array of scores. A GPU
decodes with `flash_decode`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spo_jax.config import ConfigError
from spo_jax.flash_decode import flash_decode
from spo_jax.sharding import activation, constrain, on_one_device, platform
from spo_jax.structs import Trie

_HOME = {"splash": "tpu", "cudnn": "gpu"}  # the platform of each kernel

_LANES = 128  # splash attention takes lengths and blocks in multiples of it
_LARGEST_BLOCK = 512

_QUERIES = 128  # of a block of a pack, at most
_CAUSAL_QUERIES = 64  # of a block of a row, at least
_MOST_BLOCKS = 8  # of a row: each is compiled by itself

# What is small is kept where scores are computed once more.
_kept = functools.partial(checkpoint_name, name="attention")
_KEEP = jax.checkpoint_policies.save_only_these_names("attention")

Kernel = Callable[..., jax.Array]  # of q, keys, values and what else it needs of each row


class TrieBlocks(NamedTuple):
  """What each of n blocks of Q queries sees: the path to its first one, and what is its own.

  A slot in front of the block that one of its queries sees is still open where the block
  begins, so the first query sees it too: it is one of the fewer than R tokens in front of
  that one in its row.
  """

  slots: jax.Array  # i32[B, n, R + Q], those of the path by depth (-1: none), and its own
  seen: jax.Array  # bool[B, n, Q, R + Q], which of them each query sees


def causal_attention(
  q: jax.Array, keys: jax.Array, values: jax.Array, is_token: jax.Array, asked: str = "auto"
) -> jax.Array:
  """Every token of a row sees itself and the tokens in front of it.

  Rows are right-padded, so no token has padding in front of it: `dense` leaves padding out of
  what padding itself sees, the kernels do not. What comes out at padding is finite, and unused.

  Args:
    q: [B, T, N, H]; keys, values: [B, K, T, H], each for N / K heads; is_token: bool[B, T].
    asked: model.attention.
  Returns: [B, T, N, H].
  Raises: ConfigError where the kernel that was asked for cannot run.
  """
  kind = kernel_for(asked, q.dtype, q.shape[-1])
  if kind == "splash":
    return _on_every_device(splash, q, keys, values)
  if kind == "cudnn":
    return _on_every_device(cudnn, q, keys, values)
  return _causal_blocks(q, keys, values, is_token)


def _causal_blocks(
  q: jax.Array, keys: jax.Array, values: jax.Array, is_token: jax.Array
) -> jax.Array:
  """As `causal_attention`, blocks of queries with the keys in front of their end alone.

  Nearly half of all scores are not computed, and those of a block stay in a CPU's cache.
  """
  length = q.shape[1]
  block = max(_CAUSAL_QUERIES, -(-length // _MOST_BLOCKS))
  out = []
  for start in range(0, length, block):
    end = min(start + block, length)
    causal = jnp.arange(end) <= jnp.arange(start, end)[:, None]
    mask = causal[None] & is_token[:, None, :end]
    out.append(dense(q[:, start:end], keys[:, :, :end], values[:, :, :end], mask))
  return jnp.concatenate(out, axis=1)


def cache_attention(
  q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array, asked: str = "auto"
) -> jax.Array:
  """The query of every row sees the slots of its cache up to its own position.

  Args:
    q: [B, 1, N, H]; keys, values: [B, K, C, H]; positions: i32[B, 1] of the queries.
    asked: model.attention.
  Returns: [B, 1, N, H].
  """
  on_gpu = kernel_for(asked, q.dtype, q.shape[-1]) == "cudnn"
  if on_gpu and q.shape[-1].bit_count() == 1 and _copies(q, keys) == 1:
    return _on_every_device(flash_decode, q, keys, values, positions)
  seen = jnp.arange(keys.shape[2]) <= positions
  return dense(q, keys, values, seen[:, None])


def trie_blocks(trie: Trie) -> TrieBlocks:
  """The blocks of packs of T slots: once per forward pass, for all of its layers."""
  rows, length = trie.end.shape
  block = trie_keys(length, 0)
  count = -(-length // block)
  positions, end = (
    jnp.pad(x, ((0, 0), (0, count * block - length))) for x in (trie.positions, trie.end)
  )
  slots = jnp.arange(count * block).reshape(count, block)
  depths = jnp.arange(trie.row_tokens)
  # Depth first, what is on a path is the last token of its depth. Others there are, but closed.
  here = positions.reshape(rows, count, block, 1) == depths
  last = jnp.max(jnp.where(here, slots[..., None], -1), axis=2)
  path = jnp.pad(
    jax.lax.cummax(last, axis=1)[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=-1
  )
  path_end = jnp.where(path < 0, 0, take_slots(end, path.reshape(rows, -1)).reshape(path.shape))
  own_end = end.reshape(rows, count, 1, block)
  on_path = slots[..., None] < path_end[:, :, None]
  own = (slots[:, None, :] <= slots[..., None]) & (slots[..., None] < own_end)
  mine = jnp.broadcast_to(slots, (rows, count, block))
  return TrieBlocks(*(jnp.concatenate(x, axis=-1) for x in ((path, mine), (on_path, own))))


def trie_keys(length: int, row_tokens: int) -> int:
  """With how many keys each query of a pack is compared: those of a path and of a block."""
  return row_tokens + min(_QUERIES, length)


def trie_attention(
  q: jax.Array, keys: jax.Array, values: jax.Array, blocks: TrieBlocks
) -> jax.Array:
  """Every token of a pack sees itself and what is in front of it in its row; on all platforms.

  Args:
    q: [B, T, N, H]; keys, values: [B, K, T, H].
  Returns: [B, T, N, H].
  """
  rows, length, heads, width = q.shape
  count, block = blocks.seen.shape[1:3]
  q = jnp.pad(q, ((0, 0), (0, count * block - length), (0, 0), (0, 0)))
  by_block = q.reshape(rows, count, block, heads, width)
  # What blocks find is added up by the loop, in float32. It is gathered head by head, which a CPU
  # does several times faster than all heads of a slot at once.
  anywhere, gather = (_exact(keys), _exact(values)), jax.vmap(take_slots)

  # Keys and scores of one block at a time, once more in the backward pass.
  @functools.partial(jax.checkpoint, policy=_KEEP)
  def attend(inputs: tuple[jax.Array, ...]) -> jax.Array:
    q, slots, seen = inputs
    slots = jnp.broadcast_to(slots[:, None], (*keys.shape[:2], slots.shape[1]))
    seen_keys, seen_values = (
      constrain(gather(x, slots).astype(keys.dtype), "cache") for x in anywhere
    )
    return constrain(dense(constrain(q, "heads"), seen_keys, seen_values, seen), "heads")

  out = jax.lax.map(attend, tuple(jnp.moveaxis(x, 1, 0) for x in (by_block, *blocks)))
  return jnp.moveaxis(out, 0, 1).reshape(rows, -1, heads, width)[:, :length]


def take_slots(x: jax.Array, slots: jax.Array) -> jax.Array:
  """Row b of [B, L, ...] at slots[b]: i32[B, M]; what lies outside is taken from the ends.

  Gradients of a slot that is taken several times are added up in float32.
  """
  take = jax.vmap(lambda row, at: jnp.take(row, at, axis=0, mode="clip"))
  return take(_exact(x), slots).astype(x.dtype)


def _exact(x: jax.Array) -> jax.Array:
  """In a type in which many gradients can be added up."""
  return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def dense(q: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> jax.Array:
  """Grouped-query attention with float32 softmax.

  Weights are divided by their sum when the values are added up, which are fewer.

  Args:
    q: [B, T, N, H]; keys, values: [B, K, C, H]; mask: bool[B, T, C], True where seen.
  Returns: [B, T, N, H].
  """
  b, t, n, h = q.shape
  k, c = keys.shape[1:3]
  # The M queries of each head of keys in one dimension: nothing large is in another order.
  by_head = q.swapaxes(1, 2).reshape(b, k, -1, h)
  scores = (_scores_of_few if t == 1 else _scores)(by_head, keys)
  scores = scores.reshape(b, k, -1, t, c) * h**-0.5
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  top = _kept(jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
  weights = jnp.exp(scores - top).reshape(b, k, -1, c)
  out = jnp.einsum(
    "bkmc,bkch->bkmh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
  )
  out = _kept(out) / _kept(jnp.sum(weights, axis=-1, keepdims=True))
  return out.astype(values.dtype).reshape(b, n, t, h).swapaxes(1, 2)


def _scores(q: jax.Array, keys: jax.Array) -> jax.Array:
  """[B, K, M, H] times [B, K, C, H]: f32[B, K, M, C]."""
  return jnp.einsum("bkmh,bkch->bkmc", q, keys, preferred_element_type=jnp.float32)


def _scores_of_few(q: jax.Array, keys: jax.Array) -> jax.Array:
  """As `_scores` of one token; a CPU multiplies many keys with few queries faster than these
  with those, and XLA, where nothing bars it, turns the product over."""

  def turned(q: jax.Array, keys: jax.Array) -> jax.Array:
    scores = jnp.einsum("bkch,bkmh->bkcm", keys, q, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(scores).swapaxes(2, 3)

  return jax.lax.platform_dependent(q, keys, cpu=turned, default=_scores)


def splash(
  q: jax.Array, keys: jax.Array, values: jax.Array, interpret: bool = False
) -> jax.Array:
  """Causal attention of one TPU, block by block: q [B, T, N, H], keys [B, K, T, H].

  Any length will do: rows are filled up to a multiple of 128. `interpret` runs it elsewhere,
  slowly.
  """
  # Pallas takes a second to load, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as pallas

  length, heads, width = q.shape[1:]
  filled = -(-length // _LANES) * _LANES
  block = max(b for b in range(_LANES, _LARGEST_BLOCK + 1, _LANES) if filled % b == 0)
  kernel = pallas.make_splash_mha_single_device(
    pallas.MultiHeadMask([pallas.CausalMask((filled, filled))] * heads),
    block_sizes=pallas.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
      block_kv_dq=block,
    ),
    interpret=interpret,
  )  # fmt: skip
  scaled = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
  inputs = (scaled.swapaxes(1, 2), keys, values)
  padding = ((0, 0), (0, 0), (0, filled - length), (0, 0))
  out = jax.vmap(kernel)(*(jnp.pad(x, padding) for x in inputs))
  return out[:, :, :length].swapaxes(1, 2)


def cudnn(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
  """Causal attention of one NVIDIA GPU: q [B, T, N, H], keys [B, K, T, H], in half precision.

  cuDNN has gradients for rows of even length only: others are filled up, at the end.
  """
  length = q.shape[1]
  inputs = (q, keys.swapaxes(1, 2), values.swapaxes(1, 2))
  even = (jnp.pad(x, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for x in inputs)
  return jax.nn.dot_product_attention(*even, is_causal=True, implementation="cudnn")[:, :length]


def attention_dtype(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
  """Of queries, keys, values and what is kept of them, where layers compute in `dtype`.

  A CPU is fast with bfloat16 in products of parameters alone: it turns a whole cache into float32
  and back to store one token.
  """
  return jnp.float32 if platform() == "cpu" else dtype


def kernel_for(asked: str, dtype: jax.typing.DTypeLike, width: int) -> str:
  """Which of xla, splash and cudnn a program runs with; `auto` leaves it to the platform.

  Raises: ConfigError where the kernel that was asked for does not run there, or not so.
  """
  here = platform()
  half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  known_to_cudnn = half and width % 8 == 0 and width <= 128
  if asked == "auto":
    return "splash" if here == "tpu" else (
      "cudnn" if here == "gpu" and known_to_cudnn else "xla"
    )  # fmt: skip
  if (home := _HOME.get(asked, here)) != here:
    raise ConfigError(
      f"model.attention={asked} runs on a {home}, and the devices are {here}. Set it to auto."
    )
  if asked == "cudnn" and not known_to_cudnn:
    raise ConfigError(
      f"model.attention=cudnn takes bfloat16 and heads of 8, 16 ... 128 channels, not {dtype} and "
      f"{width}. Set it to auto."
    )
  return asked


def _copies(q: jax.Array, keys: jax.Array) -> int:
  """How often keys are copied, so that `tensor` divides their heads as it does those of `q`."""
  mesh = jax.sharding.get_abstract_mesh()
  heads, group, shards = keys.shape[1], q.shape[2] // keys.shape[1], mesh.shape.get("tensor", 1)
  return next((c for c in range(1, group + 1) if not (group % c or heads * c % shards)), 1)


def _on_every_device(
  kernel: Kernel, q: jax.Array, keys: jax.Array, values: jax.Array, *of_rows: jax.Array
) -> jax.Array:
  """Each device runs the kernel on its own rows and heads: the partitioner cannot look inside."""
  if on_one_device():
    return kernel(q, keys, values, *of_rows)
  mesh = jax.sharding.get_abstract_mesh()
  if (copies := _copies(q, keys)) > 1:
    keys, values = (jnp.repeat(x, copies, axis=1) for x in (keys, values))
  heads = activation("heads", q.shape, mesh).spec
  cached = activation("cache", keys.shape, mesh).spec
  rows = jax.sharding.PartitionSpec(heads[0])
  return jax.shard_map(
    kernel, in_specs=(heads, cached, cached, *(rows for _ in of_rows)), out_specs=heads,
    check_vma=False,
  )(q, keys, values, *of_rows)  # fmt: skip
