"""What a task is: problems, splits, a grader, and the order in which questions are asked."""

import abc
import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from spo_jax.config import TaskConfig

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Problem:
  """One question.

  Attributes:
    uid: the same in every run; no other problem of the task has it, in any split.
    prompt: the question, before a prompt template is put around it.
    answer: what the grader compares with.
    demonstration: a response that earns the full reward, None where none is known.
    numbers: what an expression has to use, each once; empty for questions of other kinds.
  """

  uid: int
  prompt: str
  answer: str
  demonstration: str | None
  numbers: tuple[int, ...] = ()

  @property
  def identity(self) -> str:
    """The same for problems that differ only in the order of their numbers."""
    return f"{sorted(self.numbers)} {self.answer}" if self.numbers else self.prompt


class Grade(NamedTuple):
  """`reward` of a response and the answer that was read from it, None where there was none.

  Equal answers are the same text, as far as that can be told without computing.
  """

  reward: float
  extracted: str | None


class Task(abc.ABC):
  """Where problems come from and how a response is judged.

  A task says `split`, `judge` and `from_record`; everything else has a default.

  Attributes:
    name: what `task.name` calls it.
    prompt: name of the prompt template that suits it, see `prompts.py`.
    conclusion: the mark in front of an answer; `repeat_penalty` is for using it twice.
    question_field: where the rows of a file hold the question, None where other fields make it.
    charset: every character of the task's prompts and responses, in the order of their token
      ids; None where a real tokenizer is wanted.
    skipped: file -> number of its rows that could not be used, of the splits read so far.
    skipped_rows: the first of them, as `file:line: reason`.

  Raises: ValueError for a penalty that is not a finite number of at least 0.
  """

  name: str
  prompt: ClassVar[str] = "plain"
  conclusion: ClassVar[str]
  question_field: ClassVar[str | None] = "question"
  charset: ClassVar[str | None] = None

  def __init__(self, config: TaskConfig):
    for key in ("unfinished_penalty", "repeat_penalty"):
      value = getattr(config, key)
      if not 0 <= value < float("inf"):
        raise ValueError(f"task.{key}={value} must be at least 0: it is subtracted from the reward")
    self._unfinished_penalty = config.unfinished_penalty
    self._repeat_penalty = config.repeat_penalty
    self.skipped: dict[str, int] = {}
    self.skipped_rows: list[str] = []

  @abc.abstractmethod
  def split(self, name: str) -> Sequence[Problem]:
    """The problems of "train", "validation" or "test": lazy, only `len()` and `[i]` are cheap.

    Raises: ValueError for any other name, and where files have no such split.
    """

  @abc.abstractmethod
  def judge(self, problem: Problem, response: str) -> Grade:
    """1 or 0 for a response that ended by itself.

    Pure, never raises, and bounded in time and memory, because `response` is untrusted model
    text of any length: without prompt and end-of-text token, but perhaps with null characters
    and lone surrogates.
    """

  @abc.abstractmethod
  def from_record(self, record: Mapping[str, Any], uid: int) -> Problem:
    """A row of a file as a problem; without its question, one that is good for grading only.

    Raises: ValueError naming the field that is missing or cannot be used.
    """

  def grade(self, problem: Problem, response: str, finished: bool) -> Grade:
    """Judges one response, see `judge`.

    Args:
      finished: False where the response was cut off at its length limit. It then earns 0, less
        the task's unfinished penalty, whatever it says.
    """
    return self.grade_many([problem], [response], [finished])[0]

  def grade_many(
    self,
    problems: Sequence[Problem],
    responses: Sequence[str],
    finished: Sequence[bool],
    with_penalties: bool = True,
  ) -> list[Grade]:
    """`grade` of each response, in order; faster for tasks that judge in processes of their own.

    Args:
      with_penalties: False where right answers are counted: then a reward is 1 or 0.
    """
    ended = [i for i, has_ended in enumerate(finished) if has_ended]
    judged = self.judge_many([problems[i] for i in ended], [responses[i] for i in ended])
    unfinished, repeat = (
      (self._unfinished_penalty, self._repeat_penalty) if with_penalties else (0.0, 0.0)
    )
    grades = [Grade(0.0 - unfinished, None)] * len(responses)
    for i, (reward, extracted) in zip(ended, judged, strict=True):
      is_repeated = responses[i].count(self.conclusion) > 1
      grades[i] = Grade(reward - repeat if is_repeated else reward, extracted)
    return grades

  def judge_many(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
    """`judge` of each response."""
    return [self.judge(*pair) for pair in zip(problems, responses, strict=True)]

  def counters(self) -> dict[str, int]:
    """What went wrong while grading since the last call, by name; empty for most tasks."""
    return {}

  def close(self) -> None:
    """Ends the processes that the task started; the next grading starts them again."""
    return None


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
