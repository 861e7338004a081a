"""Advantages: how much a segment, a tree node, a response or a token changed the reward.

Every estimator is a pure function of rewards and values, in reward units unless it divides
by a deviation. Rows, trees and groups do not see each other; only `whiten` looks at all.

Where values agree the advantage is exactly 0. Rounding would not give that by itself: the
float32 mean of six times 0.1 is not 0.1, and a standard deviation of 1e-9 over 1e-8 is no
longer small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

TREE_BASELINES = ("mean", "std", "leave_one_out", "pav")
GROUP_BASELINES = ("grpo", "rloo", "mean")

_ROUNDING = 2e-6  # relative error that nested float32 means of up to 32 values can carry


def segment_advantages(values: jax.Array, rewards: jax.Array, segment: jax.Array) -> jax.Array:
  """Token advantage: how much its segment changed the expected reward.

    A_k = V(s_{k+1}) - V(s_k)                    SPO, arXiv:2505.23564

  The value after the last segment is the response's own reward.

  Args:
    values: f32[B, S] Monte Carlo mean reward in front of each segment; entries past the
      last segment are ignored.
    rewards: f32[B] reward of the whole response, reward units.
    segment: i32[B, T], -1 where a token belongs to no segment; an id of S or more has no
      value and gives NaN.
  Returns: f32[B, T], reward units; 0 where segment is -1.
  """
  chex.assert_rank([values, rewards, segment], [2, 1, 2])
  chex.assert_equal_shape_prefix([values, rewards, segment], 1)
  end = jnp.max(segment, axis=1, keepdims=True, initial=-1) + 1
  values = jnp.pad(values, ((0, 0), (0, 1)), constant_values=jnp.nan)
  values = jnp.where(jnp.arange(values.shape[1]) == end, rewards[:, None], values)
  front = jnp.maximum(segment, 0)
  after = jnp.take_along_axis(values, front + 1, axis=1)
  change = after - jnp.take_along_axis(values, front, axis=1)
  return jnp.where(segment >= 0, change, 0.0)


def tree_values(
  rewards: Sequence[jax.Array],
  finished: Sequence[jax.Array],
  branch_factors: Sequence[int],
) -> tuple[jax.Array, ...]:
  """Value of every tree node, deepest level first.

    V(leaf) = reward,  V(n) = mean of V(children)      SPO-tree, arXiv:2505.23564

  Args:
    rewards: over levels 1..D, f32[P, n_d]; read on finished nodes and on the last level.
    finished: over levels 1..D, bool[P, n_d], True on graded leaves; the last level needs
      none. What stands below a finished node is ignored.
    branch_factors: (b_1, ..., b_D); node i's children are i*b .. i*b + b - 1.
  Returns: over levels 0..D, f32[P, n_d], reward units; level 0 is the root, n_0 = 1.
  Raises: ValueError if the levels do not match `branch_factors`.
  """
  depth = len(branch_factors)
  if depth < 1 or len(rewards) != depth or len(finished) not in (depth - 1, depth):
    raise ValueError(
      f"branch_factors={tuple(branch_factors)} makes {depth} levels; "
      f"got {len(rewards)} of rewards and {len(finished)} of finished."
    )
  _check_levels(rewards, branch_factors)
  _check_levels(finished[: depth - 1], branch_factors)
  value = jnp.asarray(rewards[-1], jnp.float32)
  values = [value]
  for level in reversed(range(depth)):
    value = _siblings(value, branch_factors[level]).mean(-1)
    if level > 0:
      value = jnp.where(finished[level - 1] != 0, rewards[level - 1], value)
    values.append(value)
  return tuple(reversed(values))


def tree_advantages(
  values: Sequence[jax.Array],
  valid: Sequence[jax.Array],
  branch_factors: Sequence[int],
  baseline: str,
) -> tuple[jax.Array, ...]:
  """Advantage of every tree edge, from a node's parent to the node.

    mean           V(n) - V(parent)                          SPO-tree, arXiv:2505.23564
    std            (V(n) - V(parent)) / (std_pop(V over siblings and n) + 1e-8)     "
    leave_one_out  V(n) - mean of V over siblings without n  RLOO, arXiv:2402.14740
    pav            V(n) + 5 (BoK(V(n)) - BoK(V(parent))), BoK(v) = 1 - (1 - v)^4
                                                             PAV, arXiv:2410.08146

  Args:
    values: over levels 0..D, f32[P, n_d], from `tree_values`.
    valid: over levels 1..D, bool[P, n_d], False below finished nodes.
    branch_factors: (b_1, ..., b_D).
    baseline: one of TREE_BASELINES.
  Returns: over levels 1..D, f32[P, n_d]; 0 where not valid. Reward units, except for std.
  Raises: ValueError for an unknown baseline or if the levels do not match.
  """
  if baseline not in TREE_BASELINES:
    raise ValueError(f"baseline={baseline!r}: choose one of {', '.join(TREE_BASELINES)}.")
  depth = len(branch_factors)
  if len(values) != depth + 1 or len(valid) != depth:
    raise ValueError(
      f"branch_factors={tuple(branch_factors)} makes {depth} levels and a root; "
      f"got {len(values)} of values and {len(valid)} of valid."
    )
  _check_levels(values[1:], branch_factors)
  _check_levels(valid, branch_factors)

  advantages = []
  for level, branch in enumerate(branch_factors):
    exists = _siblings(valid[level], branch) != 0
    # Masked on the way in: garbage in invalid nodes reaches no gradient, and 0 - 0 is 0.
    value = jnp.where(exists, _siblings(values[level + 1], branch), 0.0)
    parent = jnp.where(exists, values[level][:, :, None], 0.0)
    count = jnp.maximum(exists.sum(-1, keepdims=True), 1)
    scale = jnp.abs(value).max(-1, keepdims=True)
    if baseline == "pav":
      advantage = value + 5.0 * (_best_of_4(value) - _best_of_4(parent))
    else:
      gain = _drop_rounding(value - parent, scale)
      mean = value.sum(-1, keepdims=True) / count
      deviation = jnp.where(exists, _drop_rounding(value - mean, scale), 0.0)
      if baseline == "std":
        std = jnp.sqrt((deviation**2).sum(-1, keepdims=True) / count)
        advantage = gain / (std + 1e-8)
      elif baseline == "leave_one_out":
        advantage = deviation * count / jnp.maximum(count - 1, 1)
      else:
        advantage = gain
    advantages.append(advantage.reshape(valid[level].shape))
  return tuple(advantages)


def group_advantages(
  rewards: jax.Array, group: jax.Array, num_groups: int, baseline: str
) -> jax.Array:
  """Advantage of a whole response among the responses to the same prompt.

    grpo  (r - mean) / (std_pop + 1e-8)          GRPO, arXiv:2402.03300
    rloo  r - mean of the others                 RLOO, arXiv:2402.14740
    mean  r - mean                               Dr. GRPO, arXiv:2503.20783

  Args:
    rewards: f32[B].
    group: i32[B], in any order and of any sizes; a row outside 0..num_groups-1 is padding.
    num_groups: static.
    baseline: one of GROUP_BASELINES.
  Returns: f32[B], reward units except for grpo; 0 in groups whose rewards agree, which a
    response without company always does, and on padding.
  Raises: ValueError for an unknown baseline.
  """
  if baseline not in GROUP_BASELINES:
    raise ValueError(f"baseline={baseline!r}: choose one of {', '.join(GROUP_BASELINES)}.")
  chex.assert_rank([rewards, group], 1)
  chex.assert_equal_shape([rewards, group])
  member = (group >= 0) & (group < num_groups)
  slot = jnp.where(member, group, num_groups)  # padding makes one more group

  def over_group(reduce: Callable, x: jax.Array) -> jax.Array:
    return reduce(x, slot, num_segments=num_groups + 1)[slot]

  size = over_group(jax.ops.segment_sum, jnp.ones_like(rewards))
  mean = over_group(jax.ops.segment_sum, rewards) / size
  highest = over_group(jax.ops.segment_max, rewards)
  equal = highest == over_group(jax.ops.segment_min, rewards)
  advantage = jnp.where(equal, 0.0, rewards - mean)
  if baseline == "grpo":
    std = jnp.sqrt(over_group(jax.ops.segment_sum, advantage**2) / size)
    advantage = advantage / (std + 1e-8)
  elif baseline == "rloo":
    advantage = advantage * size / jnp.maximum(size - 1, 1)
  return jnp.where(member, advantage, 0.0)


def gae(
  rewards: jax.Array, values: jax.Array, mask: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
  """Generalised advantage estimation, and the returns that the critic is fitted to.

    A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t
                                                 GAE, arXiv:1506.02438

  t + 1 is the next token of the mask; after the last one V and A are 0.

  Args:
    rewards: f32[B, T] per token.
    values: f32[B, T], the critic's value in front of each token.
    mask: bool[B, T], True on response tokens.
    gamma: discount per token.
    lam: 0 for one-step differences, 1 for Monte Carlo.
  Returns: (advantages, returns), both f32[B, T] in reward units; returns = A + V; 0 outside
    the mask.
  """
  chex.assert_rank([rewards, values, mask], 2)
  chex.assert_equal_shape([rewards, values, mask])
  inside = mask != 0
  values = jnp.where(inside, values, 0.0)

  def step_back(following, token):
    next_advantage, next_value = following
    reward, value, here = token
    delta = reward + gamma * next_value - value
    advantage = jnp.where(here, delta + gamma * lam * next_advantage, next_advantage)
    return (advantage, jnp.where(here, value, next_value)), advantage

  end = jnp.zeros_like(values[:, 0])
  tokens = (rewards.T, values.T, inside.T)
  _, advantages = jax.lax.scan(step_back, (end, end), tokens, reverse=True)
  advantages = jnp.where(inside, advantages.T, 0.0)
  return advantages, advantages + values


def monte_carlo_returns(rewards: jax.Array, mask: jax.Array, gamma: float) -> jax.Array:
  """Discounted sum of the rewards still to come, f32[B, T]; 0 outside the mask.

    G_t = r_t + gamma G_{t+1}                    Sutton & Barto, 2nd ed., eq. 3.9

  Args:
    rewards: f32[B, T] per token.
    mask: bool[B, T], True on response tokens.
    gamma: discount per token.
  """
  return gae(rewards, jnp.zeros_like(rewards), mask, gamma, 1.0)[0]


def whiten(advantages: jax.Array, mask: jax.Array, shift_mean: bool = True) -> jax.Array:
  """Advantages scaled to unit variance over all masked tokens of the array.

    (A - mean) / sqrt(var + 1e-8), var unbiased  VinePPO, arXiv:2410.01679 (code)

  Args:
    advantages: f32[B, T].
    mask: bool[B, T], the tokens that are counted.
    shift_mean: False divides only, A / sqrt(var + 1e-8).
  Returns: f32[B, T], no unit; 0 outside the mask.
  """
  chex.assert_rank([advantages, mask], 2)
  chex.assert_equal_shape([advantages, mask])
  inside = mask != 0
  inputs = jnp.where(inside, advantages, 0.0)
  count = inside.sum()
  highest = jnp.max(jnp.where(inside, inputs, -jnp.inf), initial=-jnp.inf)
  equal = highest == jnp.min(jnp.where(inside, inputs, jnp.inf), initial=jnp.inf)
  mean = inputs.sum() / jnp.maximum(count, 1)
  deviation = jnp.where(inside & ~equal, inputs - mean, 0.0)
  variance = (deviation**2).sum() / jnp.maximum(count - 1, 1)
  return (deviation if shift_mean else inputs) * jax.lax.rsqrt(variance + 1e-8)


def _siblings(level: jax.Array, branch: int) -> jax.Array:
  """[P, n] -> [P, n / branch, branch]: the children of each parent."""
  return level.reshape(level.shape[0], -1, branch)


def _check_levels(levels: Sequence[jax.Array], branch_factors: Sequence[int]) -> None:
  for depth, level in enumerate(levels, start=1):
    chex.assert_shape(level, (levels[0].shape[0], math.prod(branch_factors[:depth])))


def _best_of_4(value: jax.Array) -> jax.Array:
  """Chance that the best of 4 independent tries succeeds."""
  return 1.0 - (1.0 - value) ** 4


def _drop_rounding(difference: jax.Array, scale: jax.Array) -> jax.Array:
  """0 where a difference of numbers of this scale is no more than float32 rounding."""
  return jnp.where(jnp.abs(difference) <= _ROUNDING * scale, 0.0, difference)
