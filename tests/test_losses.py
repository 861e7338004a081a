from __future__ import annotations

import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spo_jax import losses

B, T = 4, 9  # one shape for all drawn examples: one compilation
KL_NAMES = {"kl": "k1", "abs": "abs", "mse": "k2", "control_variate": "k3"}

policy_loss = jax.jit(losses.policy_loss)
value_loss = jax.jit(losses.value_loss)
dvo_loss = jax.jit(losses.dvo_loss)
kl_estimate = jax.jit(losses.kl_estimate, static_argnums=2)
kl_loss = jax.jit(losses.kl_loss, static_argnums=(3, 4))

many = settings(deadline=None, max_examples=60)
masks_drawn = hnp.arrays(bool, (B, T))
seeds = st.integers(0, 2**32 - 1)


def close(actual, expected, tolerance=1e-5):
  np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def padded(rows, fill=np.nan):
  """Into one shape for all reference cases: one compilation; NaN must not matter."""
  rows = np.array(rows, np.float32)
  missing = (5 - rows.shape[0], 40 - rows.shape[1])
  return np.pad(rows, [(0, n) for n in missing], constant_values=fill)


def batch(seed, scale=0.5):
  """Logprobs (new, old, reference) and advantages of a random batch."""
  rng = np.random.default_rng(seed)
  old = -rng.exponential(1.0, (B, T))
  new, ref = (np.minimum(old + rng.normal(0, scale, (B, T)), 0.0) for _ in range(2))
  return [x.astype(np.float32) for x in (new, old, ref, rng.normal(size=(B, T)))]


# Policy objective.


@functools.partial(jax.jit, static_argnums=4)
@functools.partial(jax.value_and_grad, has_aux=True)
def reference_objective(new, old, ref, advantages, kind, kl_coef, mask, rows, clip, limit):
  """The authors' loss of one micro-batch, put together from ours."""
  total, count, metrics = losses.policy_loss(new, old, advantages, mask, clip, clip)
  loss = losses.mean(total, count)
  if kind is not None:
    loss += kl_coef * losses.kl_loss(new, ref, mask, kind)[0] / rows
  skipped = losses.mean(metrics["ratio_sum"], count) > limit
  return jnp.where(skipped, 0.0, loss), (count, metrics, skipped)


@pytest.mark.parametrize("case", golden.load("losses")["actor_loss"])
def test_policy_loss_and_its_gradient_agree_with_the_reference(case):
  names = ("new_logprobs", "old_logprobs", "ref_logprobs", "advantages")
  new, old, ref, advantages = (padded(case[k]) for k in names)
  mask = padded(case["mask"], 0) != 0
  rows = len(case["mask"])
  if case["prob_mask"]:
    mask &= np.exp(old) < case["threshold"]
  kind = KL_NAMES.get(case["kl_estimator"])
  (loss, (count, metrics, skipped)), gradient = reference_objective(
    new,
    old,
    ref,
    advantages,
    kind,
    case["kl_coef"],
    mask,
    rows,
    case["clip"],
    case["ratio_threshold"],
  )
  assert skipped == case["skipped"]
  close(loss, case["loss"])
  close(gradient, padded(case["grad_new_logprobs"], 0))
  expected = case["metrics"]
  close(metrics["ratio_sum"] / count, expected["ratio"])
  close(metrics["clipped_sum"] / count, expected["clip_frac"])
  close(metrics["policy_kl_sum"] / count, expected["policy_kl"])
  close(metrics["approx_kl_sum"] / count, expected["approx_kl"])
  if kind is not None:
    kl = kl_loss(new, ref, mask, kind, 0.0)[0] / rows
    close(case["kl_coef"] * kl, expected["ref_kl_loss"])


def test_policy_loss_by_hand():
  ratio = np.array([[1.5, 1.5, 0.5, 0.5, 1.0, 9.0]])
  advantages = np.array([[1.0, -1.0, 1.0, -1.0, 2.0, 5.0]])
  mask = np.array([[True] * 5 + [False]])
  old = np.full((1, 6), -2.0)
  total, count, metrics = policy_loss(np.log(ratio) + old, old, advantages, mask, 0.2, 0.3)
  close(total, -(1.3 - 1.5 + 0.5 - 0.8 + 2.0))
  close(count, 5)
  close(metrics["ratio_sum"], 5)
  close(metrics["clipped_sum"], 2)


