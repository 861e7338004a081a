from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import KEEP_GRADIENT, arrays_in, count_matmuls

from spo_jax import model
from spo_jax.config import KLConfig, ModelConfig, OptimizerConfig, TrainConfig
from spo_jax.structs import TrainRows
from spo_jax.update import (
  init_state,
  make_optimizer,
  policy_update,
  score_rows,
  summarise,
  supervised_update,
)

R, L, V = 8, 10, 13
CONFIG = ModelConfig(
  vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1
)
TEMPERATURE = jnp.float32(0.6)
DEFAULT = TrainConfig()
ADAM = make_optimizer(OptimizerConfig(learning_rate=1e-2))


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
  """Halves the time of this file; what is tested are equations, not XLA's optimisations."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def moved(params, by, rng):
  return jax.tree.map(lambda x: x + by * rng.normal(size=x.shape).astype(np.float32), params)


# Far from the start of training, where all logits are nearly equal, and a reference nearby.
PARAMS = moved(model.init_params(CONFIG, jax.random.key(0)), 0.3, np.random.default_rng(0))
REFERENCE = moved(PARAMS, 0.05, np.random.default_rng(1))


def kl_train(kind, aggregation="sequence_sum", **settings):
  return TrainConfig(kl=KLConfig(0.7, kind, aggregation), **settings)


def random_rows(seed=0):
  """R rows, one of them empty; outside the mask stands NaN, which must not matter."""
  rng = np.random.default_rng(seed)
  start, end = rng.integers(1, 4, (R, 1)), rng.integers(5, L + 1, (R, 1))
  end[5] = 0
  column = np.arange(L)
  mask = (column >= start) & (column < end) & (rng.random((R, L)) < 0.7)
  tokens = rng.integers(0, V, (R, L), np.int32)
  logprobs = own_logprobs(tokens, column < end) + rng.normal(0, 0.4, (R, L))
  advantages = rng.normal(size=(R, L))
  garbled = (np.where(mask, x, np.nan).astype(np.float32) for x in (logprobs, advantages))
  return TrainRows(tokens, column < end, mask, *garbled)


def own_logprobs(tokens, is_token, params=PARAMS):
  return np.asarray(score_rows(CONFIG, params, tokens, is_token, is_token, TEMPERATURE))


def update(train, rows, micro=2, optimizer=KEEP_GRADIENT, params=PARAMS, used=None):
  batch = jax.tree.map(lambda x: jnp.reshape(x, (-1, micro, L)), rows)
  state = init_state(jax.tree.map(jnp.copy, params), optimizer)  # a copy, as it is donated
  return policy_update(
    CONFIG, train, optimizer, state, REFERENCE if train.kl.coefficient else None, batch,
    jnp.int32(used or R // micro), TEMPERATURE,
  )  # fmt: skip


def gradient(*args, **kwargs):
  return update(*args, **kwargs)[0].opt_state


def assert_close(actual, expected, tolerance=3e-6):
  """Equal but for rounding, which is as large as the norm of everything makes it."""
  rounding = tolerance * max(1, float(optax.tree.norm(expected)))
  jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=rounding), actual, expected)


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


# The same loss, written down for the tokens of the mask alone.


logits = jax.jit(model.logits, static_argnums=0)


@jax.jit
def full_logprobs(params, tokens, is_token):
  scores = jax.nn.log_softmax(logits(CONFIG, params, tokens, is_token) / TEMPERATURE)
  before = jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
  return jnp.pad(before, ((0, 0), (1, 0)))


@jax.jit
def pull_back(params, tokens, is_token, cotangent):
  return jax.vjp(lambda p: full_logprobs(p, tokens, is_token), params)[1](cotangent)[0]


def loss_of_batch(train, rows, logprobs, reference):
  m = rows.mask
  new, old, a = logprobs[m], rows.logprobs[m], rows.advantages[m]
  if train.whiten:
    a = (a - a.mean()) / np.sqrt(a.var(ddof=1) + 1e-8)
  ratio = jnp.exp(new - old)
  clipped = jnp.clip(ratio, 1 - train.clip_low, 1 + train.clip_high)
  policy = -jnp.minimum(ratio * a, clipped * a).sum() / m.sum()
  if not train.kl.coefficient:
    return policy, 0.0
  d = reference[m] - new
  kl = {"k1": -d, "abs": abs(d), "k2": d**2 / 2, "k3": jnp.exp(d) - d - 1}[train.kl.kind]
  if train.official:
    kl = jnp.where(kl < 0, 0, kl)
  rows_or_tokens = m.any(axis=1) if train.kl.aggregation == "sequence_sum" else m
  return policy, kl.sum() / rows_or_tokens.sum()


def written_down(train, rows, micro=R):
  """(policy loss, KL), gradient: means over micro-batches of `micro` rows, each on its own."""
  reference = full_logprobs(REFERENCE, rows.tokens, rows.is_token)

  def loss(logprobs):
    parts = []
    for first in range(0, R, micro):
      part = slice(first, first + micro)
      own = jax.tree.map(lambda x, part=part: x[part], rows)
      parts.append(loss_of_batch(train, own, logprobs[part], reference[part]))
    policy, kl = (sum(x) / len(parts) for x in zip(*parts))
    return policy + train.kl.coefficient * kl, (policy, kl)

  logprobs = full_logprobs(PARAMS, rows.tokens, rows.is_token)
  (_, parts), cotangent = jax.value_and_grad(loss, has_aux=True)(logprobs)
  return parts, pull_back(PARAMS, rows.tokens, rows.is_token, cotangent)


@pytest.mark.parametrize(
  "train",
  [
    DEFAULT,
    kl_train("k1", whiten=False),
    kl_train("abs", "token_mean", clip_low=0.1, clip_high=0.3),
    kl_train("k2", "token_mean"),
    kl_train("k3"),
  ],
  ids=["no kl", "k1", "abs", "k2", "k3"],
)
def test_loss_and_gradient_are_those_of_the_whole_batch_at_once(train):
  state, metrics = update(train, random_rows())
  parts, expected = written_down(train, random_rows())
  assert_close(state.opt_state, expected)
  assert_close((metrics["loss/policy"], metrics["loss/kl"]), parts)
  assert_close(metrics["loss/gradient_norm"], optax.tree.norm(expected), 1e-5)
  assert state.step == 1


@pytest.mark.parametrize(
  "train",
  [kl_train("k3", official=True), kl_train("k1", "token_mean", official=True, whiten=False)],
  ids=["k3", "k1"],
)
def test_official_whitens_and_averages_each_micro_batch_on_its_own(train):
  state, metrics = update(train, random_rows())
  parts, expected = written_down(train, random_rows(), micro=2)
  assert_close(state.opt_state, expected)
  assert_close((metrics["loss/policy"], metrics["loss/kl"]), parts)
  whole = gradient(kl_train("k3"), random_rows())
  assert optax.tree.norm(optax.tree.sub(whole, expected)) > 0.1  # it makes a difference


def test_official_skips_a_micro_batch_whose_ratio_is_too_large_with_its_kl():
  train, rows = kl_train("k3", official=True), random_rows()
  far = rows.replace(logprobs=rows.logprobs - 5 * (np.arange(R) < 2)[:, None].astype(np.float32))
  alone = rows.replace(mask=rows.mask & (np.arange(R) >= 2)[:, None])
  (skipped, metrics), (without, others) = update(train, far), update(train, alone)
  assert_close(skipped.opt_state, without.opt_state)
  assert metrics["loss/skipped_ratio"] == 1 / 4
  assert others["loss/skipped_ratio"] == 0


# What must not change the gradient.


@pytest.mark.parametrize("micro", [1, 8])
def test_micro_batch_size_does_not_change_gradient_or_metrics(micro):
  train = kl_train("k3")
  (expected, metrics), (state, others) = (update(train, random_rows(), m) for m in (2, micro))
  assert_close(state, expected)
  assert_close(others, metrics)


def test_row_order_does_not_change_gradient():
  order = np.random.default_rng(0).permutation(R)
  shuffled = jax.tree.map(lambda x: x[order], random_rows())
  assert_close(gradient(kl_train("k3"), shuffled), gradient(kl_train("k3"), random_rows()))


def test_padding_rows_do_not_change_gradient():
  rows, train = random_rows(), kl_train("k3")
  rows = rows.replace(mask=rows.mask & (np.arange(R) < 6)[:, None])
  empty = jax.tree.map(lambda x: np.where(np.arange(R)[:, None] < 6, x, 0).astype(x.dtype), rows)
  assert_close(gradient(train, empty), gradient(train, rows))
  assert_same(gradient(train, empty, used=3), gradient(train, empty, used=4))


def test_micro_batches_that_are_not_used_are_not_computed():
  rows = random_rows()
  swapped = jax.tree.map(lambda x: np.roll(x, R // 2, axis=0), rows)
  first, second = gradient(DEFAULT, rows, used=2), gradient(DEFAULT, swapped, used=2)
  assert_close(optax.tree.add(first, second), gradient(DEFAULT, rows))
  poison = np.where(np.arange(R)[:, None] < R // 2, rows.logprobs, np.nan)
  assert_same(gradient(DEFAULT, rows.replace(logprobs=poison), used=2), first)


def traced(train, config=CONFIG, shape=(4, 2, L), reference=True):
  """The program of an update, only traced."""
  params = jax.eval_shape(partial(model.init_params, config), jax.random.key(0))
  state = jax.eval_shape(partial(init_state, optimizer=KEEP_GRADIENT), params)
  column = partial(jax.ShapeDtypeStruct, shape)
  batch = TrainRows(*map(column, (jnp.int32, bool, bool, jnp.float32, jnp.float32)))
  inputs = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32))
  return policy_update.trace(
    config, train, KEEP_GRADIENT, state, params if reference else None, batch, *inputs
  ).jaxpr.jaxpr


def test_no_kl_costs_no_forward_of_a_reference():
  shapes = (jnp.zeros((2, L), jnp.int32), *[jnp.ones((2, L), bool)] * 2)
  forward = count_matmuls(score_rows.trace(CONFIG, PARAMS, *shapes, TEMPERATURE).jaxpr.jaxpr)
  without = count_matmuls(traced(DEFAULT, reference=False))
  assert forward > 5
  assert count_matmuls(traced(kl_train("k3"))) == without + forward


def test_a_large_vocabulary_never_makes_logits_of_whole_rows():
  vocabulary, rows, length = 150_001, 8, 2048
  config = dataclasses.replace(CONFIG, vocab_size=vocabulary)
  arrays = arrays_in(traced(kl_train("k3"), config, (2, rows, length)))
  sizes = [array.size for array in arrays if vocabulary in getattr(array, "shape", ())]
  assert max(sizes) <= 2**27 < rows * (length - 1) * vocabulary / 16


# Updates that must not happen, and those that hardly do.


def test_an_empty_mask_changes_nothing_and_is_finite():
  rows = random_rows()
  state, metrics = update(kl_train("k3"), rows.replace(mask=np.zeros_like(rows.mask)))
  assert metrics.pop("tokens/trained") == rows.is_token.sum()
  assert not any(np.any(x) for x in jax.tree.leaves((state.opt_state, metrics)))
  assert_same(state.params, PARAMS)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_advantages_that_all_agree_teach_nothing(value):
  """0.1 is no exact float32: whitening must not blow its rounding up."""
  rows = random_rows()
  rows = rows.replace(advantages=np.full_like(rows.advantages, value))
  state, metrics = update(DEFAULT, rows, optimizer=ADAM)
  assert_same(state.params, PARAMS)
  assert metrics["loss/policy"] == metrics["loss/gradient_norm"] == 0
  assert metrics["loss/skipped_nonfinite"] == metrics["loss/skipped_ratio"] == 0


def first_of_mask(mask):
  return (np.cumsum(mask).reshape(mask.shape) == 1) & mask


@pytest.mark.parametrize("where", ["advantages", "logprobs", "params"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted(where, value):
  rows, params = random_rows(), PARAMS
  if where == "params":
    params = jax.tree.map(jnp.copy, PARAMS)
    params["norm"]["weight"] = params["norm"]["weight"].at[3].set(value)
  else:
    old = getattr(rows, where)
    rows = rows.replace(**{where: np.where(first_of_mask(rows.mask), np.float32(value), old)})
  if (where, value) == ("logprobs", np.inf):
    return  # the log-ratio is clamped: a ratio of e^-10 is an ordinary number
  state, metrics = update(DEFAULT, rows, optimizer=ADAM, params=params)
  assert_same(state, init_state(params, ADAM))
  assert metrics["loss/skipped_nonfinite"] == 1
  assert metrics["loss/skipped_ratio"] == 0


def test_a_gradient_too_large_for_its_norm_changes_nothing_although_the_loss_is_finite():
  train = dataclasses.replace(DEFAULT, whiten=False)
  rows = random_rows()
  state, metrics = update(train, rows.replace(advantages=rows.advantages * 1e25), optimizer=ADAM)
  assert np.isfinite(metrics["loss/policy"])
  assert metrics["loss/skipped_nonfinite"] == 1
  assert_same(state, init_state(PARAMS, ADAM))


def test_a_skipped_update_keeps_the_optimiser_and_the_next_one_goes_on():
  rows = random_rows()
  poisoned = rows.replace(advantages=np.full_like(rows.advantages, np.nan))
  state = init_state(jax.tree.map(jnp.copy, PARAMS), ADAM)
  for part in (rows, poisoned, rows):
    batch = jax.tree.map(lambda x: jnp.reshape(x, (-1, 2, L)), part)
    before = jax.device_get(state)
    state, metrics = policy_update(
      CONFIG, DEFAULT, ADAM, state, None, batch, jnp.int32(4), TEMPERATURE
    )
    if metrics["loss/skipped_nonfinite"]:
      assert before.step == 1
      assert_same(state, before)
  assert state.step == 2


@pytest.mark.parametrize(("log_ratio", "skipped"), [(2.25, False), (2.35, True)])
def test_a_mean_ratio_above_the_limit_skips_the_update(log_ratio, skipped):
  rows = random_rows()
  old = own_logprobs(rows.tokens, rows.is_token) - np.float32(log_ratio)
  state, metrics = update(DEFAULT, rows.replace(logprobs=old), optimizer=ADAM)
  np.testing.assert_allclose(metrics["loss/ratio_mean"], np.exp(log_ratio), rtol=1e-5)
  assert metrics["loss/skipped_ratio"] == skipped
  assert metrics["loss/skipped_nonfinite"] == 0
  assert state.step == 1 - skipped
  if skipped:
    assert_same(state, init_state(PARAMS, ADAM))


# Ratio and clip.


def test_the_first_update_on_fresh_rows_starts_at_ratio_one():
  rows = random_rows()
  _, metrics = update(DEFAULT, rows.replace(logprobs=own_logprobs(rows.tokens, rows.is_token)))
  assert metrics["loss/clip_fraction"] == 0
  np.testing.assert_allclose(metrics["loss/ratio_mean"], 1, rtol=1e-6)
  assert metrics["loss/approx_kl"] < 1e-10
  # Whitened advantages have mean 0, and so has the objective at ratio 1.
  np.testing.assert_allclose(metrics["loss/policy"], 0, atol=1e-6)


@pytest.mark.parametrize(("up", "silenced"), [(1, True), (-1, False)])
def test_the_clip_silences_what_has_moved_far_enough_in_either_direction(up, silenced):
  rows = random_rows()
  mask = np.zeros_like(rows.mask)
  mask[0, 3] = mask[1, 3] = True
  advantages = np.where(np.arange(R)[:, None] == 0, 1, -1) * np.ones((1, L), np.float32)
  moved = np.log(1.5) * up * advantages  # log-ratio along the advantage, or against it
  old = own_logprobs(rows.tokens, rows.is_token) - moved.astype(np.float32)
  state, metrics = update(DEFAULT, rows.replace(mask=mask, advantages=advantages, logprobs=old))
  assert metrics["loss/clip_fraction"] == silenced
  assert (metrics["loss/gradient_norm"] == 0) == silenced
  assert all(np.any(x) for x in jax.tree.leaves(state.opt_state)) != silenced


def test_an_update_makes_good_tokens_likelier_and_bad_ones_less_likely():
  rows = random_rows()
  old = own_logprobs(rows.tokens, rows.is_token)
  state, _ = update(DEFAULT, rows.replace(logprobs=old), optimizer=ADAM)
  change = own_logprobs(rows.tokens, rows.is_token, state.params) - old
  advantage = rows.advantages[rows.mask]
  assert ((advantage - advantage.mean()) * change[rows.mask]).sum() > 0.1


# The optimiser.


def adam_by_hand(config, parameters, gradients):
  x = np.array(parameters, np.float64)
  m = v = np.zeros_like(x)
  for step, g in enumerate(np.array(gradients, np.float64)):
    norm = np.sqrt((g**2).sum())
    if config.clip_norm:
      g = g * min(1, config.clip_norm / norm)
    m = config.b1 * m + (1 - config.b1) * g
    v = config.b2 * v + (1 - config.b2) * g**2
    m_hat, v_hat = m / (1 - config.b1 ** (step + 1)), v / (1 - config.b2 ** (step + 1))
    rate = config.learning_rate * min(1, (step + 1) / (config.warmup_steps + 1))
    x = x - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + config.weight_decay * x)
  return x


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_with_warm_up_and_clipping_is_what_it_is_by_hand(warmup, clip_norm, weight_decay):
  config = OptimizerConfig(
    learning_rate=0.1, warmup_steps=warmup, b2=0.9, clip_norm=clip_norm, weight_decay=weight_decay
  )
  gradients = np.array([[0.3, 0.4], [3.0, -4.0], [0.0, 0.1], [30.0, 1.0], [-1.0, 0.2]], np.float32)
  optimizer, params = make_optimizer(config), jnp.array([1.0, -2.0])
  state = optimizer.init(params)
  for g in gradients:
    updates, state = optimizer.update(jnp.array(g), state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params, adam_by_hand(config, [1.0, -2.0], gradients), rtol=1e-5)


# Host and device.


def test_an_update_moves_nothing_between_host_and_device():
  rows = jax.device_put(jax.tree.map(lambda x: x.reshape(4, 2, L), random_rows()))
  state = init_state(jax.tree.map(jnp.copy, PARAMS), ADAM)
  used, temperature = jax.device_put((np.int32(4), np.float32(0.6)))
  with jax.transfer_guard("disallow"):
    for _ in range(2):
      state, metrics = policy_update(CONFIG, DEFAULT, ADAM, state, None, rows, used, temperature)
  assert state.step == 2
  assert jnp.isfinite(metrics["loss/policy"])


def test_summarise_takes_means_and_counts_what_was_skipped():
  names = ("policy", "kl", "clip_fraction", "approx_kl", "ratio_mean", "gradient_norm")
  measured = [
    {"tokens/trained": jnp.int32(2**24 + x), **{f"loss/{name}": jnp.float32(x) for name in names},
     "loss/skipped_nonfinite": jnp.float32(x == 2), "loss/skipped_ratio": jnp.float32(x > 0)}
    for x in range(3)
  ]  # fmt: skip
  summary = summarise(measured)
  assert {summary[f"loss/{name}"] for name in names} == {1.0}
  assert (summary["loss/skipped_nonfinite"], summary["loss/skipped_ratio"]) == (1, 2)
  assert (summary["loss/updates"], summary["tokens/trained"]) == (3, 3 * 2**24 + 3)
  assert set(summarise([]).values()) == {0.0}
  assert summarise([]).keys() == summary.keys()


# Scores and the warm start.


def test_scores_are_the_log_softmax_of_the_logits_in_front_of_each_token():
  rows = random_rows()
  actual = own_logprobs(rows.tokens, rows.is_token)
  expected = full_logprobs(PARAMS, rows.tokens, rows.is_token)
  assert_close(actual[rows.is_token], np.asarray(expected)[rows.is_token], 1e-5)
  assert (actual[:, 0] == 0).all()


def test_supervised_loss_is_the_mean_cross_entropy_and_falls():
  rows = random_rows()
  scores = np.asarray(jax.nn.log_softmax(logits(CONFIG, PARAMS, rows.tokens, rows.is_token)))
  picked = np.array([scores[b, t - 1, rows.tokens[b, t]] for b, t in np.argwhere(rows.mask)])
  state = init_state(jax.tree.map(jnp.copy, PARAMS), ADAM)
  losses = []
  for _ in range(20):
    state, loss = supervised_update(
      CONFIG, ADAM, state, rows.tokens, rows.is_token, rows.mask, micro_rows=R
    )
    losses.append(float(loss))
  assert losses[0] == pytest.approx(-picked.mean(), rel=1e-5)
  assert losses[-1] < 0.7 * losses[0]


def supervised(rows, optimizer=ADAM, micro_rows=R):
  state = init_state(jax.tree.map(jnp.copy, PARAMS), optimizer)
  return supervised_update(
    CONFIG, optimizer, state, rows.tokens, rows.is_token, rows.mask, micro_rows=micro_rows
  )


def test_micro_batches_do_not_change_a_supervised_gradient():
  rows = random_rows()
  whole, loss = supervised(rows, KEEP_GRADIENT)
  for micro_rows in (1, 2, R // 2):
    state, other = supervised(rows, KEEP_GRADIENT, micro_rows)
    assert other == pytest.approx(float(loss), rel=1e-5)
    assert_close(state.opt_state, whole.opt_state)


def test_supervised_updates_ignore_tokens_outside_the_mask():
  rows = random_rows()
  later = np.flip(np.cumsum(np.flip(rows.mask, 1), 1), 1) == 0  # no masked token from here on
  changed = rows.replace(tokens=np.where(later, (rows.tokens + 1) % V, rows.tokens))
  assert (later & rows.is_token).any()
  assert_same(supervised(changed), supervised(rows))


def test_a_supervised_batch_without_a_mask_or_that_is_not_finite_changes_nothing():
  rows = random_rows()
  state, loss = supervised(rows.replace(mask=np.zeros_like(rows.mask)))
  assert_same(state.params, PARAMS)
  assert loss == 0
  params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), PARAMS)
  state, loss = supervised_update(
    CONFIG, ADAM, init_state(jax.tree.map(jnp.copy, params), ADAM), rows.tokens, rows.is_token,
    rows.mask, micro_rows=R,
  )  # fmt: skip
  assert_same(state, init_state(params, ADAM))
  assert not np.isfinite(loss)
