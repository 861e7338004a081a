"""Chained arithmetic, generated: `05+1-5=` is answered `05+1=06;06-5=01;#01`."""

import hashlib
import operator
import struct
from collections.abc import Sequence
from typing import overload

from spo_jax.tasks.base import SPLITS, Grade, Problem, Task, unknown_name

VIRTUAL_LENGTH = 2**32
LARGEST_VALUE = 99
MAX_ANSWER_CHARS = 4
# Sixteenths of all problem texts that belong to each split, in the order of the hash.
_SHARES = {"train": 8, "validation": 4, "test": 4}
_SPLIT_OF_BUCKET = tuple(name for name, share in _SHARES.items() for _ in range(share))


class Arithmetic(Task):
  """`operations` additions and subtractions of single digits, running value always in 0..99.

  Values have two digits, so that every step of a worked answer has the same length.

  Raises: ValueError where operations < 1 or unfinished_penalty < 0.
  """

  name = "arithmetic"
  charset = "#+-0123456789;="

  def __init__(self, operations: int, unfinished_penalty: float, seed: int):
    if operations < 1:
      raise ValueError(f"task.operations={operations} makes no problem: use at least 1")
    if not unfinished_penalty >= 0:
      raise ValueError(f"task.unfinished_penalty={unfinished_penalty} must be at least 0")
    self._operations, self._seed = operations, seed
    self._unfinished_penalty = unfinished_penalty

  def split(self, name: str) -> Sequence[Problem]:
    if name not in SPLITS:
      raise unknown_name("split", name, SPLITS)
    return _Split(name, self._operations, self._seed)

  def grade(self, problem: Problem, response: str, finished: bool) -> Grade:
    if not finished:
      return Grade(0.0 - self._unfinished_penalty, None)
    start = response.find("#") + 1
    # One character more than an answer may have: enough to see that it is too long.
    tail = response[start:start + MAX_ANSWER_CHARS + 1]
    if not start or len(tail) > MAX_ANSWER_CHARS or not (tail.isascii() and tail.isdigit()):
      return Grade(0.0, None)
    return Grade(float(int(tail) == int(problem.answer)), tail)


class _Split(Sequence[Problem]):
  """Problem i is the first draw of its own stream whose text hashes into this split.

  The text alone decides the split, so no two splits share a problem, whatever their seeds.
  """

  def __init__(self, name: str, operations: int, seed: int):
    self._name, self._operations, self._seed = name, operations, seed

  def __len__(self) -> int:
    return VIRTUAL_LENGTH

  @overload
  def __getitem__(self, index: int) -> Problem: ...

  @overload
  def __getitem__(self, index: slice) -> list[Problem]: ...

  def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    uid = range(len(self))[operator.index(index)]
    attempt = 0
    while True:
      start, steps = _draw(f"{self._seed}/{self._name}/{uid}/{attempt}", self._operations)
      prompt = f"{start:02d}{''.join(f'{step:+d}' for step in steps)}="
      if split_of(prompt) == self._name:
        return _problem(uid, prompt, start, steps)
      attempt += 1


def split_of(prompt: str) -> str:
  """The only split in which this problem text may appear."""
  bucket = hashlib.blake2b(prompt.encode(), digest_size=1).digest()[0] % len(_SPLIT_OF_BUCKET)
  return _SPLIT_OF_BUCKET[bucket]


def _draw(key: str, operations: int) -> tuple[int, list[int]]:
  """First value and signed steps, a function of the key alone on every machine and version."""
  digest = hashlib.shake_128(key.encode()).digest(2 * (operations + 1))
  first, *words = struct.unpack(f"<{operations + 1}H", digest)
  value = start = first % (LARGEST_VALUE + 1)
  steps = []
  for word in words:
    sign, digit = divmod(word % 18, 9)
    step = -(digit + 1) if sign else digit + 1
    if not 0 <= value + step <= LARGEST_VALUE:
      step = -step
    steps.append(step)
    value += step
  return start, steps


def _problem(uid: int, prompt: str, start: int, steps: list[int]) -> Problem:
  value, worked = start, []
  for step in steps:
    worked.append(f"{value:02d}{step:+d}={value + step:02d};")
    value += step
  return Problem(uid, prompt, f"{value:02d}", f"{''.join(worked)}#{value:02d}")
