"""A task small enough to know every value exactly, against the Monte Carlo estimators.

Vocabulary {0, 1, END}, at most four tokens. The prefixes are a binary heap: appending 0 or 1
to prefix i makes prefix 2i + 1 or 2i + 2; prefixes of four tokens (15..30) are over. Policy
and reward are random tables, so nothing is symmetric by accident.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from spo_jax import advantages, segments

HORIZON, END = 4, 2
OPEN, ALL = 2**HORIZON - 1, 2 ** (HORIZON + 1) - 1
TABLES = np.random.default_rng(7)
POLICY = TABLES.dirichlet([2.0, 2.0, 1.0], OPEN)  # [prefix, token]
REWARD = TABLES.choice([0.0, 1.0], ALL)  # of stopping at a prefix
Z_LIMIT = 4.5  # standard errors; 7 in a million for one comparison, and seeds are fixed

segment_advantages = jax.jit(advantages.segment_advantages)
tree_values = jax.jit(advantages.tree_values, static_argnums=2)
tree_advantages = jax.jit(advantages.tree_advantages, static_argnums=(2, 3))


def exact_values():
  """V(prefix), backwards from the end."""
  value = REWARD.copy()
  for i in reversed(range(OPEN)):
    value[i] = POLICY[i] @ [value[2 * i + 1], value[2 * i + 2], REWARD[i]]
  return value


def all_responses():
  """Every response: tokens padded by -1, the prefixes in front of them, its probability."""
  done, growing = [], [([], [0], 1.0)]
  while growing:
    tokens, prefixes, chance = growing.pop()
    i = prefixes[-1]
    if i >= OPEN:
      done.append((tokens, prefixes[:-1], chance, REWARD[i]))
      continue
    done.append(([*tokens, END], prefixes, chance * POLICY[i, END], REWARD[i]))
    for token in (0, 1):
      grown = [*prefixes, 2 * i + 1 + token]
      growing.append(([*tokens, token], grown, chance * POLICY[i, token]))
  wide = lambda rows: np.array([r + [-1] * (HORIZON - len(r)) for r in rows])
  tokens, prefixes, chances, rewards = zip(*done)
  return wide(tokens), wide(prefixes), np.array(chances), np.array(rewards)


VALUE = exact_values()
TOKENS, PREFIXES, CHANCES, REWARDS = all_responses()
LENGTHS = (TOKENS >= 0).sum(axis=1)


def step(rng, prefix, stopped):
  """One token for every prefix that is not over."""
  going = ~stopped & (prefix < OPEN)
  chances = POLICY[np.where(going, prefix, 0)].cumsum(axis=-1)
  token = (rng.random(prefix.shape)[..., None] > chances[..., :2]).sum(axis=-1)
  stopped = stopped | (going & (token == END))
  return np.where(going & (token != END), 2 * prefix + 1 + token, prefix), stopped


def rewards_of_continuations(rng, prefix, count):
  """Mean reward of `count` fresh continuations of every prefix."""
  prefix = np.repeat(prefix[..., None], count, axis=-1)
  stopped = np.zeros(prefix.shape, bool)
  for _ in range(HORIZON):
    prefix, stopped = step(rng, prefix, stopped)
  return REWARD[prefix].mean(axis=-1)


def assert_unbiased(draws, exact):
  """z-test of the mean over axis 0; what never varies must be exact."""
  error = draws.mean(axis=0) - exact
  standard_error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
  assert (np.abs(error) <= Z_LIMIT * standard_error + 1e-6).all()


def partition(name):
  logprobs = np.where(
    TOKENS >= 0, np.log(np.take_along_axis(POLICY[PREFIXES], TOKENS[..., None], 2)[..., 0]), 0.0
  )
  return np.asarray(
    {
      "cutpoints": lambda: segments.cutpoint_segments(logprobs, TOKENS >= 0, 0.45, 2),
      "even": lambda: segments.even_segments(LENGTHS, 2, HORIZON),
      "tokens": lambda: segments.token_segments(LENGTHS, HORIZON),
    }[name]()
  )


def boundary_prefixes(segment):
  """Prefix in front of every segment, [rows, S]; prefix 0 where there is none."""
  starts = np.asarray(segments.segment_starts(segment, HORIZON))
  prefixes = np.take_along_axis(PREFIXES, np.minimum(starts, HORIZON - 1), axis=1)
  return np.where(starts < HORIZON, prefixes, 0)


def exact_advantages(segment):
  """A of every token of every response, from the table, token by token."""
  exact = np.zeros(segment.shape)
  for row, ids in enumerate(segment):
    for t, k in enumerate(ids):
      if k >= 0:
        front = VALUE[PREFIXES[row, np.flatnonzero(ids == k)[0]]]
        later = np.flatnonzero(ids == k + 1)
        after = VALUE[PREFIXES[row, later[0]]] if len(later) else REWARDS[row]
        exact[row, t] = after - front
  return exact


def chain_draws(rng, segment, count, draws):
  """`draws` independent chain estimates of every response's token advantages."""
  fronts = np.broadcast_to(boundary_prefixes(segment), (draws, *segment.shape))
  values = rewards_of_continuations(rng, fronts, count).reshape(-1, HORIZON)
  repeat = lambda x: np.tile(x, (draws,) + (1,) * (x.ndim - 1))
  estimate = segment_advantages(values, repeat(REWARDS), repeat(segment))
  return np.asarray(estimate, np.float64).reshape(draws, *segment.shape)


