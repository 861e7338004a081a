from __future__ import annotations

import functools
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest

from spo_jax import algorithms, rollouts
from spo_jax.config import load
from spo_jax.experiment import build
from spo_jax.packing import EdgeBuffer
from spo_jax.structs import Prompts, TrainRows

TINY = """
model: {hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, num_kv_heads: 1}
task: {operations: 1}
spo:
  {threshold: 0.3, interval: 2, continuations: 3, branch_factors: [2, 3], segment_tokens: 3,
  edges_per_question: 64, edges_per_iteration: 64}
rollout:
  {questions: 3, samples: 4, rows: 8, max_prompt_tokens: 7, max_response_tokens: 9,
  temperature: 0.8}
"""
ALGORITHMS = ("chain", "tree", "grpo", "rloo")


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  path = tmp_path_factory.mktemp("algorithms") / "tiny.yaml"
  path.write_text(TINY)
  return path


class Collected(NamedTuple):
  rows: TrainRows
  figures: dict[str, float]
  prompts: Prompts
  taken: Any  # what the rollout returned
  buffer: EdgeBuffer


def grade(problems, tokens, lengths, finished):
  """0, 1/2 or 1 by all tokens: a model that has learnt nothing would always earn 0."""
  is_token = np.arange(tokens.shape[1]) < lengths[:, None]
  return ((tokens * is_token).sum(axis=1) + finished) % 3 / 2


@functools.cache
def collect(path, algorithm, *overrides, iteration=3, cursor=0, buffer=None):
  experiment = build(load(path, [f"algorithm={algorithm}", *overrides]))
  experiment.engine.grade_fn = grade
  # Noise on the parameters makes some tokens likely and others not.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), experiment.init_params()
  )
  kind = algorithm if algorithm in ("chain", "tree") else "flat"
  rollout, captured = getattr(rollouts, kind), []

  def capturing(*args):
    captured.append(rollout(*args))
    return captured[0]

  spo = experiment.config.spo
  prompts = experiment.questions(cursor, experiment.config.rollout.questions)
  if buffer is None:
    buffer = EdgeBuffer(spo.edges_per_question, spo.max_edge_age)
  with mock.patch.object(rollouts, kind, capturing):
    rows, figures = algorithms.collect(experiment, params, prompts, iteration, buffer)
  return Collected(rows, figures, prompts, captured[0], buffer)


def own_tokens(prompts, taken):
  """(row, slice of its response in a training row, slice of its response) one by one."""
  for b, (p, n) in enumerate(zip(taken.prompt, taken.samples.lengths)):
    start = prompts.lengths[p]
    yield b, slice(start, start + n), slice(0, n)


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def assert_trajectories_are_in_their_rows(collected, threshold):
  rows, _, prompts, taken, _ = collected
  trained = np.zeros_like(rows.mask)
  for b, there, here in own_tokens(prompts, taken):
    own = taken.samples.logprobs[b, here]
    np.testing.assert_array_equal(rows.tokens[b, there], taken.samples.tokens[b, here])
    np.testing.assert_array_equal(rows.logprobs[b, there], own)
    trained[b, there] = np.exp(own) < threshold
  np.testing.assert_array_equal(rows.mask, trained)
  assert 0.1 < trained.sum() / taken.samples.lengths.sum() < 0.9  # a mask worth its name


# One algorithm after the other, against a loop.


def test_chain_gives_each_token_the_change_in_value_over_its_segment(tiny):
  collected = collect(tiny, "chain")
  rows, figures, prompts, taken, _ = collected
  assert_trajectories_are_in_their_rows(collected, 0.3)
  expected, segments = np.zeros_like(rows.advantages), 0
  for b, there, here in own_tokens(prompts, taken):
    cutpoints = np.flatnonzero(np.exp(taken.samples.logprobs[b, here]) < 0.3)
    starts = [*cutpoints[::2], here.stop]
    values = [*taken.values[b, : len(starts) - 1], taken.rewards[b]]
    for k in range(len(starts) - 1):
      first = there.start + starts[k]
      expected[b, first : there.start + starts[k + 1]] = values[k + 1] - values[k]
    segments += len(starts) - 1
  close(rows.advantages, expected)
  assert np.count_nonzero(np.round(expected, 3)) > 10
  assert len(rows.mask) == 12
  close(figures["rollout/segments"], segments / 12)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_group_algorithms_compare_each_reward_with_its_question(tiny, algorithm):
  collected = collect(tiny, algorithm)
  rows, _, prompts, taken, _ = collected
  assert_trajectories_are_in_their_rows(collected, 0.3)
  expected = np.zeros_like(rows.advantages)
  for b, there, _ in own_tokens(prompts, taken):
    group = taken.rewards[taken.prompt == taken.prompt[b]]
    others = (group.sum() - taken.rewards[b]) / (len(group) - 1)
    grpo = (taken.rewards[b] - group.mean()) / (group.std() + 1e-8)
    expected[b, there] = grpo if algorithm == "grpo" else taken.rewards[b] - others
  close(rows.advantages, expected)
  assert expected.any()


