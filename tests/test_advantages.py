from __future__ import annotations

import functools
import math

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spo_jax import advantages, segments

B, T, S = 4, 9, 5  # one shape for all drawn examples: one compilation
TREES = [(3,), (1, 2), (2, 2, 3), (6, 6)]

segment_advantages = jax.jit(advantages.segment_advantages)
tree_values = jax.jit(advantages.tree_values, static_argnums=2)
tree_advantages = jax.jit(advantages.tree_advantages, static_argnums=(2, 3))
group_advantages = jax.jit(advantages.group_advantages, static_argnums=(2, 3))
gae = jax.jit(advantages.gae)
monte_carlo_returns = jax.jit(advantages.monte_carlo_returns)
whiten = jax.jit(advantages.whiten, static_argnums=2)


@functools.partial(jax.jit, static_argnums=3)
def every_baseline(rewards, finished, valid, branch):
  """Tree values, and the edges of all baselines by name."""
  values = advantages.tree_values(rewards, finished, branch)
  return values, {
    baseline: advantages.tree_advantages(values, valid, branch, baseline)
    for baseline in advantages.TREE_BASELINES
  }


many = settings(deadline=None, max_examples=60)
tenths = st.integers(-10, 10).map(lambda n: n / 10)
rows_drawn = hnp.arrays(np.float32, (B,), elements=tenths)
tokens_drawn = hnp.arrays(np.float32, (B, T), elements=tenths)
masks_drawn = hnp.arrays(bool, (B, T))


def close(actual, expected, tolerance=1e-5):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def padded(rows):
  """Into one shape for all reference cases: one compilation."""
  rows = np.array(rows)
  return np.pad(rows, ((0, 4 - rows.shape[0]), (0, 32 - rows.shape[1])))


def draw_tree(rng, branch, prompts=3, stop=0.3, choices=(0.0, 1.0)):
  """A random tree with early leaves; NaN wherever no reward is due."""
  rewards, finished, valid = [], [], []
  alive = np.ones((prompts, 1), bool)
  for level, b in enumerate(branch):
    exists = np.repeat(alive, b, axis=1)
    last = level == len(branch) - 1
    leaf = exists & (last | (rng.random(exists.shape) < stop))
    reward = rng.choice(choices, exists.shape)
    rewards.append(np.where(leaf, reward, np.nan).astype(np.float32))
    finished.append(leaf)
    valid.append(exists)
    alive = exists & ~leaf
  return tuple(rewards), tuple(finished), tuple(valid)


