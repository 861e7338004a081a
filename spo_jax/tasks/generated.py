"""Splits of problems that are drawn, not read: endless, lazy, without a problem in common."""

import hashlib
import operator
import struct
from collections.abc import Callable, Sequence
from typing import overload

from spo_jax.tasks.base import SPLITS, Problem, unknown_name

VIRTUAL_LENGTH = 2**32
# Sixteenths of all problems that belong to each split, in the order of the hash.
_SHARES = {"train": 8, "validation": 4, "test": 4}
_SPLIT_OF_BUCKET = tuple(name for name, share in _SHARES.items() for _ in range(share))


class GeneratedSplit(Sequence[Problem]):
  """Problem i is the first draw of its own stream whose identity hashes into this split.

  That alone decides the split, so no two splits share a problem, whatever their seeds and the
  order of its numbers.

  Args:
    name: a split.
    seed: of all draws.
    draw: (key, uid) -> the problem that `key` stands for, a function of its arguments alone.
  """

  def __init__(self, name: str, seed: int, draw: Callable[[str, int], Problem]):
    if name not in SPLITS:
      raise unknown_name("split", name, SPLITS)
    self._name, self._seed, self._draw = name, seed, draw

  def __len__(self) -> int:
    return VIRTUAL_LENGTH

  @overload
  def __getitem__(self, index: int) -> Problem: ...

  @overload
  def __getitem__(self, index: slice) -> list[Problem]: ...

  def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    position = range(len(self))[operator.index(index)]
    uid = SPLITS.index(self._name) * VIRTUAL_LENGTH + position
    attempt = 0
    while True:
      problem = self._draw(f"{self._seed}/{self._name}/{position}/{attempt}", uid)
      if split_of(problem) == self._name:
        return problem
      attempt += 1


def split_of(problem: Problem) -> str:
  """The only split in which this problem may appear."""
  digest = hashlib.blake2b(problem.identity.encode(), digest_size=1).digest()
  return _SPLIT_OF_BUCKET[digest[0] % len(_SPLIT_OF_BUCKET)]


def draw_words(key: str, count: int) -> tuple[int, ...]:
  """`count` numbers in 0..65535, a function of the key alone on every machine and version."""
  return struct.unpack(f"<{count}H", hashlib.shake_128(key.encode()).digest(2 * count))
