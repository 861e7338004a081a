"""Counts the programs that are compiled, so that recompilation after warm-up is seen.

The body of a jitted function runs exactly when JAX traces it for a new set of shapes, so a
note taken there names every program. Names are stable across processes: a resumed run does
not count again what the run before it had compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

_listening: list[CompileCount] = []


class CompileCount:
  """Context manager whose `programs` are the names of all programs compiled so far.

  Args:
    before: `programs` of the run that this one resumes.
  """

  def __init__(self, before: Iterable[str] = ()):
    self.programs = set(before)

  def __enter__(self) -> CompileCount:
    _listening.append(self)
    return self

  def __exit__(self, *_: object) -> None:
    _listening.remove(self)


def program(**jit_options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """`jax.jit` with the given options, counted."""

  def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
      signature = ", ".join(_describe(x) for x in jax.tree.leaves((args, kwargs)))
      for count in _listening:
        count.programs.add(f"{function.__module__}.{function.__name__}({signature})")
      return function(*args, **kwargs)

    return jax.jit(traced, **jit_options)

  return decorate


def _describe(leaf: Any) -> str:
  if isinstance(leaf, jax.core.Tracer):
    return str(leaf.aval)
  return repr(leaf) if isinstance(leaf, bool | int | float | str) else type(leaf).__name__
