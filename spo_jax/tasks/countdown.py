"""Countdown: reach a target from given numbers, each used once."""

from collections.abc import Mapping, Sequence
from typing import Any

from spo_jax.config import TaskConfig
from spo_jax.tasks.base import Grade, Problem, Task
from spo_jax.tasks.data import MAX_INTEGERS, Dataset, integers_field, text_field
from spo_jax.tasks.expressions import ANSWER_MARK, judge_expression
from spo_jax.tasks.generated import GeneratedSplit, draw_words
from spo_jax.tasks.solutions import Tree, worked, write

LEAST_LARGEST = 10  # below, a split may be without a single problem
SMALL = 10  # every other number is at most this, because larger ones rarely have a product


class Countdown(Task):
  """Question `Numbers: 3 7 25. Target: 46.`, answered `3*7=21, 25+21=46. Answer: 25+3*7`.

  Without a path, an endless run of questions: `numbers` of them, no number, target or step above
  `largest`, none below 1. With one, the rows of its files: fields `nums` (or `numbers`) and
  `target`, for which no demonstration is known.

  Raises: ValueError for numbers or largest that make no questions.
  """

  name = "countdown"
  prompt = "countdown"
  conclusion = ANSWER_MARK
  question_field = None

  def __init__(self, config: TaskConfig, seed: int):
    super().__init__(config)
    if not 2 <= config.numbers <= MAX_INTEGERS:
      raise ValueError(f"task.numbers={config.numbers} must be from 2 to {MAX_INTEGERS}")
    if not LEAST_LARGEST <= config.largest < 2**16:
      raise ValueError(f"task.largest={config.largest} must be from {LEAST_LARGEST} to 65535")
    self._data = Dataset(self, config.path) if config.path is not None else None
    self._numbers, self._largest, self._seed = config.numbers, config.largest, seed

  def split(self, name: str) -> Sequence[Problem]:
    if self._data is not None:
      return self._data.split(name)
    return GeneratedSplit(name, self._seed, self._draw)

  def judge(self, problem: Problem, response: str) -> Grade:
    return judge_expression(problem, response)

  def from_record(self, record: Mapping[str, Any], uid: int) -> Problem:
    numbers = integers_field(record, "numbers" if "numbers" in record else "nums")
    target = text_field(record, "target")
    if not (target.isascii() and target.isdigit() and len(target) <= 9):
      raise ValueError(f"field 'target' is {target[:40]!r}, not an integer of at most 9 digits")
    return _problem(uid, numbers, int(target), None)

  def _draw(self, key: str, uid: int) -> Problem:
    """Draws numbers, then combines two of what is left until one value, the target, remains."""
    words = iter(draw_words(key, 5 * self._numbers))
    numbers = []
    for _ in range(self._numbers):
      bound = SMALL if next(words) % 2 else self._largest
      numbers.append(1 + next(words) % bound)
    values: list[tuple[int, Tree]] = [(number, number) for number in numbers]
    while len(values) > 1:
      first = values.pop(next(words) % len(values))
      second = values.pop(next(words) % len(values))
      choices = _choices(first, second, self._largest)
      values.append(choices[next(words) % len(choices)])
    target, tree = values[0]
    return _problem(uid, tuple(numbers), target, tree)


def _choices(
  a: tuple[int, Tree], b: tuple[int, Tree], largest: int
) -> list[tuple[int, Tree]]:
  """Every operation on two values that stays within 1..largest and changes something."""
  (high, left), (low, right) = (a, b) if a[0] >= b[0] else (b, a)
  found: list[tuple[int, Tree]] = []
  if high + low <= largest:
    found.append((high + low, (left, "+", right)))
  if high > low:
    found.append((high - low, (left, "-", right)))
  if low > 1 and high * low <= largest:
    found.append((high * low, (left, "*", right)))
  if low > 1 and high % low == 0:
    found.append((high // low, (left, "/", right)))
  return found


def _problem(uid: int, numbers: tuple[int, ...], target: int, tree: Tree | None) -> Problem:
  prompt = f"Numbers: {' '.join(map(str, numbers))}. Target: {target}."
  solution = None if tree is None else f"{worked(tree)}. {ANSWER_MARK} {write(tree)}"
  return Problem(uid, prompt, str(target), solution, numbers)
