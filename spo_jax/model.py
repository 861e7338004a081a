"""Decoder family as one Flax linen module: Llama, Mistral, Qwen2 and Qwen3 by its config.

Submodules are named as Hugging Face names them, so loading weights is a path rewrite
and a transpose. The key/value cache is an explicit struct, because rollouts fork it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from spo_jax.attention import (
  TrieBlocks,
  attention_dtype,
  cache_attention,
  causal_attention,
  trie_attention,
  trie_blocks,
)
from spo_jax.config import ConfigError, ModelConfig
from spo_jax.head import project
from spo_jax.sharding import constrain, on_shards, platform, row_major
from spo_jax.structs import KVCache, Trie

Params = Any  # nested dict of arrays

# Hugging Face's initializer_range. Wider projections would drown the embeddings at the start.
_INIT = nn.initializers.normal(0.02)

# Scores of attention are products with batch dimensions: L^2 of them are never kept.
_KEPT = {"layer": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class RMSNorm(nn.Module):
  """x / rms(x) * weight over the last axis, in float32 (arXiv:1910.07467)."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
    return (x32 * scale * weight).astype(x.dtype)


Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, f32[B, T, 1, H / 2] each


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
  """Radians per position of every pair of channels, f32[H / 2], as transformers computes them.

  `linear` slows all of them by the factor. `llama3` slows those that turn fewer than
  low_freq_factor times in the original context, keeps those that turn more than
  high_freq_factor times, and blends in between (arXiv:2407.21783).
  """
  width = head_width(config)
  exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  frequency = np.float32(1) / np.float32(config.rope_theta) ** exponent
  scaling = config.rope_scaling
  if scaling.kind == "none":
    return frequency
  slowed = frequency / np.float32(scaling.factor)
  if scaling.kind == "linear":
    return slowed
  if scaling.kind != "llama3":
    raise ConfigError(
      f"model.rope_scaling.kind={scaling.kind} is not one of none, linear, llama3."
    )
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  turns = scaling.original_max_position * frequency / np.float32(2 * np.pi)
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return ((1 - kept) * slowed + kept * frequency).astype(np.float32)


def rotation_at(config: ModelConfig, positions: jax.Array, most: int) -> Rotation:
  """By how much channels are turned at positions i32[B, T] below `most`, looked up in a table.

  Were they computed, XLA would do so in every layer, and for every head that is turned.
  """
  angles = jnp.arange(most, dtype=jnp.float32)[:, None] * inverse_frequencies(config)
  cos, sin = (
    jnp.take(table, positions, axis=0, mode="clip")[..., None, :]
    for table in (jnp.cos(angles), jnp.sin(angles))
  )
  return cos, sin


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
  """Rotary position embedding, the two-halves form of Llama (arXiv:2104.09864).

  Args:
    x: [B, T, heads, H].
  Returns: x turned, in its dtype.
  """
  cos, sin = rotation
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.astype(x.dtype)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[..., I] times [I, O]."""
  return _matmul(x, kernel)


def _product_backward(
  kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Over one dimension of tokens: a sum over two makes a CPU copy `g` into another order."""
  x, kernel = kept
  return _matmul(g, kernel.T), _matmul(x.reshape(-1, x.shape[-1]).T, g.reshape(-1, g.shape[-1]))


_product.defvjp(lambda x, kernel: (_matmul(x, kernel), (x, kernel)), _product_backward)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """The units that a CPU has for bfloat16 are left out unless both matrices lie row by row, and the
  result is float32."""
  if platform() != "cpu" or x.dtype != jnp.bfloat16:
    return x @ y
  wide = jnp.matmul(row_major(x), row_major(y), preferred_element_type=jnp.float32)
  return wide.astype(x.dtype)


def _dense(features: int, name: str, x: jax.Array, use_bias: bool = False) -> jax.Array:
  """A projection of the module that calls it, computed in the dtype of x."""
  return nn.Dense(
    features, use_bias=use_bias, dtype=x.dtype, kernel_init=_INIT, name=name,
    dot_general=lambda x, kernel, *_, **__: _product(x, kernel),
  )(x)  # fmt: skip