def tree_edges_by_hand(prompts, tree, baseline):
  """{(row tokens, first own token): advantage} of every edge with one, from the root down."""
  edges = {}

  def children(node, branch):
    return range(node * branch, (node + 1) * branch)

  def value(p, level, node):
    if level == len(tree.branch_factors) or (level and tree.finished[level - 1][p, node]):
      return tree.rewards[level - 1][p, node]
    branch = tree.branch_factors[level]
    return np.mean([value(p, level + 1, child) for child in children(node, branch)])

  def visit(p, level, node, row):
    if level == len(tree.branch_factors) or (level and tree.finished[level - 1][p, node]):
      return
    siblings = children(node, tree.branch_factors[level])
    values = np.array([value(p, level + 1, child) for child in siblings], np.float64)
    for child, v in zip(siblings, values):
      longer = row + tuple(tree.tokens[level][p, child, : tree.lengths[level][p, child]])
      advantage = {
        "mean": v - values.mean(),
        "std": (v - values.mean()) / (values.std() + 1e-8),
        "leave_one_out": v - (values.sum() - v) / (len(values) - 1),
      }[baseline]
      if abs(advantage) > 1e-6:
        # A list, because siblings may have sampled the same tokens.
        edges.setdefault((longer, len(row)), []).append(advantage)
      visit(p, level + 1, child, longer)

  for p, n in enumerate(prompts.lengths):
    visit(p, 0, 0, tuple(prompts.tokens[p, :n]))
  return edges


def edges_in(rows):
  """The same of training rows, whose loss must lie on all own tokens."""
  edges = {}
  for tokens, is_token, mask, advantages in zip(
    rows.tokens, rows.is_token, rows.mask, rows.advantages
  ):
    if is_token.any():
      start = mask.argmax()
      np.testing.assert_array_equal(mask, is_token & (np.arange(len(mask)) >= start))
      assert len(set(advantages[mask])) == 1
      edges.setdefault((tuple(tokens[is_token]), start), []).append(advantages[start])
  return edges


@pytest.mark.parametrize(
  ("baseline", "factors"),
  [("mean", "[2,3]"), ("std", "[2,3]"), ("leave_one_out", "[2,3]"), ("mean", "[4]")],
)
def test_tree_trains_on_every_edge_whose_value_differs_from_its_parents(tiny, baseline, factors):
  rows, figures, prompts, tree, buffer = collect(
    tiny, "tree", f"spo.baseline={baseline}", f"spo.branch_factors={factors}",
    "train.probability_mask=false",
  )  # fmt: skip
  actual, expected = edges_in(rows), tree_edges_by_hand(prompts, tree, baseline)
  assert actual.keys() == expected.keys()
  for edge, advantages in expected.items():
    close(sorted(actual[edge]), sorted(advantages))
  count = sum(map(len, expected.values()))
  assert count > 5
  assert figures["rollout/edges"] == figures["buffer/drawn"] == count
  assert len(buffer) == figures["buffer/size"] == 0


def test_what_a_tree_leaves_in_the_buffer_is_trained_on_later(tiny):
  overrides = ("spo.edges_per_iteration=4", "train.probability_mask=false")
  every = collect(tiny, "tree", "train.probability_mask=false", iteration=1)
  buffer = EdgeBuffer(quota=64, max_age=8)
  first = collect(tiny, "tree", *overrides, iteration=1, buffer=buffer)
  total = every.figures["rollout/edges"]
  assert first.rows.tokens.shape[0] == 4
  assert first.figures["buffer/size"] == total - 4 > 4
  second = collect(tiny, "tree", *overrides, iteration=2, cursor=3, buffer=buffer)
  assert second.figures["buffer/size"] == total - 4 + second.figures["rollout/edges"] - 4
  drawn = edges_in(first.rows).keys()
  assert drawn < edges_in(every.rows).keys()
  assert not drawn & edges_in(second.rows).keys()


