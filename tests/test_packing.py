from __future__ import annotations

import itertools
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.config import TrainConfig
from spo_jax.packing import (
  EdgeBuffer,
  edge_rows,
  micro_batch_size,
  optimiser_batches,
  trajectory_rows,
  tree_edges,
)
from spo_jax.structs import Edges, Prompts, RolloutTree, Samples, TrainRows, Trajectories

P, LP, T = 3, 4, 6  # one width for all drawn examples
SHAPES = [((3,), (6,)), ((2, 2), (2, 4)), ((1, 2, 3), (1, 2, 3))]  # branch factors, widths
GARBAGE = 77  # stands wherever nothing may be read

many = settings(max_examples=40)
seeds = st.integers(0, 2**32 - 1)
thresholds = st.sampled_from([None, 0.3, 0.9, 1.0])


def garbled(x, lengths):
  """`x` with garbage behind the first `lengths` of its last axis."""
  inside = np.arange(x.shape[-1]) < lengths[..., None]
  return np.where(inside, x, np.nan if x.dtype == np.float32 else GARBAGE).astype(x.dtype)


def drawn_prompts(rng):
  lengths = rng.integers(1, LP + 1, P).astype(np.int32)
  tokens = garbled(rng.integers(1, 50, (P, LP), np.int32), lengths)
  return Prompts(tokens, lengths, rng.integers(0, 2**40, P), problems=(None,) * P)


def drawn_samples(rng, shape, width, least=0):
  lengths = rng.integers(least, width + 1, shape).astype(np.int32)
  # Some tokens are certain: p = 1 exactly.
  logprobs = -rng.exponential(0.7, (*shape, width)) * (rng.random((*shape, width)) < 0.8)
  return Samples(
    tokens=garbled(rng.integers(1, 50, (*shape, width), np.int32), lengths),
    logprobs=garbled(logprobs.astype(np.float32), lengths),
    lengths=lengths,
    finished=rng.random(shape) < 0.4,
  )


def drawn_tree(rng, branch_factors, widths):
  """Trees whose invalid nodes hold garbage, and advantages of which a third is 0."""
  levels, advantages, alive = [], [], np.ones((P, 1), bool)
  for branch, width in zip(branch_factors, widths):
    valid = np.repeat(alive, branch, axis=1)
    own = drawn_samples(rng, valid.shape, width, least=1)
    advantage = rng.normal(size=valid.shape) * (rng.random(valid.shape) < 0.7)
    advantages.append(np.where(valid, advantage, np.nan).astype(np.float32))
    levels.append((own.tokens, own.logprobs, own.lengths, own.finished, valid))
    alive = valid & ~own.finished
  columns = [tuple(column) for column in zip(*levels)]
  rewards = tuple(np.zeros_like(advantage) for advantage in advantages)
  return RolloutTree(*columns, rewards, branch_factors=branch_factors), tuple(advantages)


def by_hand(prompt, context, own, logprobs, advantage, threshold):
  """One training row, token by token: (token, is_token, mask, logprob, advantage)."""
  row = [(token, True, False, 0.0, 0.0) for token in (*prompt, *context)]
  for token, logprob, a in zip(own, logprobs, advantage):
    trained = threshold is None or np.exp(np.float32(logprob)) < np.float32(threshold)
    row.append((token, True, trained, logprob, a))
  return row + [(0, False, False, 0.0, 0.0)] * (LP + T - len(row))


def assert_rows_are(rows, expected):
  assert rows.tokens.shape == (len(expected), LP + T)
  for b, row in enumerate(expected):
    columns = (rows.tokens, rows.is_token, rows.mask, rows.logprobs, rows.advantages)
    for column, values in zip(columns, zip(*row)):
      np.testing.assert_array_equal(column[b], np.array(values, column.dtype))


# Rollouts to rows.


@given(seeds, thresholds)
@many
def test_a_trajectory_row_is_prompt_and_response_with_everything_in_its_place(seed, threshold):
  rng = np.random.default_rng(seed)
  prompts, own = drawn_prompts(rng), drawn_samples(rng, (7,), T)
  taken = Trajectories(
    prompt=rng.integers(0, P, 7).astype(np.int32),
    samples=own,
    rewards=np.zeros(7, np.float32),
    segment=np.zeros((7, T), np.int32),
    values=np.zeros((7, 1), np.float32),
  )
  advantages = rng.normal(size=(7, T)).astype(np.float32)
  expected = []
  for b, (p, n) in enumerate(zip(taken.prompt, own.lengths)):
    prompt = prompts.tokens[p, : prompts.lengths[p]]
    response = (own.tokens[b, :n], own.logprobs[b, :n], advantages[b, :n])
    expected.append(by_hand(prompt, (), *response, threshold))
  assert_rows_are(trajectory_rows(prompts, taken, advantages, threshold), expected)