def test_the_table_agrees_with_the_enumeration_of_all_responses():
  assert len(CHANCES) == ALL and np.isclose(CHANCES.sum(), 1)
  for prefix in range(OPEN):
    through = (prefix == PREFIXES).any(axis=1)
    np.testing.assert_allclose(
      (CHANCES * REWARDS)[through].sum() / CHANCES[through].sum(), VALUE[prefix]
    )


@pytest.mark.parametrize("name", ["cutpoints", "even", "tokens"])
def test_chain_advantages_are_unbiased(name):
  segment = partition(name)
  assert segment.max() >= 1
  draws = chain_draws(np.random.default_rng(0), segment, 3, 1500)
  exact = exact_advantages(segment)
  assert_unbiased(draws, exact)
  with pytest.raises(AssertionError):
    assert_unbiased(draws, exact * 1.1)  # the test has the power to see 10 %


def test_chain_error_falls_as_one_over_root_n():
  segment = partition("cutpoints")
  exact, counts = exact_advantages(segment), np.array([1, 4, 16, 64])
  errors = [
    np.sqrt(((chain_draws(np.random.default_rng(n), segment, n, 100) - exact) ** 2).mean())
    for n in counts
  ]
  slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
  assert abs(slope + 0.5) < 0.03


def test_exact_values_give_advantages_that_average_to_zero():
  """Under the policy, no token is better than the average token."""
  exact = segment_advantages(
    VALUE[boundary_prefixes(partition("tokens"))], REWARDS, partition("tokens")
  )
  for prefix in range(OPEN):
    here = prefix == PREFIXES
    weights = np.broadcast_to(CHANCES[:, None], here.shape)[here]
    np.testing.assert_allclose((weights * np.asarray(exact)[here]).sum(), 0, atol=1e-6)


def grow_trees(rng, branch, trees):
  """Tree rollouts, one token per level and the last level to the end.

  Returns rewards, finished and valid over levels 1..D, and every node's prefix (levels 0..D).
  """
  prefix, over = np.zeros((trees, 1), int), np.zeros((trees, 1), bool)
  rewards, finished, valid, prefixes = [], [], [], [prefix]
  for level, b in enumerate(branch):
    prefix, over = (np.repeat(x, b, axis=1) for x in (prefix, over))
    exists, stopped = ~over, over
    for _ in range(HORIZON if level == len(branch) - 1 else 1):
      prefix, stopped = step(rng, prefix, stopped)
    over = stopped | (prefix >= OPEN)
    rewards.append(np.where(exists & over, REWARD[prefix], np.nan).astype(np.float32))
    finished.append(exists & over)
    valid.append(exists)
    prefixes.append(prefix)
  return tuple(rewards), tuple(finished), tuple(valid), prefixes


def level_one_values(finished, prefixes):
  return np.where(finished[0], REWARD[prefixes[1]], VALUE[prefixes[1]])


def test_tree_values_are_unbiased():
  branch = (3, 2, 2)
  rewards, finished, _, prefixes = grow_trees(np.random.default_rng(1), branch, 8000)
  values = [np.asarray(v, np.float64) for v in tree_values(rewards, finished, branch)]
  assert_unbiased(values[0], VALUE[:1])
  for stopped in (False, True):
    for prefix in np.unique(prefixes[1][finished[0] == stopped]):
      here = (prefixes[1] == prefix) & (finished[0] == stopped)
      exact = REWARD[prefix] if stopped else VALUE[prefix]
      assert_unbiased(values[1][here], exact)


def test_tree_error_falls_as_one_over_root_of_the_branch_factor():
  branches = [1, 4, 16, 64]
  errors = []
  for b in branches:
    rewards, finished, _, _ = grow_trees(np.random.default_rng(b), (b, 1), 4000)
    root = tree_values(rewards, finished, (b, 1))[0]
    errors.append(np.sqrt(((np.asarray(root) - VALUE[0]) ** 2).mean()))
  slope = np.polyfit(np.log(branches), np.log(errors), 1)[0]
  assert abs(slope + 0.5) < 0.03


@pytest.mark.parametrize(("baseline", "scale"), [("leave_one_out", 1.0), ("mean", 2 / 3)])
def test_leave_one_out_is_unbiased_and_mean_is_smaller_by_one_over_b(baseline, scale):
  """The parent's mean includes the node, which takes 1 / b = 1/3 off its advantage."""
  branch = (3, 2, 2)
  rewards, finished, valid, prefixes = grow_trees(np.random.default_rng(2), branch, 8000)
  values = tree_values(rewards, finished, branch)
  edges = np.asarray(tree_advantages(values, valid, branch, baseline)[0], np.float64)
  exact = scale * (level_one_values(finished, prefixes) - VALUE[0])
  for edge in np.unique(exact):
    draws = edges[exact == edge]
    assert_unbiased(draws, edge)
    with pytest.raises(AssertionError):
      assert_unbiased(draws, edge * 1.3)


def test_rloo_is_unbiased_given_the_own_reward():
  draws, size = 4000, 4
  rewards = rewards_of_continuations(np.random.default_rng(3), np.zeros((draws, size), int), 1)
  group = np.repeat(np.arange(draws), size)
  rloo = np.asarray(
    advantages.group_advantages(rewards.reshape(-1), group, draws, "rloo"), np.float64
  ).reshape(draws, size)[:, 0]
  for own in (0.0, 1.0):
    assert_unbiased(rloo[rewards[:, 0] == own], own - VALUE[0])
