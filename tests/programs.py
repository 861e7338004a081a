"""How tests look into an update: the gradient it takes, and what it is traced to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxprs_in_params

# Leaves the gradient behind as its state, for everybody to see.
KEEP_GRADIENT = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda gradient, _, params: (jax.tree.map(jnp.negative, gradient), gradient),
)


def equations_of(jaxpr):
  """All equations of a jaxpr, inner jaxprs included."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations_of(inner)


def arrays_in(jaxpr):
  """All arrays that a jaxpr computes."""
  for equation in equations_of(jaxpr):
    yield from (variable.aval for variable in equation.outvars)


def count_matmuls(jaxpr):
  return sum(equation.primitive.name == "dot_general" for equation in equations_of(jaxpr))