# Relations between them.


def test_a_chain_of_one_segment_is_the_reward_against_the_value_of_the_question(tiny):
  rows, _, prompts, taken, _ = collect(
    tiny, "chain", "spo.threshold=1", "spo.interval=9", "train.probability_mask=false"
  )
  for b, there, _ in own_tokens(prompts, taken):
    close(rows.advantages[b, there], taken.rewards[b] - taken.values[b, 0])
  # One value per question: among its responses the advantage differs as the reward does.
  for p in range(3):
    assert len(set(taken.values[taken.prompt == p, 0])) == 1


def test_grpo_and_rloo_see_the_same_responses_and_agree_in_sign(tiny):
  grpo, rloo = collect(tiny, "grpo"), collect(tiny, "rloo")
  np.testing.assert_array_equal(grpo.rows.tokens, rloo.rows.tokens)
  np.testing.assert_array_equal(np.sign(grpo.rows.advantages), np.sign(rloo.rows.advantages))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_the_probability_mask_every_own_token_is_trained_on(tiny, algorithm):
  masked = collect(tiny, algorithm)
  whole = collect(tiny, algorithm, "train.probability_mask=false")
  if algorithm != "tree":
    length = whole.prompts.lengths[whole.taken.prompt] + whole.taken.samples.lengths
    column = np.arange(whole.rows.mask.shape[1])
    prompt = column < whole.prompts.lengths[whole.taken.prompt][:, None]
    np.testing.assert_array_equal(whole.rows.mask, (column < length[:, None]) & ~prompt)
  np.testing.assert_array_equal(
    masked.rows.mask, whole.rows.mask & (np.exp(whole.rows.logprobs) < 0.3)
  )
  assert whole.figures["mask/fraction"] == 1
  close(masked.figures["mask/fraction"], masked.rows.mask.sum() / whole.rows.mask.sum())
  for name in ("tokens", "is_token", "logprobs", "advantages"):
    np.testing.assert_array_equal(getattr(masked.rows, name), getattr(whole.rows, name))


@pytest.mark.parametrize("algorithm", ["chain", "tree", "grpo"])
def test_recomputed_logprobs_are_those_of_the_sampler(tiny, algorithm):
  sampled = collect(tiny, algorithm).rows
  with mock.patch.object(algorithms, "score_rows", wraps=algorithms.score_rows) as forward:
    scored = collect(tiny, algorithm, "rollout.recompute_logprobs=true").rows
  assert forward.called
  np.testing.assert_array_equal(scored.tokens, sampled.tokens)
  np.testing.assert_allclose(scored.logprobs, sampled.logprobs, atol=1e-4)
  np.testing.assert_array_equal(scored.logprobs == 0, sampled.logprobs == 0)
  close(scored.advantages, sampled.advantages)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_mean_reward_is_that_of_the_rollout(tiny, algorithm):
  _, figures, _, taken, _ = collect(tiny, algorithm)
  if algorithm == "tree":
    by_leaf = np.where(taken.valid[1], taken.rewards[1], 0).reshape(3, 2, 3).mean(axis=2)
    reward = np.where(taken.finished[0], taken.rewards[0], by_leaf)
  else:
    reward = taken.rewards
    lengths = taken.samples.lengths
    close(figures["rollout/length_mean"], lengths.mean())
    close(figures["rollout/unfinished_rate"], 1 - taken.samples.finished.mean())
  close(figures["rollout/reward_mean"], reward.mean())
  assert 0 < reward.mean() < 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_are_a_function_of_seed_and_iteration(tiny, algorithm):
  first = collect(tiny, algorithm).rows
  again = collect(tiny, algorithm, "seed=0").rows  # not the cached ones
  jax.tree.map(np.testing.assert_array_equal, again, first)
  # The same questions in another iteration are answered anew.
  for other in (collect(tiny, algorithm, "seed=1"), collect(tiny, algorithm, iteration=4)):
    assert not np.array_equal(other.rows.tokens, first.tokens)


def test_every_iteration_draws_edges_with_numbers_of_its_own(tiny):
  states, draw = [], EdgeBuffer.draw

  def spying(buffer, count, iteration, rng, repeat):
    states.append(rng.bit_generator.state["state"]["state"])
    return draw(buffer, count, iteration, rng, repeat)

  with mock.patch.object(EdgeBuffer, "draw", spying):
    for iteration in (3, 3, 4):
      collect.__wrapped__(tiny, "tree", iteration=iteration)
  assert states[0] == states[1] != states[2]
