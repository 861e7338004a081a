"""Counts the programs that are compiled, so that recompilation after warm-up is seen.

The body of a jitted function runs exactly when JAX traces it for a new set of shapes, so a
note taken there names every program. Names are stable across processes: a resumed run does
not count again what the run before it had compiled. Within a process a name that is traced
again is counted again: so is a program that recompiles because a static argument is new.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
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
    self._traced: Counter[str] = Counter()

  def note(self, name: str) -> None:
    self._traced[name] += 1
    again = self._traced[name]
    self.programs.add(name if again == 1 else f"{name} #{again}")

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
      leaves, structure = jax.tree.flatten((args, kwargs))
      signature = ", ".join(map(_describe, leaves))
      static = [structure, *filter(dataclasses.is_dataclass, leaves)]
      digest = hashlib.blake2b(repr(static).encode(), digest_size=4).hexdigest()
      for count in _listening:
        count.note(f"{function.__module__}.{function.__name__}({signature}) {digest}")
      return function(*args, **kwargs)

    return jax.jit(traced, **jit_options)

  return decorate


def _describe(leaf: Any) -> str:
  if isinstance(leaf, jax.core.Tracer):
    return str(leaf.aval)
  return repr(leaf) if isinstance(leaf, bool | int | float | str) else type(leaf).__name__