@many
@given(seeds, masks_drawn, st.sampled_from([0.1, 1.0, 8.0]), st.sampled_from([0.1, 0.2, 0.9]))
def test_policy_loss_equals_brute_force(seed, mask, scale, clip_low):
  new, old, _, advantages = batch(seed, scale)
  total = ratios = clipped = 0.0
  for b, t in zip(*np.nonzero(mask)):
    r = np.exp(np.clip(float(new[b, t]) - float(old[b, t]), -10, 10))
    a = float(advantages[b, t])
    unclipped, limited = r * a, np.clip(r, 1 - clip_low, 1.28) * a
    total -= min(unclipped, limited)
    ratios += r
    clipped += limited < unclipped
  actual, count, metrics = policy_loss(new, old, advantages, mask, clip_low, 0.28)
  close(actual, total, 5e-5)
  close(metrics["ratio_sum"], ratios, 5e-5)
  assert (count, metrics["clipped_sum"]) == (mask.sum(), clipped)


def test_on_policy_gradient_is_minus_the_advantage():
  _, old, _, advantages = batch(0)
  mask = np.ones((B, T), bool)
  gradient = jax.grad(lambda new: policy_loss(new, old, advantages, mask, 0.2, 0.2)[0])(old)
  close(gradient, -advantages)


def test_log_ratio_is_clamped():
  old = np.array([[-30.0, 0.0]], np.float32)
  new = old[:, ::-1].copy()
  advantages, mask = np.array([[-1.0, -1.0]]), np.ones((1, 2), bool)
  total, _, metrics = policy_loss(new, old, advantages, mask, 0.2, 0.2)
  close(total, np.exp(10) + 0.8)
  close(metrics["ratio_sum"], np.exp(10) + np.exp(-10))
  gradient = jax.grad(lambda new: policy_loss(new, old, advantages, mask, 0.2, 0.2)[0])(new)
  np.testing.assert_array_equal(gradient, [[0.0, 0.0]])


# Properties of every masked loss.


def as_policy(new, old, ref, advantages, mask):
  return losses.policy_loss(new, old, advantages, mask, 0.2, 0.3)


def as_kl(kind):
  def loss(new, old, ref, advantages, mask):
    return *losses.kl_loss(new, ref, mask, kind), {}

  return loss


def as_value(new, old, ref, advantages, mask):
  return losses.value_loss(new, old, ref, mask, 0.2)


def as_dvo(new, old, ref, advantages, mask):
  # The reward of a row is in its first column, used where the row has a masked token.
  return losses.dvo_loss(new, old, ref, advantages[:, 0], mask, 0.1)


MASKED = {"policy": as_policy, "value": as_value, "dvo": as_dvo}
MASKED |= {kind: as_kl(kind) for kind in losses.KL_KINDS}
every_loss = pytest.mark.parametrize("loss", MASKED.values(), ids=MASKED.keys())


@functools.cache
def jitted(loss):
  """(sum, (count, metrics)) and the gradients with respect to all four arrays."""

  def first(*args):
    total, count, metrics = loss(*args)
    return total, (count, metrics)

  return jax.jit(jax.value_and_grad(first, (0, 1, 2, 3), has_aux=True))


@every_loss
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_padding_does_not_change_loss(loss, garbage):
  arrays = batch(1)
  mask = np.arange(T) < np.array([T, 4, 0, 1])[:, None]
  mask[0, 2] = False
  kept = mask.copy()
  kept[:, 0] |= mask.any(axis=1)  # see as_dvo
  dirty = [np.where(mask, x, garbage).astype(np.float32) for x in arrays[:3]]
  dirty.append(np.where(kept, arrays[3], garbage).astype(np.float32))
  value_and_grad = jitted(loss)
  (total, aux), gradients = value_and_grad(*arrays, mask)
  (dirty_total, dirty_aux), dirty_gradients = value_and_grad(*dirty, mask)
  assert total != 0 and np.abs(gradients[0]).sum() > 0
  np.testing.assert_array_equal(dirty_total, total)
  jax.tree.map(np.testing.assert_array_equal, dirty_aux, aux)
  for gradient, expected in zip(dirty_gradients, gradients):
    np.testing.assert_array_equal(gradient, expected)
    np.testing.assert_array_equal(np.asarray(gradient)[~kept], 0.0)


