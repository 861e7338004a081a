"""Packs train as their rows do: same loss, same gradient, each token of a trie once."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from programs import KEEP_GRADIENT, arrays_in

from spo_jax import attention, head, model
from spo_jax.compiles import CompileCount
from spo_jax.config import KLConfig, TrainConfig
from spo_jax.packing import EdgeBuffer, edge_rows, optimiser_batches, tree_edges
from spo_jax.structs import Prompts, RolloutTree, TrainRows, Trie
from spo_jax.update import init_state, policy_update

CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=1)
LP, M, WIDTH = 5, 4, 48  # tokens of a prompt and of a level, slots of a pack
L = LP + 3 * M


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
  """What is tested are equations, not XLA's optimisations."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def tree_rows(trees=2, threshold=None, seed=0):
  """Edges of 2-2-3 trees over three words, so that siblings often agree; some end early."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, LP + 1, trees).astype(np.int32)
  prompts = Prompts(
    rng.integers(0, 3, (trees, LP), np.int32), lengths, np.arange(trees), (None,) * trees
  )
  branches, levels, alive = (2, 2, 3), [], np.ones((trees, 1), bool)
  for branch in branches:
    valid = np.repeat(alive, branch, axis=1)
    tokens = rng.integers(0, 3, (*valid.shape, M), np.int32)
    tokens[:, 1::2] = tokens[:, ::2][:, : tokens[:, 1::2].shape[1]]  # every other one a twin
    finished = rng.random(valid.shape) < 0.3
    own = np.where(finished, rng.integers(1, M, valid.shape), M).astype(np.int32)
    logprobs = rng.normal(-1.5, 0.5, tokens.shape).astype(np.float32)
    levels.append((tokens, np.minimum(logprobs, 0), own, finished, valid))
    alive = valid & ~finished
  columns = [tuple(x) for x in zip(*levels)]
  tree = RolloutTree(*columns, columns[1], branch_factors=branches)
  advantages = tuple(rng.normal(size=x.shape).astype(np.float32) for x in tree.valid)
  edges = tree_edges(prompts, tree, advantages, iteration=0)
  return edges, edge_rows(edges, threshold, len(edges.start))


def flat_rows(count=20, seed=0):
  """Responses to four questions, and masks with holes."""
  rng = np.random.default_rng(seed)
  question = rng.integers(0, 4, count)
  column = np.arange(L)
  prompts, own = rng.integers(0, 8, (4, L))[question], rng.integers(0, 8, (count, L))
  tokens = np.where(column < LP, prompts, own)
  is_token = column < rng.integers(LP + 1, L + 1, count)[:, None]
  mask = is_token & (column >= LP) & (rng.random((count, L)) < 0.5)
  mask[:, LP] = True
  random = (rng.normal(-2, 0.3, mask.shape), rng.normal(size=mask.shape))
  return TrainRows(tokens.astype(np.int32), is_token, mask, *(x.astype(np.float32) for x in random))


def drawn_rows():
  """An edge buffer's draw, with edges that occur twice."""
  buffer = EdgeBuffer(quota=5, max_age=3)
  buffer.add(tree_rows(4)[0])
  drawn = buffer.draw(24, 0, np.random.default_rng(0), repeat=True)
  return edge_rows(drawn, 0.3, 24)


def run(rows, train, pack_tokens, micro=3):
  """Gradient and metrics of one update over all of the rows."""
  (batch, used), = optimiser_batches(
    rows, len(rows.tokens), micro, 1, np.random.default_rng(0), pack_tokens
  )
  state = init_state(jax.tree.map(jnp.copy, tiny.params(CONFIG)), KEEP_GRADIENT)
  reference = tiny.params(CONFIG, 1) if train.kl.coefficient else None
  state, metrics = policy_update(
    CONFIG, train, KEEP_GRADIENT, state, reference, batch, jnp.int32(used), jnp.float32(0.6)
  )
  return state.opt_state, metrics


KL = TrainConfig(kl=KLConfig(0.7))
CASES = {  # rows, settings and which of the two heads
  "trees": (lambda: tree_rows(threshold=0.2)[1], KL, 0),
  "responses": (flat_rows, dataclasses.replace(KL, kl=KLConfig(0.7, "k1", "token_mean")), 512),
  "an edge buffer's draw": (drawn_rows, TrainConfig(whiten=False, remat="layer"), 512),
}


@pytest.mark.parametrize("name", CASES)
def test_packs_have_the_loss_and_the_gradient_of_their_rows(name, monkeypatch):
  make, train, vocabulary = CASES[name]
  monkeypatch.setattr(head, "SMALL_VOCABULARY", vocabulary)
  monkeypatch.setattr(attention, "_QUERIES", 16)  # a pack is three blocks
  jax.clear_caches()
  rows = make()
  (expected, metrics), (actual, others) = (run(rows, train, width) for width in (0, WIDTH))
  assert others.pop("tokens/trained") < 0.9 * metrics.pop("tokens/trained")
  scale = float(optax.tree.norm(expected))
  assert scale > 0.1
  jax.tree.map(
    partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * max(1, scale)), actual, expected
  )
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), others, metrics)


def test_updates_of_all_draws_are_one_program():
  rows, rng = tree_rows(6)[1], np.random.default_rng(0)
  state = init_state(jax.tree.map(jnp.copy, tiny.params(CONFIG)), KEEP_GRADIENT)
  with CompileCount() as compiles:
    for batch, used in optimiser_batches(rows, 12, 2, 2, rng, WIDTH):
      inputs = (None, batch, jnp.int32(used), jnp.float32(1))
      state, _ = policy_update(CONFIG, TrainConfig(), KEEP_GRADIENT, state, *inputs)
  assert state.step > 6
  assert len(compiles.programs) == 1


def test_a_long_pack_never_makes_an_array_of_all_pairs_of_its_slots():
  """The largest says for each slot what it sees, of a path and of its own block."""
  rows, length, path = 2, 8192, 256
  column = partial(jax.ShapeDtypeStruct, (1, rows, length))
  numbers, slots = column(jnp.float32), column(jnp.int32)
  trie = Trie(slots, slots, slots, jax.ShapeDtypeStruct((1, rows), jnp.int32), path)
  batch = TrainRows(slots, column(bool), column(bool), numbers, numbers, trie)
  params = jax.eval_shape(partial(model.init_params, CONFIG), jax.random.key(0))
  state = jax.eval_shape(partial(init_state, optimizer=KEEP_GRADIENT), params)
  inputs = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
  traced = policy_update.trace(CONFIG, KL, KEEP_GRADIENT, state, params, batch, *inputs)
  sizes = [array.size for array in arrays_in(traced.jaxpr.jaxpr) if hasattr(array, "size")]
  assert max(sizes) == rows * length * (path + 128) < rows * length**2 / 20


def test_gradients_of_a_slot_that_many_others_see_are_added_up_in_float32():
  """In bfloat16 a sum of ones stays at 256."""
  x, slots = jnp.ones((1, 2, 1), jnp.bfloat16), jnp.ones((1, 1000), jnp.int32)
  total = jax.grad(lambda x: attention.take_slots(x, slots).astype(jnp.float32).sum())(x)
  assert total.dtype == jnp.bfloat16
  np.testing.assert_array_equal(total.ravel(), [0, 1000])