@given(seeds, st.sampled_from(SHAPES), thresholds)
@many
def test_an_edge_row_is_prompt_and_path_with_the_loss_on_the_nodes_own_tokens(
  seed, shape, threshold
):
  rng = np.random.default_rng(seed)
  prompts = drawn_prompts(rng)
  tree, advantages = drawn_tree(rng, *shape)
  expected, questions = [], []

  def visit(p, level, node, context):
    if level == len(tree.branch_factors):
      return
    branch = tree.branch_factors[level]
    for child in range(node * branch, (node + 1) * branch):
      n = tree.lengths[level][p, child]
      own = tree.tokens[level][p, child, :n]
      advantage = advantages[level][p, child]
      if advantage != 0:
        prompt = prompts.tokens[p, : prompts.lengths[p]]
        response = (own, tree.logprobs[level][p, child, :n], [advantage] * n)
        expected.append((level, p, child, by_hand(prompt, context, *response, threshold)))
      if not tree.finished[level][p, child]:
        visit(p, level + 1, child, (*context, *own))

  for p in range(P):
    visit(p, 0, 0, ())
  expected.sort(key=lambda edge: edge[:3])  # level by level
  questions = [prompts.question[p] for _, p, _, _ in expected]

  edges = tree_edges(prompts, tree, advantages, iteration=5)
  assert_rows_are(edge_rows(edges, threshold, len(expected)), [row for *_, row in expected])
  np.testing.assert_array_equal(edges.question, questions)
  assert (edges.born == 5).all()


def test_empty_rows_fill_up_to_the_fixed_count_and_train_on_nothing():
  rng = np.random.default_rng(0)
  edges = tree_edges(drawn_prompts(rng), *drawn_tree(rng, *SHAPES[1]), iteration=0)
  rows, count = edge_rows(edges, None, 40), len(edges.start)
  assert rows.tokens.shape == (40, LP + T)
  assert rows.mask[:count].any(axis=1).all()
  assert not any(np.any(x[count:]) for x in jax.tree.leaves(rows))


def test_trees_whose_edges_all_agree_give_no_edges():
  rng = np.random.default_rng(0)
  tree, advantages = drawn_tree(rng, *SHAPES[2])
  edges = tree_edges(drawn_prompts(rng), tree, jax.tree.map(np.zeros_like, advantages), 0)
  assert len(edges.start) == 0
  assert not edge_rows(edges, 0.9, 4).is_token.any()


def test_a_tree_of_one_level_trains_as_flat_responses_do():
  rng = np.random.default_rng(1)
  prompts, (tree, advantages) = drawn_prompts(rng), drawn_tree(rng, (3,), (T,))
  per_row = advantages[0].reshape(-1)
  samples = Samples(*(x[0].reshape(3 * P, *x[0].shape[2:]) for x in (
    tree.tokens, tree.logprobs, tree.lengths, tree.finished)))  # fmt: skip
  flat = Trajectories(
    np.repeat(np.arange(P), 3), samples, np.zeros(3 * P), np.zeros((3 * P, T)), np.zeros((3 * P, 1))
  )
  responses = trajectory_rows(prompts, flat, np.repeat(per_row[:, None], T, axis=1), 0.9)
  edges = edge_rows(tree_edges(prompts, tree, advantages, 0), 0.9, (per_row != 0).sum())
  jax.tree.map(
    np.testing.assert_array_equal, edges, jax.tree.map(lambda x: x[per_row != 0], responses)
  )


# The edge buffer.


def named_edges(question, born, names):
  """Edges that carry a name of their own in every column."""
  names = np.asarray(list(names), np.int32)
  return Edges(
    tokens=np.tile(names[:, None], (1, 3)),
    logprobs=-np.tile(names[:, None], (1, 3)).astype(np.float32),
    start=names % 2,
    end=names % 2 + 1,
    advantage=names + np.float32(0.5),
    question=np.broadcast_to(np.asarray(question, np.int64), names.shape),
    born=np.full(names.shape, born, np.int32),
  )


def names_of(edges):
  names = edges.tokens[:, 0].tolist()
  columns = named_edges(edges.question, 0, names).replace(born=edges.born)
  jax.tree.map(np.testing.assert_array_equal, edges, columns)  # rows were moved as a whole
  return names


def filled_buffer(quota, sizes, max_age=8):
  buffer, name = EdgeBuffer(quota, max_age), itertools.count()
  for question, size in enumerate(sizes):
    buffer.add(named_edges(question, 0, itertools.islice(name, size)))
  return buffer