@every_loss
def test_empty_mask_gives_loss_zero_and_finite_gradients(loss):
  arrays = [np.full((B, T), np.nan, np.float32)] * 4

  def mean_loss(*args):
    total, count, metrics = loss(*args, np.zeros((B, T), bool))
    return losses.mean(total, count), (count, metrics)

  value_and_grad = jax.value_and_grad(mean_loss, (0, 1, 2, 3), has_aux=True)
  (value, aux), gradients = jax.jit(value_and_grad)(*arrays)
  assert value == 0 and all(x == 0 for x in jax.tree.leaves(aux))
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, np.zeros((B, T)))


@every_loss
def test_microbatches_add_up_to_the_whole(loss):
  arrays = batch(2)
  mask = np.random.default_rng(2).random((B, T)) < 0.5
  value_and_grad = jitted(loss)
  whole, gradients = value_and_grad(*arrays, mask)
  parts = [value_and_grad(*(x[i : i + 2] for x in arrays), mask[i : i + 2]) for i in (0, 2)]
  summed = jax.tree.map(lambda a, b: a + b, parts[0][0], parts[1][0])
  jax.tree.map(close, summed, whole)
  for k, gradient in enumerate(gradients):
    np.testing.assert_array_equal(np.concatenate([p[1][k] for p in parts]), gradient)


def test_masks_of_integers_and_floats_mean_the_same():
  arrays = batch(3)
  mask = np.random.default_rng(3).random((B, T)) < 0.5
  expected, _ = jitted(as_policy)(*arrays, mask)
  for kind in (np.int32, np.float32):
    actual, _ = jitted(as_policy)(*arrays, mask.astype(kind))
    jax.tree.map(close, actual, expected)


# KL.


def test_kl_estimates_by_hand():
  logprobs, ref = np.array([[-1.0, -2.0, -3.0, -30.0]]), np.array([[-2.0, -1.0, -3.0, -1.0]])
  close(kl_estimate(logprobs, ref, "k1"), [[1, -1, 0, -29]])
  close(kl_estimate(logprobs, ref, "abs"), [[1, 1, 0, 29]])
  close(kl_estimate(logprobs, ref, "k2"), [[0.5, 0.5, 0, 420.5]])
  e = np.exp
  close(kl_estimate(logprobs, ref, "k3"), [[e(-1), e(1) - 2, 0, e(10) - 11]])


def test_kl_estimates_other_than_k1_are_never_negative():
  near, far = np.logspace(-30, 0, 5000), np.linspace(0, 40, 5000)
  difference = np.concatenate([near, -near, far, -far])[None, :].astype(np.float32)
  zero = np.zeros_like(difference)
  for kind in ("abs", "k2", "k3"):
    assert (np.asarray(kl_estimate(difference, zero, kind)) >= 0).all(), kind
  assert (np.asarray(kl_estimate(difference, zero, "k1")) < 0).any()


def test_k1_and_k3_are_unbiased_and_k2_is_close():
  rng = np.random.default_rng(0)
  policy, ref = (np.log(rng.dirichlet(np.full(6, 5.0))) for _ in range(2))
  exact = (np.exp(policy) * (policy - ref)).sum()
  expected = {
    kind: (np.exp(policy) * np.asarray(kl_estimate(policy[None], ref[None], kind))[0]).sum()
    for kind in losses.KL_KINDS
  }
  close(expected["k1"], exact)
  close(expected["k3"], exact)
  close(expected["k2"], exact, 0.3 * exact)


