from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import on

from spo_jax import model, sampler
from spo_jax.structs import KVCache

B, L = 4, 7  # one shape for all drawn examples: one compilation per architecture

CONFIGS = {
  f"{name}-{'tied' if tied else 'untied'}-{kv_heads}kv": dataclasses.replace(
    config, tie_embeddings=tied, num_kv_heads=kv_heads
  )
  for name, config in [("llama", tiny.LLAMA), ("qwen2", tiny.QWEN2), ("qwen3", tiny.QWEN3)]
  for tied, kv_heads in [(True, 2), (False, 1), (True, 4)]
} | {"llama3.1": tiny.LLAMA31, "linear": tiny.LINEAR}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
few = settings(deadline=None, max_examples=8)
seeds = st.integers(0, 2**32 - 1)


def batch(seed):
  """Right-padded rows of at least one token, and their mask."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, L + 1, B)
  lengths[0] = L
  return rng.integers(0, tiny.VOCAB, (B, L)), np.arange(L) < lengths[:, None]


def forward(config, tokens, mask):
  return np.asarray(tiny.logits(config, tiny.params(config), tokens, mask))


@every_config
def test_logits_equal_a_forward_in_numpy(config):
  tokens, mask = batch(0)
  reference = tiny.reference_logits(config, tiny.params(config), tokens)
  assert reference.std() > 0.5  # a flat softmax would agree with anything
  np.testing.assert_allclose(
    forward(config, tokens, mask)[mask], reference[mask], rtol=1e-4, atol=1e-4
  )


@every_config
@few
@given(seed=seeds)
def test_padding_does_not_change_logits(config, seed):
  tokens, mask = batch(seed)
  full = forward(config, tokens, mask)
  garbage = np.random.default_rng(seed + 1).integers(0, tiny.VOCAB, (B, L))
  polluted = forward(config, np.where(mask, tokens, garbage), mask)
  np.testing.assert_array_equal(polluted[mask], full[mask])
  cut = mask & (np.arange(L) < 3)  # the same rows with their tails declared padding
  np.testing.assert_allclose(forward(config, tokens, cut)[cut], full[cut], atol=1e-5)


@every_config
def test_rows_do_not_know_their_batch(config):
  tokens, mask = batch(1)
  full = forward(config, tokens, mask)
  order = np.array([2, 0, 3, 1])
  np.testing.assert_allclose(
    forward(config, tokens[order], mask[order])[mask[order]], full[order][mask[order]], atol=1e-5
  )
  strangers, their_mask = batch(2)
  strangers[1], their_mask[1] = tokens[1], mask[1]
  mates = forward(config, strangers, their_mask)
  np.testing.assert_allclose(mates[1][mask[1]], full[1][mask[1]], atol=1e-5)


@every_config
def test_a_token_changes_no_logits_before_it(config):
  tokens, _ = batch(3)
  mask = np.ones((B, L), bool)
  full = forward(config, tokens, mask)
  for t in range(L):
    changed = tokens.copy()
    changed[:, t] = (tokens[:, t] + 1) % tiny.VOCAB
    other = forward(config, changed, mask)
    np.testing.assert_array_equal(other[:, :t], full[:, :t])
    assert np.all(np.abs(other[:, t:] - full[:, t:]).max(-1) > 1e-4)  # and every one behind it


@every_config
def test_rows_of_padding_have_finite_logits(config):
  tokens, mask = batch(4)
  mask[2:] = False
  out = forward(config, tokens, mask)
  assert out.dtype == np.float32
  assert out.shape == (B, L, tiny.VOCAB)
  assert np.isfinite(out).all()


@every_config
def test_parameters_are_counted_as_the_papers_count_them(config):
  embed, hidden = config.hidden_size, config.intermediate_size
  width = config.head_dim or embed // config.num_heads
  qkv = (config.num_heads + 2 * config.num_kv_heads) * width
  attention = (embed + config.qkv_bias) * qkv
  attention += (config.num_heads * width + config.o_bias) * embed
  mlp = 3 * embed * hidden + config.mlp_bias * (2 * hidden + embed)
  layer = attention + 2 * width * config.qk_norm + mlp + 2 * embed
  tables = 1 if config.tie_embeddings else 2
  expected = tables * config.vocab_size * embed + config.num_layers * layer + embed
  assert model.count_params(config) == expected
  assert sum(x.size for x in jax.tree.leaves(tiny.params(config))) == expected


def test_fresh_parameters_depend_on_the_key_and_are_float32():
  config = dataclasses.replace(tiny.CONFIG, num_layers=1)
  init = jax.jit(model.init_params, static_argnums=0)
  one, same, other = (init(config, jax.random.key(k)) for k in (0, 0, 1))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(one))
  jax.tree.map(np.testing.assert_array_equal, one, same)
  matrices = [(x, y) for x, y in zip(*map(jax.tree.leaves, (one, other))) if x.ndim > 1]
  assert len(matrices) == 2 + 7
  assert all((np.asarray(x) != y).mean() > 0.99 for x, y in matrices)


def test_matrices_alone_are_rounded_once():
  params = tiny.params()
  assert model.rounded(tiny.CONFIG, params) is params  # float32 is what they are
  half = dataclasses.replace(tiny.CONFIG, compute_dtype="bfloat16")
  rounded = model.rounded(half, params)
  assert model.rounded(half, rounded) is rounded
  for one, other in zip(jax.tree.leaves(rounded), jax.tree.leaves(params)):
    assert one.dtype == ("bfloat16" if one.ndim > 1 else "float32")
    np.testing.assert_array_equal(one, other.astype(one.dtype))


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
  config = CONFIGS["qwen3-tied-2kv"]
  half = dataclasses.replace(config, compute_dtype="bfloat16")
  fresh = jax.eval_shape(lambda: model.init_params(half, jax.random.key(0)))
  assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}

  tokens, mask = batch(5)
  params = tiny.params(config)
  hidden = jax.eval_shape(lambda: model.hidden_states(half, params, tokens, mask))
  assert hidden.dtype == jnp.bfloat16
  rough, exact = tiny.logits(half, params, tokens, mask), forward(config, tokens, mask)
  assert rough.dtype == jnp.float32
  error = np.abs(np.asarray(rough) - exact)[mask].mean() / np.abs(exact)[mask].mean()
  assert 1e-4 < error < 0.05


def test_a_token_behind_the_last_slot_of_a_cache_is_dropped():
  """Rows of 0, 2, 3 and 4 tokens in 3 slots: each writes its own next one, or nothing."""
  config, rng = CONFIGS["qwen2-untied-1kv"], np.random.default_rng(0)
  shape = (B, config.num_kv_heads, 3, model.head_width(config))
  layers = tuple(rng.normal(size=shape).astype(np.float32) for _ in range(config.num_layers))
  lengths = np.array([0, 2, 3, 4])
  cache = KVCache(layers, layers, jnp.array(lengths))
  _, new = jax.jit(model.decode_step, static_argnums=0)(
    config, tiny.params(config), jnp.zeros(B, jnp.int32), cache
  )
  is_written = np.arange(3) == lengths[:, None]
  for before, made in zip(layers * 2, (*new.keys, *new.values)):
    changed = np.asarray(made) != before
    np.testing.assert_array_equal(changed.all(axis=(1, 3)), is_written)
    np.testing.assert_array_equal(changed.any(axis=(1, 3)), is_written)


def test_the_rotary_embedding_is_computed_once_for_all_layers_and_heads():
  """Cosines of a compiled step of decoding: XLA would have two a layer, those of q and of k."""
  config = dataclasses.replace(tiny.QWEN2, num_layers=3)
  params = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
  slots = jax.ShapeDtypeStruct((4, config.num_kv_heads, 16, model.head_width(config)), jnp.float32)
  rows = jax.ShapeDtypeStruct((4,), jnp.int32)
  cache = KVCache((slots,) * 3, (slots,) * 3, rows)
  step = jax.jit(model.decode_step, static_argnums=0).lower(config, params, rows, cache)
  assert step.compile().as_text().count(" cosine(") <= 1


def test_a_cpu_stores_a_token_without_converting_its_cache():
  """In bfloat16 XLA would turn all of it into float32 for one vector, and back."""
  half = dataclasses.replace(tiny.CONFIG, compute_dtype="bfloat16")
  slots = sampler.empty_store(half, B, 16)
  cache, rows = KVCache(slots.keys, slots.values, jnp.zeros(B, jnp.int32)), jnp.zeros(B, jnp.int32)
  step = jax.jit(model.decode_step, static_argnums=0).lower(half, tiny.params(), rows, cache)
  shape = ",".join(map(str, slots.keys[0].shape))
  text = step.compile().as_text()
  assert f"f32[{shape}]" in text and f"bf16[{shape}]" not in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_of_bfloat16_lie_row_by_row_on_a_cpu(dtype):
  """Transposed for a gradient, they would miss its units; gradients stay what they are."""
  rng = np.random.default_rng(0)
  x, kernel, g = (jnp.asarray(rng.normal(size=s), dtype) for s in ((2, 3, 8), (8, 4), (2, 3, 4)))
  gradients = jax.jit(lambda x, kernel, g: jax.vjp(model._product, x, kernel)[1](g))
  asked = gradients.lower(x, kernel, g).as_text().count("@LayoutConstraint")
  assert asked >= 4 if dtype == "bfloat16" else asked == 0  # two operands of two products
  with on("cpu", (2, 1, 1)):  # a partitioner would gather what a layout is asked of
    assert "LayoutConstraint" not in gradients.lower(x, kernel, g).as_text()
  exact = [np.asarray(z, np.float32) for z in (x, kernel, g)]
  by_x, by_kernel = exact[2] @ exact[1].T, np.einsum("bti,bto->io", exact[0], exact[2])
  for found, expected in zip(gradients(x, kernel, g), (by_x, by_kernel)):
    np.testing.assert_allclose(
      found.astype(jnp.float32), expected, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-5
    )


@pytest.mark.parametrize("store", ["_store", "_store_vectors"])
def test_vectors_are_stored_in_their_slots(store):
  """Rows of 0, 2, 3 and 9 tokens in 3 slots, as a loop writes them; the last two have none."""
  rng = np.random.default_rng(0)
  old, new = rng.normal(size=(B, 2, 3, 5)), rng.normal(size=(B, 1, 2, 5))
  slots = np.array([[0], [2], [3], [9]])
  expected = old.copy()
  for row in range(2):
    expected[row, :, slots[row, 0]] = new[row, 0]
  old, new, slots = map(jnp.asarray, (old, new, slots))
  arguments = (old, slots, new) if store == "_store" else ((slots, new.swapaxes(1, 2)), old)
  np.testing.assert_array_equal(getattr(model, store)(*arguments), expected.astype(np.float32))