@given(
  st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=12),
  st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.booleans(), seeds,
)  # fmt: skip
@many
def test_no_edge_is_lost_used_twice_or_used_too_late(arrivals, quota, max_age, count, repeat, seed):
  rng = np.random.default_rng(seed)
  buffer, name = EdgeBuffer(quota, max_age), itertools.count()
  waiting = {}  # name: (question, born)
  for iteration, questions in enumerate(arrivals):
    added = dict(zip(name, [(question, iteration) for question in questions]))
    waiting |= added
    buffer.add(named_edges(questions, iteration, added))
    drawn = buffer.draw(count, iteration, rng, repeat)

    waiting = {k: (q, born) for k, (q, born) in waiting.items() if iteration - born < max_age}
    eligible = sum(min(quota, n) for n in Counter(q for q, _ in waiting.values()).values())
    drawn_names = names_of(drawn)
    used = set(drawn_names)
    assert used <= waiting.keys()
    assert len(used) == min(count, eligible)
    assert max(Counter(waiting[k][0] for k in used).values(), default=0) <= quota
    # A repeated draw goes round and round its edges.
    assert len(drawn_names) == (count if repeat and used else len(used))
    assert drawn_names == (drawn_names[: len(used)] * count)[: len(drawn_names)]
    waiting = {k: v for k, v in waiting.items() if k not in used}
    assert sorted(names_of(buffer.edges)) == sorted(waiting)
    assert len(buffer) == len(waiting)


@pytest.mark.parametrize(("age", "is_drawn"), [(0, True), (7, True), (8, False), (9, False)])
def test_edges_of_the_maximum_age_are_discarded(age, is_drawn):
  buffer = filled_buffer(quota=2, sizes=[2])
  assert len(buffer.draw(9, age, np.random.default_rng(0)).start) == 2 * is_drawn
  assert len(buffer) == 0


def test_the_quota_counts_a_question_over_all_iterations():
  buffer = EdgeBuffer(quota=3, max_age=8)
  for iteration in range(4):
    buffer.add(named_edges([7, 7], iteration, [2 * iteration, 2 * iteration + 1]))
  rng = np.random.default_rng(0)
  assert [len(buffer.draw(99, 3, rng).start) for _ in range(4)] == [3, 3, 2, 0]


def test_each_edge_of_a_question_is_as_likely_as_the_next():
  """4 of 5 and 4 of 20 edges pass the quota, 5 of these 8 the cut; any of them may be first."""
  rng, draws = np.random.default_rng(0), 2000
  chosen, first = np.zeros(25), np.zeros(25)
  for _ in range(draws):
    names = names_of(filled_buffer(quota=4, sizes=[5, 20]).draw(5, 0, rng))
    chosen[names] += 1
    first[names[0]] += 1
  share = np.array([4 / 5] * 5 + [4 / 20] * 20)
  for observed, expected in ((chosen, draws * share * 5 / 8), (first, draws * share / 8)):
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 51.2, chi_square  # 24 degrees of freedom, 0.1 % point


def test_a_draw_is_a_function_of_the_buffer_and_the_generator():
  draw = lambda seed: names_of(filled_buffer(3, [9, 9]).draw(5, 0, np.random.default_rng(seed)))
  assert draw(1) == draw(1)
  assert draw(1) != draw(2)


@pytest.mark.parametrize("repeat", [False, True])
def test_an_empty_buffer_gives_no_edges(repeat):
  buffer = EdgeBuffer(quota=2, max_age=8)
  assert len(buffer) == 0
  buffer.add(named_edges([], 0, []))
  assert buffer.draw(5, 0, np.random.default_rng(0), repeat).tokens.shape == (0, 3)
  buffer.add(named_edges([1], 0, [3]))
  assert set(names_of(buffer.draw(5, 0, np.random.default_rng(0), repeat))) == {3}


def test_waiting_edges_are_padded_where_rows_grow_wider():
  narrow, wide = named_edges([1, 2], 0, [3, 4]), named_edges([5], 1, [6])
  wide = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 2))) if x.ndim == 2 else x, wide)
  buffer = EdgeBuffer(quota=2, max_age=8)
  buffer.add(narrow)
  buffer.add(wide)
  width = narrow.tokens.shape[1]
  assert buffer.edges.tokens.shape == (3, width + 2)
  for name in ("tokens", "logprobs"):
    whole = getattr(buffer.edges, name)
    np.testing.assert_array_equal(whole[:2, :width], getattr(narrow, name))
    assert not whole[:2, width:].any()


def test_a_buffer_that_was_never_filled_says_so():
  with pytest.raises(ValueError, match="nothing was added"):
    EdgeBuffer(quota=2, max_age=8).draw(5, 0, np.random.default_rng(0))


def test_a_draw_works_on_many_edges():
  buffer = EdgeBuffer(quota=32, max_age=8)
  buffer.add(named_edges(np.arange(50_000) % 1000, 0, range(50_000)))
  for _ in range(3):
    assert len(buffer.draw(512, 0, np.random.default_rng(0)).start) == 512


