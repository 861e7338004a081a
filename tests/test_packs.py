from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import arrays_in

from spo_jax import attention
from spo_jax.attention import trie_blocks
from spo_jax.layout import before, concatenate, select
from spo_jax.packing import optimiser_batches
from spo_jax.packs import most_packs, pack
from spo_jax.structs import TrainRows, Trie

L = 7
many = settings(max_examples=60)
seeds = st.integers(0, 2**32 - 1)


def drawn_rows(rng, count, words=2):
  """Rows of few words, so that they often begin alike; each loss has a name of its own."""
  length = rng.integers(2, L + 1, count)
  is_token = before(length, L)
  mask = is_token & (np.arange(L) > 0) & (rng.random((count, L)) < rng.random())
  mask[np.arange(count), rng.integers(1, length)] = True
  name = np.arange(count * L, dtype=np.float32).reshape(count, L)
  tokens = np.where(is_token, rng.integers(0, words, (count, L)), 0).astype(np.int32)
  return TrainRows(tokens, is_token, mask, np.where(mask, name, 0), np.where(mask, -name - 1, 0))


def losses_of_rows(rows):
  """{name: (advantage, tokens in front of it, its own token)} of every loss."""
  return {
    rows.logprobs[b, t]: (rows.advantages[b, t], rows.tokens[b, : t + 1].tolist())
    for b, t in np.argwhere(rows.mask)
  }


def path_of(packs, p, slot):
  """The slots of a token and of those in front of it, from the first one on."""
  path = [slot]
  while packs.trie.positions[p, path[0]]:
    path.insert(0, packs.trie.previous[p, path[0]])
    assert path[0] < path[1]
  return path


@given(seeds, st.integers(1, 30), st.integers(L, 3 * L))
@many
def test_every_loss_has_one_slot_and_sees_what_is_in_front_of_it_in_its_row(seed, count, width):
  rng = np.random.default_rng(seed)
  rows = drawn_rows(rng, count)
  packs = pack(rows, width).make()
  trie, slots = packs.trie, np.arange(width)
  assert packs.tokens.shape[1] == width and len(packs.tokens) <= most_packs(count, L, width)
  assert trie.samples.sum() == count
  found = {}
  for p in range(len(packs.tokens)):
    real = int(packs.is_token[p].sum())
    assert packs.is_token[p, :real].all()
    for x in jax.tree.leaves(packs):
      assert x.ndim == 1 or not x[p, real:].any()  # padding is 0, and its end too
    for t in range(real):
      path = path_of(packs, p, t)
      assert trie.positions[p, t] == len(path) - 1
      np.testing.assert_array_equal(np.flatnonzero((slots <= t) & (t < trie.end[p])), path)
      assert packs.mask[p, t : trie.end[p, t]].any()  # some loss needs it
      if packs.mask[p, t]:
        name = packs.logprobs[p, t]
        assert name not in found
        found[name] = (packs.advantages[p, t], packs.tokens[p, path].tolist())
  assert found == losses_of_rows(rows)


blocks_of = jax.jit(trie_blocks)


@given(seeds)
@many
def test_a_block_of_queries_finds_all_it_sees_on_one_path_and_in_itself(seed):
  rng = np.random.default_rng(seed)
  width = 2 * L + 3
  packs = pack(drawn_rows(rng, 8), width).make()
  trie = jax.tree.map(lambda x: x[-1:], packs.trie)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(attention, "_QUERIES", 5)  # read where it is traced; the last block has 2 slots
    slots, seen = jax.device_get(blocks_of(trie))
  count, block = seen.shape[1:3]
  assert (count, block, slots.shape[2]) == (4, 5, L + 5)
  for t in range(width):
    at = t // block
    visible = np.flatnonzero((np.arange(width) <= t) & (t < trie.end[0]))
    assert sorted(slots[0, at, seen[0, at, t % block]]) == visible.tolist()


# How much is computed.


def tree_rows(rng, branches, segment, prompt):
  """Every edge of a full tree: all of its tokens are trained on."""
  paths, found = [rng.integers(0, 5000, prompt)], []
  for branch in branches:
    paths = [np.append(x, rng.integers(0, 5000, segment)) for x in paths for _ in range(branch)]
    found += [(x, len(x) - segment) for x in paths]
  return rows_of(found, prompt + len(branches) * segment)


def rows_of(found, width):
  tokens, mask = np.zeros((len(found), width), np.int32), np.zeros((len(found), width), bool)
  for b, (row, start) in enumerate(found):
    tokens[b, : len(row)] = row
    mask[b, start : len(row)] = True
  ones = mask.astype(np.float32)
  return TrainRows(tokens, before(np.array([len(x) for x, _ in found]), width), mask, ones, ones)


