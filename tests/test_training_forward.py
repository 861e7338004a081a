"""What a backward pass keeps of the forward pass, and what is computed in which precision."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from programs import KEEP_GRADIENT, equations_of
from test_attention import on

from spo_jax import model
from spo_jax.config import KLConfig, TrainConfig
from spo_jax.structs import TrainRows
from spo_jax.update import init_state, policy_update, score, score_rows, supervised_update

R, L = 4, 10
CONFIG = tiny.QWEN2  # 2 layers; 4 heads on keys of 2
KINDS = ("none", "dots", "layer")
TRAIN = TrainConfig(kl=KLConfig(0.7))


def with_remat(remat):
  return dataclasses.replace(TRAIN, remat=remat)


def arguments(optimizer=KEEP_GRADIENT):
  """State, reference, batch [2, R, L] and scalars of `policy_update`."""
  rng = np.random.default_rng(0)
  shape = (2, R, L)
  is_token = np.arange(L) < rng.integers(4, L + 1, (2, R, 1))
  batch = TrainRows(
    tokens=rng.integers(0, tiny.VOCAB, shape, np.int32), is_token=is_token,
    mask=is_token & (np.arange(L) > 2), logprobs=rng.normal(-2, 0.3, shape).astype(np.float32),
    advantages=rng.normal(size=shape).astype(np.float32),
  )  # fmt: skip
  params = tiny.params(CONFIG)
  state = init_state(jax.tree.map(jnp.copy, params), optimizer)
  return state, tiny.params(CONFIG, 1), batch, jnp.int32(2), jnp.float32(0.6)


def traced(train, config=CONFIG):
  """The program of an update, only traced."""
  return policy_update.trace(config, train, KEEP_GRADIENT, *arguments()).jaxpr.jaxpr


def test_remat_changes_no_gradient():
  _, params, batch, _, temperature = arguments()
  batch = jax.tree.map(lambda x: x[0], batch)

  def loss(params, remat):
    scores = score(
      CONFIG, params, batch.tokens, batch.is_token, batch.is_token, temperature, remat
    )
    return jnp.sum(jnp.where(batch.mask, batch.advantages * scores, 0))

  gradients = jax.jit(lambda p: tuple(jax.grad(loss)(p, remat) for remat in KINDS))
  # Optimised, compilation would take a minute.
  expected, *others = gradients.lower(params).compile(
    {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
  )(params)
  assert optax.tree.norm(expected) > 0.1
  for actual in others:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, expected)


def test_remat_recomputes_in_the_trained_forward_only():
  """Matrix products per layer. dots: the two of attention again; layer: the projections too.

  No gradient needs what the last projection makes, because it is only added.
  """
  def products(equations):
    return sum(equation.primitive.name == "dot_general" for equation in equations)

  none, dots, layer = (products(equations_of(traced(with_remat(x)))) for x in KINDS)
  assert dots - none == CONFIG.num_layers * 2, (none, dots, layer)
  assert layer - none == CONFIG.num_layers * (2 + 6), (none, dots, layer)


def test_remat_keeps_what_its_name_says():
  """Activations that wait for the backward pass, by their shapes."""
  tokens, is_token = jnp.zeros((R, L), jnp.int32), jnp.ones((R, L), bool)

  def kept(remat):
    def pull_back(params):
      return jax.vjp(lambda p: model.hidden_states(CONFIG, p, tokens, is_token, remat), params)[1]

    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(pull_back, tiny.params(CONFIG)))]
    return [shape for shape in shapes if shape[:1] == (R,)]

  none, dots, layer = map(kept, KINDS)
  scores = (R, CONFIG.num_kv_heads, 2 * L, L)
  assert none.count(scores) >= CONFIG.num_layers and scores not in dots + layer
  inner = (R, L, CONFIG.intermediate_size)
  assert dots.count(inner) == 2 * CONFIG.num_layers  # of gate_proj and up_proj
  assert not layer.count(inner)
  assert len(layer) < len(dots) < len(none)


def test_remat_reaches_the_warm_start():
  def program(remat):
    state, _, batch, *_ = arguments()
    rows = (batch.tokens[0], batch.is_token[0], batch.mask[0])
    return supervised_update.trace(
      CONFIG, KEEP_GRADIENT, state, *rows, micro_rows=R, remat=remat
    ).jaxpr.jaxpr

  assert len([*equations_of(program("layer"))]) > len([*equations_of(program("none"))])


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_bfloat16_is_for_matrix_products_and_float32_for_all_that_is_summed_up(platform):
  half = dataclasses.replace(CONFIG, compute_dtype="bfloat16", attention="xla")
  _, params, batch, _, temperature = arguments()
  rows = params, batch.tokens[0], batch.is_token[0]

  def operands(jaxpr):
    dtypes = {}
    for equation in equations_of(jaxpr):
      of = {str(variable.aval.dtype) for variable in equation.invars}
      dtypes.setdefault(equation.primitive.name, set()).update(of)
    return dtypes

  with on(platform):
    layers = jax.make_jaxpr(partial(model.hidden_states, half))(*rows)
  products = [x for x in equations_of(layers.jaxpr) if x.primitive.name == "dot_general"]
  # A layer has seven of parameters, and two of attention, for which a CPU takes float32.
  halves = [x for x in products if {str(v.aval.dtype) for v in x.invars} == {"bfloat16"}]
  assert len(products) == 9 * CONFIG.num_layers
  assert len(halves) == (7 if platform == "cpu" else 9) * CONFIG.num_layers
  # Its units for products of bfloat16 add up in float32, and are left out where that is not asked.
  results = {str(x.outvars[0].aval.dtype) for x in products[:3]}  # queries, keys, values
  assert results == {"float32" if platform == "cpu" else "bfloat16"}
  assert layers.out_avals[0].dtype == jnp.bfloat16
  scored = score_rows.trace(half, *rows, batch.mask[0], temperature)
  # Of both softmaxes, the logprobs, the norms and the positions.
  for name in ("exp", "log", "reduce_max", "reduce_sum", "rsqrt", "cos", "sin"):
    assert operands(scored.jaxpr.jaxpr)[name] == {"float32"}, name
  assert [x.dtype for x in scored.jaxpr.out_avals] == [jnp.float32]

  update = traced(TRAIN, half)
  outside = {str(v.aval.dtype) for v in (*update.invars, *update.outvars)}
  assert outside == {"float32", "int32", "bool"}  # masters, moments, advantages, metrics
  loops = [equation for equation in equations_of(update) if equation.primitive.name == "while"]
  carried = {str(v.aval.dtype) for loop in loops for v in loop.outvars}
  assert loops and "bfloat16" not in carried  # gradients are added up in float32


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 0.02)])
def test_a_projection_has_the_gradient_of_a_matrix_product(dtype, tolerance):
  rng = np.random.default_rng(0)
  x, kernel, weights = (
    jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 3, 5), (5, 7), (2, 3, 7))
  )

  def gradient(product):
    return jax.grad(lambda x, kernel: (product(x, kernel) * weights).sum(), (0, 1))(x, kernel)

  for ours, expected in zip(gradient(model._product), gradient(jnp.matmul), strict=True):
    assert ours.dtype == expected.dtype == dtype
    ours, expected = (np.asarray(g, np.float32) for g in (ours, expected))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())