def test_kl_floor_holds_per_token_and_passes_the_gradient_at_the_floor():
  logprobs, ref = np.array([[-1.0, -2.0, -3.0]]), np.array([[-2.0, -1.0, -3.0]])
  mask = np.ones((1, 3), bool)
  floored = jax.value_and_grad(lambda x: kl_loss(x, ref, mask, "k1", 0.0)[0])(logprobs)
  free = jax.value_and_grad(lambda x: kl_loss(x, ref, mask, "k1", None)[0])(logprobs)
  jax.tree.map(close, floored, (1.0, [[1.0, 0.0, 1.0]]))
  jax.tree.map(close, free, (0.0, [[1.0, 1.0, 1.0]]))


# Critic and DVO.


@pytest.mark.parametrize("case", golden.load("losses")["value_loss"])
def test_value_loss_agrees_with_the_reference(case):
  values, old, returns = (padded(case[k]) for k in ("new_values", "old_values", "returns"))
  mask = padded(case["mask"], 0)
  total, count, metrics = value_loss(values, old, returns, mask, case["clip"])
  close(losses.mean(total, count), case["loss"])
  close(losses.mean(metrics["clipped_sum"], count), case["clip_fraction"])


def test_value_loss_by_hand():
  values, old = np.array([[1.0, 0.5, -1.0]]), np.zeros((1, 3))
  returns, mask = np.array([[2.0, -1.0, 3.0]]), np.array([[True, True, False]])
  total, count, metrics = value_loss(values, old, returns, mask, 0.25)
  close(total, 0.5 * (1.75**2 + 1.5**2))
  assert (count, metrics["clipped_sum"]) == (2, 1)


@many
@given(seeds, masks_drawn, st.sampled_from([0.0, 0.2, 5.0]))
def test_value_loss_equals_brute_force(seed, mask, clip):
  values, old, _, returns = batch(seed)
  total = clipped = 0.0
  for b, t in zip(*np.nonzero(mask)):
    v, o, g = float(values[b, t]), float(old[b, t]), float(returns[b, t])
    plain, limited = (v - g) ** 2, (np.clip(v, o - clip, o + clip) - g) ** 2
    total += 0.5 * max(plain, limited)
    clipped += limited > plain + 1e-6
  actual, count, metrics = value_loss(values, old, returns, mask, clip)
  close(actual, total, 5e-5)
  assert count == mask.sum() and metrics["clipped_sum"] >= clipped


@pytest.mark.parametrize("case", golden.load("losses")["dvo_loss"])
def test_dvo_loss_agrees_with_the_reference(case):
  names = ("new_logprobs", "old_logprobs", "ref_logprobs")
  new, old, ref = (padded(case[k]) for k in names)
  advantages = padded([case["sequence_advantage"]])[0, :5]
  mask, rows = padded(case["mask"], 0), len(case["mask"])
  total, count, _ = dvo_loss(new, old, ref, advantages, mask, case["beta"], case["weight_max"])
  assert count == rows
  close(losses.mean(total, count), case["loss"])


def test_dvo_weight_is_bounded_and_carries_no_gradient():
  old = np.array([[-4.0, -4.0], [-1.0, -1.0]])
  new, ref = np.array([[-1.0, -1.0], [-1.0, -2.0]]), np.full((2, 2), -1.5)
  advantages, mask = np.array([0.5, -0.5]), np.ones((2, 2), bool)
  total, _, metrics = dvo_loss(new, old, ref, advantages, mask, 0.1)
  weights, errors = np.array([10.0, np.exp(-1)]), np.array([0.1 - 0.5, 0.5])
  close(total, (0.5 * weights * errors**2).sum())
  close(metrics["weight_sum"], weights.sum())
  gradient = jax.grad(lambda new: dvo_loss(new, old, ref, advantages, mask, 0.1)[0])(new)
  close(gradient, np.repeat((weights * errors * 0.1)[:, None], 2, axis=1))


def test_bad_arguments_name_themselves_and_the_choices():
  x = np.zeros((1, 2))
  with pytest.raises(ValueError, match=r"'k4'.*k1, abs, k2, k3"):
    losses.kl_estimate(x, x, "k4")
  with pytest.raises(AssertionError):
    losses.policy_loss(x, x, x, np.zeros((1, 3)), 0.2, 0.2)
