"""How tests look into a program: the gradient it takes, what it is traced to, what it sends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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


def collectives(text):
  """Everything that a compiled program sends: its kind and the shape of each array."""
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  for made, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
    for shape in re.findall(r"\w\[([\d,]*)\]", made):
      yield kind, [int(n) for n in shape.split(",") if n]


def printed_on_eight_devices(module):
  """The words that `check_meshes` of a test module prints in a process with 8 virtual devices."""
  tests = Path(__file__).parent
  environment = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
  }
  done = subprocess.run(
    [sys.executable, "-c", f"import {module}; {module}.check_meshes()"],
    env=environment, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout.split()