def brute_force_tree(rewards, finished, branch, baseline):
  """Node by node, recursively, in float64."""
  values = {}
  result = [np.zeros_like(r, dtype=np.float64) for r in rewards]

  def value(p, level, i):
    if level > 0 and finished[level - 1][p, i]:
      out = float(rewards[level - 1][p, i])
    else:
      b = branch[level]
      out = math.fsum(value(p, level + 1, i * b + c) for c in range(b)) / b
    values[p, level, i] = out
    return out

  for p in range(rewards[0].shape[0]):
    value(p, 0, 0)
  for (p, level, i), v in values.items():
    if level == 0:
      continue
    b = branch[level - 1]
    parent = values[p, level - 1, i // b]
    siblings = np.array([values[p, level, i // b * b + c] for c in range(b)])
    if baseline == "mean":
      out = v - parent
    elif baseline == "std":
      out = (v - parent) / (siblings.std() + 1e-8) if np.ptp(siblings) > 1e-12 else 0.0
    elif baseline == "leave_one_out":
      out = v - (siblings.sum() - v) / (b - 1) if b > 1 else 0.0
    else:
      out = v + 5 * ((1 - (1 - v) ** 4) - (1 - (1 - parent) ** 4))
    result[level - 1][p, i] = out
  return values, result


# Chain.


@pytest.mark.parametrize("case", golden.load("segments")["chain"])
def test_segment_advantages_agree_with_the_reference(case):
  width, length = 80, len(case["logprobs"])
  logprobs = np.zeros((1, width), np.float32)
  logprobs[0, :length] = case["logprobs"]
  mask = np.arange(width)[None, :] < length
  segment = segments.cutpoint_segments(logprobs, mask, case["threshold"], case["interval"])
  values = np.full((1, width), np.nan, np.float32)
  values[0, : len(case["values_at_cutpoints"])] = case["values_at_cutpoints"]
  advantage = segment_advantages(values, np.array([case["reward"]]), segment)
  # The reference has the probability mask multiplied in.
  masked = np.where(segments.uncertain_tokens(logprobs, mask, 0.9), advantage, 0.0)
  close(masked[0, :length], case["token_advantages"])


def test_segment_advantages_by_hand():
  segment = np.array([[-1, 0, 0, 1, 2, 2], [0, 0, 0, -1, -1, -1], [-1] * 6])
  values = np.array([[0.5, 0.25, 1.0], [0.75, np.nan, np.inf], [np.nan] * 3])
  advantage = segment_advantages(values, np.array([0.0, 1.0, np.nan]), segment)
  close(advantage, [[0, -0.25, -0.25, 0.75, -1, -1], [0.25, 0.25, 0.25, 0, 0, 0], [0] * 6])


@many
@given(
  hnp.arrays(np.float32, (B, S), elements=tenths),
  rows_drawn,
  masks_drawn,
  hnp.arrays(np.int32, (B,), elements=st.integers(0, S)),
)
def test_segment_advantages_equal_brute_force(values, rewards, starts, most):
  segment = np.cumsum(starts, axis=1) - 1
  segment = np.minimum(segment, most[:, None] - 1)
  expected = np.zeros((B, T))
  for b in range(B):
    ladder = [*values[b, : segment[b].max() + 1], rewards[b]]
    for t in range(T):
      if segment[b, t] >= 0:
        expected[b, t] = ladder[segment[b, t] + 1] - ladder[segment[b, t]]
  close(segment_advantages(values, rewards, segment), expected)


def test_a_segment_without_a_value_is_nan_and_not_a_quiet_zero():
  segment = np.array([[-1, 0, 1]])
  too_few = np.asarray(segment_advantages(np.zeros((1, 1)), np.ones(1), segment))
  none = np.asarray(segment_advantages(np.zeros((1, 0)), np.ones(1), segment))
  np.testing.assert_array_equal(np.isnan(too_few), [[False, True, True]])
  np.testing.assert_array_equal(np.isnan(none), [[False, True, True]])


def test_every_token_a_segment_telescopes_to_reward_minus_first_value():
  rng = np.random.default_rng(0)
  values, rewards = rng.random((B, T)), rng.random(B)
  segment = segments.token_segments(np.array([T, 1, 4, 0]), T)
  total = np.asarray(segment_advantages(values, rewards, segment)).sum(axis=1)
  close(total, np.where([True, True, True, False], rewards - values[:, 0], 0.0))


def test_one_segment_reduces_to_group_advantage():
  rewards = np.array([1.0, 0.0, 1.0, 1.0], np.float32)
  group = np.array([0, 0, 0, 1])
  mean_of_group = np.array([2 / 3, 2 / 3, 2 / 3, 1.0])[:, None]
  segment = segments.whole_segments(np.array([T, 3, 1, 2]), T)
  advantage = segment_advantages(mean_of_group, rewards, segment)
  expected = np.asarray(group_advantages(rewards, group, 2, "mean"))[:, None]
  close(advantage, np.where(np.asarray(segment) >= 0, expected, 0.0))


# Tree.


@pytest.mark.parametrize("case", golden.load("advantages")["tree"])
def test_tree_agrees_with_the_reference(case):
  tree = golden.tree_levels(case)
  columns = {"mean": case["rloo"], "std": case["grpo"]}
  columns["pav"] = np.array(case["value"][1:]) + 5 * np.array(case["prover_advantage"])
  values, edges = jax.device_get(
    every_baseline(tree.rewards, tree.finished, tree.valid, tree.branch_factors)
  )
  close([values[level][0, i] for level, i in tree.place], case["value"])
  for baseline, expected in columns.items():
    close([edges[baseline][level - 1][0, i] for level, i in tree.place[1:]], expected)


def test_tree_by_hand():
  # Root - A (children 1, 0), B finished with 1 (its children do not exist).
  rewards = (np.array([[np.nan, 1.0]]), np.array([[1.0, 0.0, np.nan, np.nan]]))
  finished, valid = np.array([[False, True]]), np.array([[True, True, False, False]])
  values, edges = every_baseline(rewards, (finished,), (valid[:, :2], valid), (2, 2))
  close(values[0], [[0.75]])
  close(values[1], [[0.5, 1.0]])
  expected = {
    "mean": ([[-0.25, 0.25]], [[0.5, -0.5, 0, 0]]),
    "std": ([[-1, 1]], [[1, -1, 0, 0]]),
    "leave_one_out": ([[-0.5, 0.5]], [[1, -1, 0, 0]]),
    "pav": ([[0.20703125, 1.01953125]], [[1.3125, -4.6875, 0, 0]]),
  }
  for baseline, (first, second) in expected.items():
    close(edges[baseline][0], first)
    close(edges[baseline][1], second)


@example(1737, (2, 2, 3), 0.3, (0.1, 0.3, 0.6))
@settings(deadline=None, max_examples=25)
@given(
  st.integers(0, 2**32 - 1),
  st.sampled_from(TREES),
  st.sampled_from([0.0, 0.3, 1.0]),
  st.sampled_from([(0.0, 1.0), (-2.0, -0.5, 0.0, 1.0), (0.1, 0.3, 0.6)]),
)
def test_tree_equals_brute_force(seed, branch, stop, choices):
  rewards, finished, valid = draw_tree(np.random.default_rng(seed), branch, 3, stop, choices)
  values, edges = jax.device_get(every_baseline(rewards, finished[:-1], valid, branch))
  # As they were chosen: what float32 has made of .1 and .3 would tell equal siblings apart.
  exact = tuple(level.astype(float).round(6) for level in rewards)
  for baseline in advantages.TREE_BASELINES:
    expected_values, expected = brute_force_tree(exact, finished, branch, baseline)
    for level in range(len(branch)):
      close(edges[baseline][level], expected[level], 2e-5)
  close([values[level][p, i] for p, level, i in expected_values], list(expected_values.values()))


@pytest.mark.parametrize("value", [1 / 3, 0.1, 0.7, 1e-3, -123.4])
@pytest.mark.parametrize("branch", [2, 6, 31])
def test_siblings_of_equal_value_give_exactly_zero(value, branch):
  rewards, valid = np.full((2, branch), value, np.float32), np.ones((2, branch), bool)
  _, edges = every_baseline((rewards,), (), (valid,), (branch,))
  for baseline in ("mean", "std", "leave_one_out"):
    np.testing.assert_array_equal(edges[baseline][0], np.zeros((2, branch)))


def test_siblings_whose_leaves_are_equal_in_another_order_give_exactly_zero():
  rng = np.random.default_rng(0)
  branch = (6, 6, 6)
  leaves = rng.random(36).round(2)
  rewards = np.stack([np.concatenate([rng.permutation(leaves) for _ in range(6)])])
  empty = np.full((1, 6), np.nan), np.full((1, 36), np.nan)
  finished = np.zeros((1, 6), bool), np.zeros((1, 36), bool)
  values = tree_values((*empty, rewards.astype(np.float32)), finished, branch)
  assert np.ptp(values[1]) > 0, "the trap is set: float32 means differ by rounding"
  valid = tuple(np.ones((1, n), bool) for n in (6, 36, 216))
  edges = tree_advantages(values, valid, branch, "std")
  np.testing.assert_array_equal(edges[0], np.zeros((1, 6)))
  assert (np.asarray(edges[1]) != 0).all()


def test_a_small_but_real_difference_between_siblings_survives():
  values = tree_values((np.array([[1.0, 1.0, 1.0 - 2**-16]], np.float32),), (), (3,))
  (edges,) = tree_advantages(values, (np.ones((1, 3), bool),), (3,), "std")
  close(edges, [[0.7067985, 0.7067985, -1.4135971]], 2e-2)


def test_all_leaves_finished_at_level_one_ignores_what_is_below():
  rewards = (np.array([[1.0, 0.0]]), np.full((1, 6), np.nan))
  finished = (np.array([[True, True]]),)
  valid = (np.ones((1, 2), bool), np.zeros((1, 6), bool))
  values, edges = every_baseline(rewards, finished, valid, (2, 3))
  close(values[0], [[0.5]])
  for first, second in edges.values():
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(second, np.zeros((1, 6)))


def test_one_level_tree_equals_group_advantages():
  rewards = np.random.default_rng(0).choice([0.0, 0.3, 1.0], (4, 6)).astype(np.float32)
  rewards[1] = 0.1
  _, edges = every_baseline((rewards,), (), (np.ones((4, 6), bool),), (6,))
  group = np.repeat(np.arange(4), 6)
  for tree_form, group_form in (("mean", "mean"), ("std", "grpo"), ("leave_one_out", "rloo")):
    expected = group_advantages(rewards.reshape(-1), group, 4, group_form)
    close(edges[tree_form][0].reshape(-1), expected)


@pytest.mark.parametrize("baseline", advantages.TREE_BASELINES)
def test_invalid_nodes_leak_neither_forward_nor_into_gradients(baseline):
  branch = (2, 2, 3)
  rewards, finished, valid = draw_tree(np.random.default_rng(5), branch)
  assert not all(v.all() for v in valid)

  @jax.jit
  @jax.value_and_grad
  def total(rewards):
    values = advantages.tree_values(rewards, finished[:-1], branch)
    edges = advantages.tree_advantages(values, valid, branch, baseline)
    return sum((e * np.arange(1, e.shape[1] + 1)).sum() for e in edges)

  filled = tuple(np.nan_to_num(r, nan=3.0) for r in rewards)
  expected, gradient = total(filled)
  for garbage in (np.nan, np.inf):
    dirty = tuple(np.where(f, r, garbage) for f, r in zip(finished, rewards))
    actual, dirty_gradient = total(dirty)
    close(actual, expected)
    for g, d, f in zip(gradient, dirty_gradient, finished):
      close(d, g)
      np.testing.assert_array_equal(np.asarray(d)[~f], 0.0)


# Groups.


@pytest.mark.parametrize("case", golden.load("advantages")["group"])
def test_groups_agree_with_the_reference(case):
  missing = (0, 48 - len(case["group"]))
  group = np.pad(case["group"], missing, constant_values=-1)
  rewards, grpo, rloo = (np.pad(case[k], missing) for k in ("reward", "grpo", "rloo"))
  order = np.random.default_rng(0).permutation(48)  # groups need not be contiguous
  close(group_advantages(rewards[order], group[order], 4, "grpo"), grpo[order])
  close(group_advantages(rewards[order], group[order], 4, "rloo"), rloo[order])


@many
@given(
  hnp.arrays(np.float32, (12,), elements=tenths),
  hnp.arrays(np.int32, (12,), elements=st.integers(-1, 5)),
)
def test_groups_equal_brute_force(rewards, group):
  expected = {baseline: np.zeros(12) for baseline in advantages.GROUP_BASELINES}
  for g in range(5):  # -1 and 5 are padding
    (rows,) = np.nonzero(group == g)
    r = rewards[rows].astype(np.float64)
    if len(rows) == 0 or np.ptp(r) == 0:
      continue
    expected["mean"][rows] = r - r.mean()
    expected["grpo"][rows] = (r - r.mean()) / (r.std() + 1e-8)
    expected["rloo"][rows] = r - (r.sum() - r) / (len(r) - 1)
  for baseline, advantage in expected.items():
    close(group_advantages(rewards, group, 5, baseline), advantage)


def test_groups_by_hand():
  rewards, group = np.array([1.0, 7.0, 0.0, 0.0]), np.array([0, 1, 0, 0])
  close(group_advantages(rewards, group, 2, "mean"), [2 / 3, 0, -1 / 3, -1 / 3])
  close(group_advantages(rewards, group, 2, "rloo"), [1, 0, -0.5, -0.5])
  root2 = math.sqrt(2)
  close(group_advantages(rewards, group, 2, "grpo"), [root2, 0, -1 / root2, -1 / root2])


@pytest.mark.parametrize("baseline", advantages.GROUP_BASELINES)
def test_a_single_member_group_has_advantage_zero(baseline):
  advantage = group_advantages(np.array([0.3, 0.1, 0.9]), np.array([2, 0, 1]), 4, baseline)
  np.testing.assert_array_equal(advantage, np.zeros(3))


@pytest.mark.parametrize("baseline", advantages.GROUP_BASELINES)
def test_groups_of_equal_reward_give_exactly_zero(baseline):
  for value in (0.1, 1 / 3, -0.7):
    rewards = np.full(1024, value, np.float32)
    group = np.arange(1024) % 5
    advantage = group_advantages(rewards, group, 5, baseline)
    np.testing.assert_array_equal(advantage, np.zeros(1024))


@pytest.mark.parametrize("baseline", advantages.GROUP_BASELINES)
def test_padding_rows_and_other_groups_do_not_leak(baseline):
  rewards = np.array([1.0, 0.0, np.nan, np.nan, 0.5, np.nan], np.float32)
  group = np.array([0, 0, -1, 1, 0, 9])
  advantage = np.asarray(group_advantages(rewards, group, 2, baseline))
  clean = np.where(group == 0, rewards, 0.0)
  close(advantage[[0, 1, 4]], group_advantages(clean, group, 2, baseline)[np.array([0, 1, 4])])
  np.testing.assert_array_equal(advantage[[2, 5]], [0.0, 0.0])
  assert np.isnan(advantage[3]), "a broken reward stays visible in its own group"


# Per token.


@pytest.mark.parametrize("case", golden.load("advantages")["gae"])
def test_gae_agrees_with_the_reference(case):
  rewards, values, mask, expected, mc_returns = (
    padded(case[k]) for k in ("rewards", "values", "mask", "advantages", "mc_returns")
  )
  advantage, returns = gae(rewards, values, mask, case["gamma"], case["lam"])
  close(advantage, expected)
  close(returns, np.where(mask, expected + values, 0.0))
  close(monte_carlo_returns(rewards, mask, case["gamma"]), mc_returns)


def test_gae_by_hand():
  rewards, values = np.array([[0.0, 0.0, 1.0]]), np.array([[0.5, 0.25, 0.75]])
  mask = np.ones((1, 3), bool)
  advantage, returns = gae(rewards, values, mask, 1.0, 0.0)
  close(advantage, [[-0.25, 0.5, 0.25]])
  close(returns, [[0.25, 0.75, 1.0]])
  advantage, _ = gae(rewards, values, mask, 0.5, 0.5)
  close(advantage, [[-0.328125, 0.1875, 0.25]])


@many
@given(
  tokens_drawn, tokens_drawn, masks_drawn, st.floats(0, 1, width=32), st.floats(0, 1, width=32)
)
def test_gae_equals_brute_force(rewards, values, mask, gamma, lam):
  expected = np.zeros((B, T))
  for b in range(B):
    tokens = np.flatnonzero(mask[b])
    ladder = [*values[b, tokens], 0.0]
    deltas = [rewards[b, t] + gamma * ladder[k + 1] - ladder[k] for k, t in enumerate(tokens)]
    for k, t in enumerate(tokens):
      expected[b, t] = sum((gamma * lam) ** j * d for j, d in enumerate(deltas[k:]))
  advantage, returns = gae(rewards, values, mask, gamma, lam)
  close(advantage, expected)
  close(returns, np.where(mask, expected + values, 0.0))


def test_undiscounted_gae_is_reward_minus_value():
  rng = np.random.default_rng(0)
  lengths, outcome = np.array([T, 4, 1, 6]), rng.random(B)
  mask = np.arange(T) < lengths[:, None]
  values = rng.random((B, T))
  rewards = np.zeros((B, T))
  rewards[np.arange(B), lengths - 1] = outcome
  advantage, returns = gae(rewards, values, mask, 1.0, 1.0)
  close(advantage, np.where(mask, outcome[:, None] - values, 0.0))
  close(returns, np.where(mask, outcome[:, None], 0.0))


@pytest.mark.parametrize("case", golden.load("advantages")["whiten"])
def test_whiten_agrees_with_the_reference(case):
  values, mask = padded(case["values"]), padded(case["mask"]) != 0
  uncertain = mask & (np.exp(padded(case["logprobs"])) < 0.9)
  # The reference scales what is masked out too; ours is 0 there.
  close(whiten(values, mask, True), np.where(mask, padded(case["whitened"]), 0.0))
  close(whiten(values, mask, False), np.where(mask, padded(case["rescaled_by_std"]), 0.0))
  expected = np.where(uncertain, padded(case["whitened_prob_masked"]), 0.0)
  close(whiten(values, uncertain, True), expected)


@many
@given(tokens_drawn, masks_drawn)
def test_whiten_equals_brute_force(values, mask):
  kept = values[mask].astype(np.float64)
  variance = kept.var(ddof=1) if len(kept) > 1 else 0.0
  for shift_mean in (True, False):
    shift = kept.mean() if shift_mean and len(kept) else 0.0
    expected = np.where(mask, (values - shift) / np.sqrt(variance + 1e-8), 0.0)
    if shift_mean and len(kept) and np.ptp(kept) == 0:
      expected = np.zeros_like(expected)
    close(whiten(values, mask, shift_mean), expected)


def test_whiten_of_one_or_two_advantages_by_hand():
  """One has no variance; 2 and 4 have 2, which is not that of a population, 1."""
  values, half = np.array([[2.0, 4.0, 9.0]], np.float32), 1 / np.sqrt(2)
  one, two = np.array([[True, False, False]]), np.array([[True, True, False]])
  close(whiten(values, one, True), np.zeros((1, 3)))
  close(whiten(values, one, False), np.array([[2e4, 0, 0]]))
  close(whiten(values, two, True), np.array([[-half, half, 0]]))
  close(whiten(values, two, False), np.array([[2 * half, 4 * half, 0]]))


def test_whiten_of_equal_advantages_is_exactly_zero():
  for value in (0.1, 0.7, -1.3):  # whose float32 mean over 792 tokens is another number
    whitened = whiten(np.full((8, 99), value, np.float32), np.ones((8, 99), bool), True)
    np.testing.assert_array_equal(whitened, np.zeros((8, 99)))


def test_equal_rewards_have_finite_gradients():
  rewards, group = np.full(6, 0.1, np.float32), np.array([0, 0, 1, 1, 1, 2])
  valid = (np.ones((1, 6), bool),)

  def total(rewards):
    values = advantages.tree_values((rewards[None],), (), (6,))
    (edges,) = advantages.tree_advantages(values, valid, (6,), "std")
    return (edges**2).sum() + advantages.group_advantages(rewards, group, 3, "grpo").sum()

  np.testing.assert_array_equal(jax.jit(jax.grad(total))(rewards), np.zeros(6))


def test_masked_tokens_leak_neither_forward_nor_into_gradients():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, B, T)).astype(np.float32)
  mask = np.arange(T) < np.array([T, 4, 0, 1])[:, None]

  def total(x, y, shift_mean):
    advantage, returns = advantages.gae(x, y, mask, 0.9, 0.8)
    whitened = advantages.whiten(x, mask, shift_mean)
    return ((advantage + 2 * returns + 3 * whitened) * np.arange(T)).sum()

  value_and_grad = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)
  for shift_mean in (True, False):
    expected, gradients = value_and_grad(x, y, shift_mean)
    for garbage in (np.nan, np.inf, 1e30):
      dirty = [np.where(mask, a, garbage).astype(np.float32) for a in (x, y)]
      actual, dirty_gradients = value_and_grad(*dirty, shift_mean)
      np.testing.assert_array_equal(actual, expected)
      for g, d in zip(gradients, dirty_gradients):
        np.testing.assert_array_equal(d, g)
        np.testing.assert_array_equal(np.asarray(d)[~mask], 0.0)


def test_values_past_the_last_segment_get_no_gradient():
  segment = np.array([[0, 0, 1, -1], [-1, -1, -1, -1]])
  values = np.array([[0.5, 0.25, np.nan], [np.nan] * 3], np.float32)
  weights = np.array([[1.0, 2.0, 4.0, 8.0]] * 2)

  def total(values, rewards):
    return (advantages.segment_advantages(values, rewards, segment) * weights).sum()

  gradients = jax.jit(jax.grad(total, (0, 1)))(values, np.array([1.0, np.nan], np.float32))
  close(gradients[0], [[-3, 3 - 4, 0], [0, 0, 0]])
  close(gradients[1], [4, 0])


def test_a_row_does_not_depend_on_its_mates():
  rng = np.random.default_rng(0)
  values, rewards = rng.random((B, T)), rng.random(B)
  segment = np.asarray(segments.even_segments(np.array([T, 5, 2, 0]), 3, T))
  branch = (2, 3)
  tree_rewards, finished, valid = draw_tree(rng, branch, prompts=B)
  tree = tree_values(tree_rewards, finished, branch)
  edges = tree_advantages(tree, valid, branch, "std")
  whole = segment_advantages(values, rewards, segment), gae(values, values, segment >= 0, 1, 0.9)
  for b in range(B):
    row = slice(b, b + 1)
    alone = segment_advantages(values[row], rewards[row], segment[row])
    np.testing.assert_array_equal(alone, whole[0][row])
    alone = gae(values[row], values[row], segment[row] >= 0, 1, 0.9)
    np.testing.assert_array_equal(alone[0], whole[1][0][row])
    one_tree = tree_values([r[row] for r in tree_rewards], [f[row] for f in finished], branch)
    one = tree_advantages(one_tree, [v[row] for v in valid], branch, "std")
    np.testing.assert_array_equal(np.hstack(one), np.hstack([e[row] for e in edges]))


def test_results_are_float32():
  one, two = np.ones(2), np.ones((2, 2))
  results = [
    segment_advantages(two, one, np.zeros((2, 2), int)),
    *advantages.tree_values((two.astype(int),), (), (2,)),  # integers, and not traced
    *tree_advantages((np.ones((2, 1)), two), (two > 0,), (2,), "std"),
    group_advantages(one, np.zeros(2, int), 1, "grpo"),
    *gae(two, two, two > 0, 1.0, 1.0),
    whiten(two, two > 0, True),
  ]
  assert {r.dtype for r in results} == {jnp.dtype(jnp.float32)}


def test_bad_arguments_name_themselves_and_the_choices():
  one, two = np.ones(2), np.ones((1, 2))
  with pytest.raises(ValueError, match=r"'median'.*grpo, rloo, mean"):
    advantages.group_advantages(one, one, 1, "median")
  with pytest.raises(ValueError, match=r"'rloo'.*mean, std, leave_one_out, pav"):
    advantages.tree_advantages((np.ones((1, 1)), two), (two,), (2,), "rloo")
  with pytest.raises(ValueError, match=r"\(2, 2\) makes 2 levels.*got 1"):
    advantages.tree_values((two,), (two,), (2, 2))
  with pytest.raises(ValueError, match=r"\(2,\) makes 1 levels and a root.*got 1"):
    advantages.tree_advantages((two,), (two,), (2,), "mean")
  with pytest.raises(AssertionError):
    advantages.tree_values((np.ones((1, 3)),), (), (2,))
