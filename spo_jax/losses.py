"""Losses: sums over tokens, and what to divide them by.

Every loss returns (sum, count, ...) so that micro-batches and devices can be added up;
`mean` divides, once, over the whole optimiser batch. Masked-out tokens are replaced before
any arithmetic, so whatever stands there reaches neither a loss nor a gradient.
`logprobs[:, t]` scores `tokens[:, t]`.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

KL_KINDS = ("k1", "abs", "k2", "k3")

_LOG_RATIO_LIMIT = 10.0  # nats; e^10 is far outside any clip range and still finite


def mean(total: jax.Array, count: jax.Array) -> jax.Array:
  """The one place that divides: sum over count, 0 where nothing was counted."""
  return total / jnp.maximum(count, 1)


def policy_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  clip_low: float,
  clip_high: float,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Clipped policy objective over the tokens of the probability mask.

    -sum_t M_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t),  r_t = pi / pi_old
                                                 SPO, arXiv:2505.23564; PPO, arXiv:1707.06347

  Args:
    logprobs: f32[B, T] under the policy that is trained.
    old_logprobs: f32[B, T] under the behaviour policy. log r_t is clamped to +-10.
    advantages: f32[B, T], reward units or whitened.
    mask: bool[B, T], M_t.
    clip_low: 1 - low is the smallest ratio that still learns from a negative advantage.
    clip_high: 1 + high is the largest ratio that still learns from a positive advantage.
  Returns: (sum, count of masked tokens, metrics); metrics are sums over the same tokens:
    ratio_sum, clipped_sum (tokens that the clip silenced), policy_kl_sum (k1 of old against
    new) and approx_kl_sum (k2), in nats.
  """
  chex.assert_rank([logprobs, old_logprobs, advantages, mask], 2)
  chex.assert_equal_shape([logprobs, old_logprobs, advantages, mask])
  inside, (logprobs, old_logprobs, advantages) = _masked(mask, logprobs, old_logprobs, advantages)
  log_ratio = jnp.clip(logprobs - old_logprobs, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
  ratio = jnp.exp(log_ratio)
  plain = -ratio * advantages
  clipped = -jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantages
  metrics = {
    "ratio_sum": jnp.where(inside, ratio, 0.0).sum(),
    "clipped_sum": (clipped > plain).sum(dtype=jnp.float32),
    "policy_kl_sum": -log_ratio.sum(),
    "approx_kl_sum": 0.5 * (log_ratio**2).sum(),
  }
  return jnp.maximum(plain, clipped).sum(), _count(inside), metrics


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, kind: str) -> jax.Array:
  """Per-token estimate of KL(policy || reference) at the sampled token.

    k1   logp - ref              k2   (logp - ref)^2 / 2
    abs  |logp - ref|            k3   e^d - d - 1, d = ref - logp clamped to +-10
                                                 Schulman, joschu.net/blog/kl-approx.html

  Args:
    logprobs: f32[B, T] under the policy.
    ref_logprobs: f32[B, T] under the reference.
    kind: one of KL_KINDS.
  Returns: f32[B, T], nats; k1 may be negative.
  Raises: ValueError for an unknown kind.
  """
  if kind not in KL_KINDS:
    raise ValueError(f"kind={kind!r}: choose one of {', '.join(KL_KINDS)}.")
  chex.assert_rank([logprobs, ref_logprobs], 2)
  chex.assert_equal_shape([logprobs, ref_logprobs])
  difference = jnp.asarray(logprobs - ref_logprobs, jnp.float32)
  if kind == "k1":
    return difference
  if kind == "abs":
    return jnp.abs(difference)
  if kind == "k2":
    return 0.5 * difference**2
  d = jnp.clip(-difference, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
  return jnp.expm1(d) - d


def kl_loss(
  logprobs: jax.Array,
  ref_logprobs: jax.Array,
  mask: jax.Array,
  kind: str,
  floor: float | None = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """KL estimate summed over masked tokens.

    sum_t M_t max(kl_t, floor)                   SPO, arXiv:2505.23564 (code)

  Args:
    logprobs, ref_logprobs: f32[B, T].
    mask: bool[B, T], M_t.
    kind: one of KL_KINDS.
    floor: nats per token; only k1 goes below 0. None: no floor.
  Returns: (sum, count of masked tokens). Dividing by count is the token mean; dividing by
    the number of responses is the authors' form, summed over tokens and mean over rows.
  Raises: ValueError for an unknown kind.
  """
  chex.assert_equal_shape([logprobs, ref_logprobs, mask])
  inside, (logprobs, ref_logprobs) = _masked(mask, logprobs, ref_logprobs)
  kl = kl_estimate(logprobs, ref_logprobs, kind)
  if floor is not None:
    # Not jnp.maximum: at kl == floor, where training starts, it would halve the gradient.
    kl = jnp.where(kl < floor, floor, kl)
  return jnp.where(inside, kl, 0.0).sum(), _count(inside)


def value_loss(
  values: jax.Array, old_values: jax.Array, returns: jax.Array, mask: jax.Array, clip: float
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Critic loss, with values held near those of the rollout.

    1/2 sum_t M_t max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2)
                                                 PPO, arXiv:1707.06347 (code)

  Args:
    values, old_values, returns: f32[B, T], reward units.
    mask: bool[B, T], M_t.
    clip: c, reward units.
  Returns: (sum, count of masked tokens, metrics); metrics hold clipped_sum.
  """
  chex.assert_rank([values, old_values, returns, mask], 2)
  chex.assert_equal_shape([values, old_values, returns, mask])
  inside, (values, old_values, returns) = _masked(mask, values, old_values, returns)
  plain = (values - returns) ** 2
  clipped = (jnp.clip(values, old_values - clip, old_values + clip) - returns) ** 2
  metrics = {"clipped_sum": (clipped > plain).sum(dtype=jnp.float32)}
  return 0.5 * jnp.maximum(plain, clipped).sum(), _count(inside), metrics


def dvo_loss(
  logprobs: jax.Array,
  old_logprobs: jax.Array,
  ref_logprobs: jax.Array,
  advantages: jax.Array,
  mask: jax.Array,
  beta: float,
  weight_max: float = 10.0,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
  """Direct value optimisation: regress the log-ratio of a whole edge on its advantage.

    1/2 w (beta sum_t (logp - ref) - A)^2,  w = min(e^{sum_t (logp - old)}, w_max), constant
                                                 SPO, arXiv:2505.23564 (code)

  Args:
    logprobs, old_logprobs, ref_logprobs: f32[B, T], one edge per row.
    advantages: f32[B], reward units.
    mask: bool[B, T], the edge's own tokens.
    beta: reward units per nat.
    weight_max: bound on the importance weight.
  Returns: (sum, count of rows with a masked token, metrics); metrics hold weight_sum.
  """
  chex.assert_rank([logprobs, old_logprobs, ref_logprobs, advantages, mask], [2, 2, 2, 1, 2])
  chex.assert_equal_shape([logprobs, old_logprobs, ref_logprobs, mask])
  inside, (logprobs, old_logprobs, ref_logprobs) = _masked(
    mask, logprobs, old_logprobs, ref_logprobs
  )
  exists, (advantages,) = _masked(inside.any(axis=1), advantages)
  weight = jnp.minimum(jnp.exp((logprobs - old_logprobs).sum(axis=1)), weight_max)
  weight = jax.lax.stop_gradient(jnp.where(exists, weight, 0.0))
  error = beta * (logprobs - ref_logprobs).sum(axis=1) - advantages
  return 0.5 * (weight * error**2).sum(), _count(exists), {"weight_sum": weight.sum()}


def _masked(mask: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """The mask as bool, and float32 arrays with 0 wherever it is False."""
  inside = mask != 0
  return inside, tuple(jnp.where(inside, x, 0.0).astype(jnp.float32) for x in arrays)


def _count(inside: jax.Array) -> jax.Array:
  return inside.sum(dtype=jnp.float32)
