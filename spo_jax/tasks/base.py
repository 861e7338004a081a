"""What a task is: problems, splits, a grader, and the order in which questions are asked."""

import abc
import dataclasses
import difflib
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Problem:
  """One question. `uid` is unique within its split, `demonstration` a response that is right."""

  uid: int
  prompt: str
  answer: str
  demonstration: str | None


class Grade(NamedTuple):
  """`reward` of a response and the answer that was read from it, None where there was none."""

  reward: float
  extracted: str | None


class Task(abc.ABC):
  """Where problems come from and how a response is judged.

  Attributes:
    name: what `task.name` calls it.
    charset: every character of a generated task's prompts and responses, in the order of their
      token ids; None for real datasets, which bring a tokenizer of their own.
  """

  name: str
  charset: str | None

  @abc.abstractmethod
  def split(self, name: str) -> Sequence[Problem]:
    """The problems of "train", "validation" or "test": lazy, only `len()` and `[i]` are cheap.

    Raises: ValueError for any other name.
    """

  @abc.abstractmethod
  def grade(self, problem: Problem, response: str, finished: bool) -> Grade:
    """Judges one response; pure, and never raises.

    Args:
      response: untrusted model text, without prompt and end-of-text token.
      finished: False where the response was cut off at its length limit. It then earns 0, less
        the task's unfinished penalty, whatever it says.
    """


def unknown_name(kind: str, name: str, known: Collection[str]) -> ValueError:
  """The error for a name that is not one of `known`, with the nearest that is."""
  nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
  return ValueError(f"unknown {kind} {name!r}: did you mean {nearest!r}? "
                    f"Known: {', '.join(known)}.")


def question_order(num_problems: int, seed: int, cursor: int, count: int) -> np.ndarray:
  """Problem indices at positions cursor .. cursor+count-1 of an endless run of permutations.

  Each epoch of `num_problems` positions visits every problem once, in an order of its own. The
  permutation is a keyed Feistel cipher that walks on while it lands outside the range (Black and
  Rogaway, 2002), so a split of 2**32 problems costs no memory and the cursor is the only state.

  Returns: i64[count].
  Raises: ValueError unless num_problems is in 1 .. 2**62 and cursor and count are at least 0.
  """
  if not 1 <= num_problems <= 2**62 or cursor < 0 or count < 0:
    raise ValueError(f"cannot order questions: num_problems={num_problems} must be in 1..2**62, "
                     f"cursor={cursor} and count={count} at least 0")
  positions = np.arange(cursor, cursor + count, dtype=np.uint64)
  epoch, index = np.divmod(positions, np.uint64(num_problems))
  key = _mix(_mix(np.full(count, seed % 2**64, np.uint64)) + epoch)
  # At least 16 values: over 4 the cipher reaches few of the possible orders.
  half_bits = max(2, ((num_problems - 1).bit_length() + 1) // 2)
  index = _feistel(index, key, half_bits)
  while (outside := index >= num_problems).any():
    index[outside] = _feistel(index[outside], key[outside], half_bits)
  return index.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
  """A bijection of 0 .. 4**half_bits-1 for each key, u64[N] -> u64[N]."""
  shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
  left, right = values >> shift, values & mask
  for round_key in range(1, 7):
    left, right = right, left ^ (_mix(keys + (right << np.uint64(3)) + np.uint64(round_key)) & mask)
  return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
  """The splitmix64 finaliser: every output bit depends on every input bit, u64[N] -> u64[N]."""
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))