class Attention(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    rotation: Rotation,
    is_token: jax.Array,
    past: tuple[jax.Array, jax.Array] | None,
    blocks: TrieBlocks | None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """With `past` ([B, K, C, H] each) the new keys and values go into slot `positions`."""
    c = self.config
    width = head_width(c)

    def project(heads: int, name: str) -> jax.Array:
      out = _dense(heads * width, name, x, use_bias=c.qkv_bias)
      return constrain(out.reshape(*x.shape[:-1], heads, width), "heads")

    q = project(c.num_heads, "q_proj")
    k = project(c.num_kv_heads, "k_proj")
    v = project(c.num_kv_heads, "v_proj")
    if c.qk_norm:
      q, k = RMSNorm(c.norm_eps, name="q_norm")(q), RMSNorm(c.norm_eps, name="k_norm")(k)
    q, k, v = (x.astype(attention_dtype(x.dtype)) for x in (q, k, v))
    q, k = rotate(q, rotation), rotate(k, rotation)
    if past is None:
      keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    else:
      keys, values = (_store(old, positions, new) for old, new in zip(past, (k, v)))
    keys, values = constrain(keys, "cache"), constrain(values, "cache")
    if blocks is not None:
      out = trie_attention(q, keys, values, blocks)
    elif past is None:
      out = causal_attention(q, keys, values, is_token, c.attention)
    else:
      out = cache_attention(q, keys, values, positions, c.attention)
    out = constrain(out.astype(x.dtype), "heads").reshape(*x.shape[:-1], -1)
    return _dense(c.hidden_size, "o_proj", out, use_bias=c.o_bias), (keys, values)


def _store(old: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
  """[B, K, C, H] with [B, 1, K, H] in slots i32[B, 1].

  Slots past the capacity are dropped: rows that are done may point there.
  """
  return jax.lax.platform_dependent(
    old, slots, new,
    tpu=lambda old, slots, new: on_shards(_store_vectors, (slots, new.swapaxes(1, 2)), old),
    default=_store_rows,
  )  # fmt: skip


@jax.vmap
def _store_rows(old: jax.Array, slot: jax.Array, new: jax.Array) -> jax.Array:
  """Per row: [K, C, H] with [1, K, H] in slot i32[1]."""
  return old.at[:, slot[0]].set(new[0])


def _store_vectors(read: tuple[jax.Array, jax.Array], old: jax.Array) -> jax.Array:
  """[B, K, C, H] with `read`, slots i32[B, 1] and [B, K, 1, H] for them.

  A table of vectors is what the TPU compiler changes where it lies: for more dimensions it copies
  the whole cache into another layout and back. A CPU takes longer over so many small writes.
  """
  slots, new = read
  rows, heads, capacity, width = old.shape
  first = jnp.arange(rows * heads).reshape(rows, heads) * capacity
  at = jnp.where(slots < capacity, first + slots, old.size // width)
  table = old.reshape(-1, width).at[at.reshape(-1)].set(new.reshape(-1, width))
  return table.reshape(old.shape)


class MLP(nn.Module):
  """SwiGLU feed-forward (arXiv:2002.05202)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.config
    gate = nn.silu(_dense(c.intermediate_size, "gate_proj", x, use_bias=c.mlp_bias))
    up = _dense(c.intermediate_size, "up_proj", x, use_bias=c.mlp_bias)
    inner = constrain(gate * up, "channels")
    return _dense(c.hidden_size, "down_proj", inner, use_bias=c.mlp_bias)


class DecoderLayer(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    rotation: Rotation,
    is_token: jax.Array,
    past: tuple[jax.Array, jax.Array] | None,
    blocks: TrieBlocks | None,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    eps = self.config.norm_eps
    normed = RMSNorm(eps, name="input_layernorm")(x)
    out, present = Attention(self.config, name="self_attn")(
      normed, positions, rotation, is_token, past, blocks
    )
    x = constrain(x + out, "rows")
    normed = RMSNorm(eps, name="post_attention_layernorm")(x)
    return constrain(x + MLP(self.config, name="mlp")(normed), "rows"), present


class Decoder(nn.Module):
  """Token ids to final hidden states; `head.project` turns those into logits.

  `remat` says what of a layer is kept for a backward pass, the rest is computed again:
  everything (none), the layer's input and the outputs of its projections (dots), or its
  input alone (layer).
  """

  config: ModelConfig
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    is_token: jax.Array,
    cache: KVCache | None = None,
    trie: Trie | None = None,
  ) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]]:
    """One forward pass.

    Args:
      tokens: i32[B, T]; positions: the same or, for all rows, i32[1, T], below the capacity of the
        cache, the length of a row of `trie`, or T; is_token: bool[B, T].
    Returns: hidden [B, T, E] and per-layer (keys, values), each [B, K, C, H].
    """
    c = self.config
    embedding = self.param("embed_tokens", _INIT, (c.vocab_size, c.hidden_size), jnp.float32)
    if not c.tie_embeddings:
      self.param("lm_head", _INIT, (c.hidden_size, c.vocab_size), jnp.float32)
    x = constrain(embedding, "table")[constrain(tokens, "tokens")].astype(c.compute_dtype)
    x = constrain(constrain(x, "looked_up"), "rows")
    layer = DecoderLayer
    if self.remat != "none":
      layer = nn.remat(DecoderLayer, policy=_KEPT[self.remat])
    most = tokens.shape[1] if cache is None else cache.keys[0].shape[2]
    rotation = rotation_at(c, positions, most if trie is None else trie.row_tokens)
    presents = []
    blocks = None if trie is None else trie_blocks(trie)
    for i in range(c.num_layers):
      past = (cache.keys[i], cache.values[i]) if cache is not None else None
      x, present = layer(c, name=f"layers_{i}")(x, positions, rotation, is_token, past, blocks)
      presents.append(present)
    keys, values = zip(*presents)
    return RMSNorm(c.norm_eps, name="norm")(x), (keys, values)


def head_width(config: ModelConfig) -> int:
  return config.head_dim or config.hidden_size // config.num_heads


def head_weight(config: ModelConfig, params: Params) -> jax.Array:
  """The output projection as it is stored: [E, V], or the embedding [V, E] where it is tied."""
  return params["embed_tokens" if config.tie_embeddings else "lm_head"]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
  """Fresh float32 parameters: the same ones whatever kernel attends, and wherever it runs."""
  config, one = dataclasses.replace(config, attention="xla"), jnp.zeros((1, 1), jnp.int32)
  return Decoder(config).init(key, one, one, jnp.ones((1, 1), bool))["params"]


def rounded(config: ModelConfig, params: Params) -> Params:
  """Parameters with matrices in the type in which they are multiplied, for who does not train.

  Left to the loop of decoding, rounding takes more time than the products on a GPU.
  """
  if all(x.ndim < 2 or x.dtype == config.compute_dtype for x in jax.tree.leaves(params)):
    return params
  return jax.tree.map(lambda x: x.astype(config.compute_dtype) if x.ndim > 1 else x, params)


def count_params(config: ModelConfig) -> int:
  """Number of parameters, without making them."""
  shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _apply(config: ModelConfig, params: Params, *inputs: Any, remat: str = "none") -> Any:
  return Decoder(config, remat).apply({"params": params}, *inputs)


def _causal(
  config: ModelConfig, params: Params, tokens: jax.Array, mask: jax.Array, remat: str = "none"
) -> Any:
  """Forward over right-padded rows from position 0: hidden states, keys and values."""
  positions = jnp.arange(tokens.shape[1])[None]
  return _apply(config, params, tokens, positions, mask, remat=remat)


def hidden_states(
  config: ModelConfig,
  params: Params,
  tokens: jax.Array,
  mask: jax.Array,
  remat: str = "none",
  trie: Trie | None = None,
) -> jax.Array:
  """Full causal forward over right-padded rows, or packs: i32[B, L], bool[B, L] -> [B, L, E]."""
  if trie is not None:
    return _apply(config, params, tokens, trie.positions, mask, None, trie, remat=remat)[0]
  return _causal(config, params, tokens, mask, remat)[0]


def logits(config: ModelConfig, params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
  """Next-token logits f32[B, L, V] of right-padded rows; mask is True on real tokens."""
  hidden = hidden_states(config, params, tokens, mask)
  return project(hidden, head_weight(config, params), config.tie_embeddings)


def prefill(
  config: ModelConfig, params: Params, tokens: jax.Array, lengths: jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
  """Keys and values of right-padded rows, per layer [B, K, L, H]; those of padding mean nothing.

  Args:
    tokens: i32[B, L]; lengths: i32[B].
  """
  return _causal(config, params, tokens, jnp.arange(tokens.shape[1]) < lengths[:, None])[1]


def decode_step(
  config: ModelConfig, params: Params, token: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
  """Appends one token per row: i32[B] -> next-token logits f32[B, V] and the longer cache."""
  column, positions = token[:, None], cache.length[:, None]
  is_token = jnp.ones(column.shape, bool)
  hidden, (keys, values) = _apply(config, params, column, positions, is_token, cache)
  scores = project(hidden[:, 0], head_weight(config, params), config.tie_embeddings)
  return constrain(scores, "logits"), KVCache(keys=keys, values=values, length=cache.length + 1)
