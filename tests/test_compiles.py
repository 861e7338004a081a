from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from spo_jax.compiles import CompileCount, program
from spo_jax.config import ModelConfig
from spo_jax.structs import Sampling


def fresh_program(**options):
  """A function of its own, of which nothing is compiled yet."""

  def total(x, *args, **kwargs):
    return x.sum()

  return program(**options)(total)


def zeros(*shape, dtype=np.float32):
  return np.zeros(shape, dtype)


def test_a_program_counts_once_per_shape_and_type():
  total, counts = fresh_program(), []
  with CompileCount() as compiles:
    for x in (zeros(3), zeros(3) + 1, zeros(4), zeros(3), zeros(3, dtype=np.int32), zeros(3, 1)):
      total(x)
      counts.append(len(compiles.programs))
  assert counts == [1, 1, 2, 2, 3, 4]


def test_every_static_value_makes_a_program_of_its_own():
  total = fresh_program(static_argnames=("config", "width", "flag"))
  with CompileCount() as compiles:
    for config in (ModelConfig(), ModelConfig(hidden_size=64), ModelConfig()):
      for width in (1, 2):
        total(zeros(2), config=config, width=width, flag=True)
    assert len(compiles.programs) == 4


def test_static_fields_of_a_struct_make_a_program_of_their_own_and_values_do_not():
  def names(*truncate):
    total = fresh_program()
    with CompileCount() as compiles:
      for temperature in (0.5, 1.0):
        for static in truncate:
          total(zeros(2), Sampling(temperature, 1.0, (1,), 0, truncate=static))
    return compiles.programs

  # Whichever comes first: a resumed run may compile in another order.
  assert names(True, False) == names(False, True) == names(True) | names(False)
  assert len(names(True) | names(False)) == 2


def test_a_program_that_is_compiled_over_and_over_is_seen():
  """As a new optimiser in each iteration would do: a function is equal to itself only."""
  total = fresh_program(static_argnames="optimiser")
  with CompileCount() as compiles:
    for _ in range(3):
      total(zeros(2), optimiser=functools.partial(print))
  assert len(compiles.programs) == 3


def test_counts_hold_what_was_compiled_while_they_were_open():
  total = fresh_program()
  total(zeros(1))
  with CompileCount() as outer:
    total(zeros(2))
    with CompileCount() as inner:
      total(zeros(3))
    total(zeros(4))
  total(zeros(5))
  assert len(outer.programs) == 3
  assert len(inner.programs) == 1
  assert inner.programs < outer.programs


def test_a_program_still_is_the_function_that_it_was():
  total = fresh_program()
  assert total(np.arange(4)) == 6
  assert total.__name__ == "total"


# A module of its own, so that its programs have the same names wherever it is imported.
MODULE = """
import numpy as np
from spo_jax.compiles import CompileCount, program
from spo_jax.config import ModelConfig
from spo_jax.structs import Sampling

@program(static_argnames=("config", "optimiser", "factors"))
def step(config, optimiser, params, sampling, factors, name="mean"):
  return params["a"] * sampling.temperature

def compiled(rows, before=()):
  with CompileCount(before) as compiles:
    for count in rows:
      params = {"a": np.ones(count), "b": (np.ones(2, bool),)}
      step(ModelConfig(), print, params, Sampling(1.0, 1.0, (1, 2), 0), (2, 3))
  return compiles.programs
"""


def test_names_are_the_same_in_another_process_so_a_resumed_run_counts_nothing_twice(
  tmp_path, monkeypatch
):
  (tmp_path / "named.py").write_text(MODULE)
  command = "import named; print(*sorted(named.compiled([3, 4])), sep='\\n')"
  path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
  result = subprocess.run(
    [sys.executable, "-c", command], capture_output=True, text=True, check=True,
    env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "1"},
  )  # fmt: skip
  before = result.stdout.splitlines()
  assert len(before) == 2

  monkeypatch.syspath_prepend(tmp_path)
  resumed = importlib.import_module("named").compiled([4, 5], before)
  assert resumed > set(before)
  assert len(resumed) == 3