def responses(rng, questions, samples, prompt=60, longest=1000):
  """Geometric lengths, ten times as long at most as in the middle."""
  found = []
  for _ in range(questions):
    question = rng.integers(0, 5000, rng.integers(prompt // 2, prompt + 1))
    lengths = np.minimum(rng.geometric(1 - 0.5 ** (10 / longest), samples), longest)
    found += [(np.append(question, rng.integers(0, 5000, n)), len(question)) for n in lengths]
  return rows_of(found, prompt + longest)


@pytest.mark.parametrize(("segment", "width"), [(30, 8192), (30, 2048), (100, 8192)])
def test_a_full_tree_trains_each_of_its_tokens_once(segment, width):
  rows = tree_rows(np.random.default_rng(0), (6, 6, 6), segment, 64)
  unique = 64 + (6 + 36 + 216) * segment
  trained = pack(rows, width).make().is_token.sum()
  assert unique <= trained <= 1.05 * unique
  assert rows.is_token.sum() > 3.4 * unique


@pytest.mark.parametrize(("questions", "samples"), [(64, 8), (128, 2), (256, 1)])
def test_packs_of_responses_are_full_to_nine_tenths(questions, samples):
  rows = responses(np.random.default_rng(0), questions, samples)
  for width in (rows.tokens.shape[1], 2048, 4096):
    packs = pack(rows, width).make()
    assert packs.is_token.mean() >= 0.9, width
    assert packs.is_token.sum() <= rows.is_token.sum()


def test_a_draw_of_edges_shares_the_prefixes_that_it_has():
  rng = np.random.default_rng(0)
  trees = [tree_rows(rng, (6, 6, 6), 100, 64) for _ in range(8)]
  drawn = [select(rows, rng.permutation(len(rows.tokens))[:32]) for rows in trees]
  rows = concatenate(drawn)
  packs = pack(select(rows, rng.permutation(len(rows.tokens))), 4096).make()
  lengths = rows.is_token.sum(axis=1)
  kept = {row[: i + 1].tobytes() for row, n in zip(rows.tokens, lengths) for i in range(n)}
  assert len(kept) < 0.55 * rows.is_token.sum()
  assert packs.is_token.sum() <= 1.05 * len(kept)
  assert packs.is_token.mean() >= 0.9


# Batches.


@given(seeds, st.integers(1, 20), st.sampled_from([(6, 2), (4, 4), (5, 3)]), st.integers(1, 2))
@many
def test_every_loss_is_trained_on_once_per_epoch_in_batches_of_one_shape(
  seed, count, sizes, epochs
):
  rng = np.random.default_rng(seed)
  rows, (batch_rows, micro_rows), width = drawn_rows(rng, count), sizes, 2 * L
  most = -(-most_packs(batch_rows, L, width) // micro_rows)
  batches = list(optimiser_batches(rows, batch_rows, micro_rows, epochs, rng, width))
  updates = -(-count // batch_rows)
  assert len(batches) == updates * epochs
  for epoch in range(epochs):
    names = []
    for batch, used in batches[epoch * updates :][:updates]:
      assert batch.tokens.shape == batch.trie.end.shape == (most, micro_rows, width)
      assert batch.trie.samples.shape == (most, micro_rows)
      assert batch.is_token.any(axis=(1, 2)).tolist() == [i < used for i in range(most)]
      names += batch.logprobs[batch.mask].tolist()
    assert sorted(names) == sorted(losses_of_rows(rows))


@pytest.mark.parametrize("width", [0, 2 * L])
def test_what_processes_make_of_a_batch_is_the_batch(width):
  """Each makes its own rows of every micro-batch, also where there are too few to go round."""
  rows = drawn_rows(np.random.default_rng(0), 9)

  def batches(own=None):
    return list(optimiser_batches(rows, 12, 4, 1, np.random.default_rng(1), width, own))

  ((whole, used),) = batches()
  for numbers in ([0], [1, 3], [2]):
    own = np.isin(np.arange(4), numbers)
    ((made, count),) = batches(own)
    assert count == used
    expected = [x[:, own] for x in jax.tree.leaves(whole)]
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(made), expected)


def test_rows_that_are_as_long_as_a_pack_have_one_each():
  rng = np.random.default_rng(0)
  rows = concatenate([tree_rows(rng, (1,), L - 2, 2) for _ in range(5)])
  packs = pack(rows, L).make()
  assert len(packs.tokens) == most_packs(5, L, L) == 5
  assert packs.is_token.all()


# Attention over the blocks of a pack.


def star(length):
  """A root that all others come from: each of them sees it and itself."""
  slots = jnp.arange(length)[None]
  end = jnp.where(slots == 0, length, slots + 1)
  return Trie((slots > 0).astype(jnp.int32), jnp.zeros_like(slots), end, jnp.int32([1]), 2)


def test_keys_of_one_block_at_a_time_forward_and_backward():
  """2048 slots, paths of 512 tokens: the keys of all 16 blocks would be five times as many."""
  length, path, width = 2048, 512, 6
  slots = jnp.zeros((1, length), jnp.int32)
  blocks = jax.eval_shape(trie_blocks, Trie(slots, slots, slots, jnp.int32([1]), path))
  array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  arguments = array((1, length, 2, width)), *(array((1, 2, length, width)),) * 2, blocks
  total = lambda *arguments: attention.trie_attention(*arguments).astype(jnp.float32).sum()
  jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*arguments).jaxpr
  sizes = {x.size for x in arrays_in(jaxpr) if x.shape[-1:] == (width,)}
  assert (path + 128) * 2 * width in sizes
  assert max(sizes) == length * 2 * width


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_key_that_many_blocks_see_are_added_up_in_float32(dtype, monkeypatch):
  """In bfloat16 a sum of twos, one of each block, stays at 512."""
  monkeypatch.setattr(attention, "_QUERIES", 4)
  length = 2048
  q, keys = jnp.zeros((1, length, 1, 2), dtype), jnp.zeros((1, 1, length, 2), dtype)
  total = lambda x: attention.trie_attention(q, x, x, trie_blocks(star(length))).sum()
  gradient = jax.jit(jax.grad(total))(keys)
  assert gradient.dtype == dtype
  expected = jnp.full(length, 0.5).at[0].set(1 + (length - 1) / 2)
  np.testing.assert_array_equal(gradient[0, 0, :, 0], expected.astype(dtype))