# Optimiser batches.


def named_rows(has_signal, width=4):
  """Rows whose tokens say which row they are; those without signal lack mask or advantage."""
  names = np.arange(1, len(has_signal) + 1, dtype=np.int32)
  tokens = np.tile(names[:, None], (1, width))
  last, odd = np.arange(width) == width - 1, (names % 2 == 1)[:, None]
  mask = np.where(has_signal[:, None] | odd, last, ~last)
  advantages = np.where(has_signal[:, None], last, odd & ~last) * tokens.astype(np.float32)
  return TrainRows(tokens, np.ones_like(mask), mask, -tokens.astype(np.float32), advantages)


@given(
  st.lists(st.booleans(), max_size=30), st.sampled_from([(2, 1), (6, 2), (6, 6), (8, 4)]),
  st.integers(1, 3), seeds,
)  # fmt: skip
@many
def test_every_row_with_signal_is_trained_on_once_per_epoch(signal, sizes, epochs, seed):
  batch_rows, micro_rows = sizes
  rows = named_rows(np.array(signal, bool))
  wanted = np.flatnonzero(signal) + 1
  batches = list(
    optimiser_batches(rows, batch_rows, micro_rows, epochs, np.random.default_rng(seed))
  )
  updates = -(-len(wanted) // batch_rows)
  assert len(batches) == epochs * updates
  for epoch in range(epochs):
    seen, counts = [], []
    for batch, used in batches[epoch * updates :][:updates]:
      assert batch.tokens.shape == (batch_rows // micro_rows, micro_rows, 4)
      flat = jax.tree.map(lambda x: x.reshape(-1, 4), batch)
      names = flat.tokens[:, 0]
      count = (names > 0).sum()
      # Real rows first and unchanged, empty ones behind: unused micro-batches are all empty.
      for packed, original in zip(jax.tree.leaves(flat), jax.tree.leaves(rows)):
        np.testing.assert_array_equal(packed[:count], original[names[:count] - 1])
        assert not packed[count:].any()
      assert (used - 1) * micro_rows < count <= used * micro_rows
      seen += names[:count].tolist()
      counts.append(count)
    assert sorted(seen) == wanted.tolist()
    assert not counts or max(counts) - min(counts) <= 1


@pytest.mark.parametrize("count", [1, 8, 9, 13, 24])
def test_rows_are_spread_evenly_where_each_micro_batch_counts_the_same(count):
  rows = named_rows(np.ones(count, bool))
  (batch, used), = optimiser_batches(rows, 24, 8, 1, np.random.default_rng(0), even=True)
  sizes = (batch.tokens[..., 0] > 0).sum(axis=1)
  assert used == -(-count // 8) and not sizes[used:].any()
  assert sizes.sum() == count and sizes[:used].max() - sizes[:used].min() <= 1
  assert sorted(batch.tokens[batch.tokens > 0].tolist()) == sorted([*range(1, count + 1)] * 4)
  parts = [
    next(optimiser_batches(rows, 24, 8, 1, np.random.default_rng(0), own=own, even=True))[0]
    for own in (np.arange(8) < 3, np.arange(8) >= 3)
  ]
  jax.tree.map(
    lambda whole, *x: np.testing.assert_array_equal(whole, np.concatenate(x, axis=1)), batch, *parts
  )


def test_rows_without_signal_give_no_batch():
  rows = named_rows(np.zeros(9, bool))
  assert list(optimiser_batches(rows, 4, 2, 3, np.random.default_rng(0))) == []


def test_epochs_shuffle_anew_and_the_generator_decides_how():
  rows = named_rows(np.ones(24, bool))

  def order(seed, epochs=1):
    batches = optimiser_batches(rows, 8, 4, epochs, np.random.default_rng(seed))
    return [batch.tokens[..., 0].ravel().tolist() for batch, _ in batches]

  first, second = order(0, epochs=2)[:3], order(0, epochs=2)[3:]
  assert first == order(0)
  assert first != second
  assert first != order(1)
  assert sorted(itertools.chain(*first)) == list(range(1, 25)) != list(itertools.chain(*first))


@pytest.mark.parametrize(
  ("pack_tokens", "shards", "expected"),
  [(0, 4, 32), (100, 4, 32), (250, 4, 12), (1000, 1, 3), (1000, 4, 4), (5000, 1, 1)],
)
def test_packs_of_a_micro_batch_have_the_slots_of_its_rows_or_are_one_a_shard(
  pack_tokens, shards, expected
):
  train = TrainConfig(micro_batch_rows=32, pack_tokens=pack_tokens)
  assert micro_batch_size(train, 100, shards) == expected
