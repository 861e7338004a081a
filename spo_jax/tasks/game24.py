"""Game of 24: make 24 from four numbers, each used once."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from spo_jax.config import TaskConfig
from spo_jax.tasks.base import SPLITS, Grade, Problem, Task, unknown_name
from spo_jax.tasks.data import Dataset, integers_field
from spo_jax.tasks.expressions import judge_expression
from spo_jax.tasks.generated import split_of
from spo_jax.tasks.solutions import Solver, worked, write

TARGET = 24
NUMBERS = 4
LARGEST = 13  # as on playing cards


class Game24(Task):
  r"""Question `Numbers: 4 7 8 8.`, answered by an expression in `\boxed{}`.

  Without a path, the questions are all choices of four cards that can be solved, split by a hash
  of their text; with one, the rows of its files, which have a field `numbers`.
  """

  name = "game24"
  prompt = "game24"
  conclusion = "\\boxed"
  question_field = None

  def __init__(self, config: TaskConfig, seed: int):
    super().__init__(config)
    self._data = Dataset(self, config.path) if config.path is not None else None
    self._solver = Solver(TARGET)
    self._problems: list[Problem] = []

  def split(self, name: str) -> Sequence[Problem]:
    if self._data is not None:
      return self._data.split(name)
    if name not in SPLITS:
      raise unknown_name("split", name, SPLITS)
    if not self._problems:
      hands = itertools.combinations_with_replacement(range(1, LARGEST + 1), NUMBERS)
      found = (self._problem(uid, numbers) for uid, numbers in enumerate(hands))
      self._problems = [problem for problem in found if problem.demonstration]
    return [problem for problem in self._problems if split_of(problem) == name]

  def judge(self, problem: Problem, response: str) -> Grade:
    return judge_expression(problem, response)

  def from_record(self, record: Mapping[str, Any], uid: int) -> Problem:
    numbers = integers_field(record, "numbers")
    if len(numbers) != NUMBERS:
      raise ValueError(f"field 'numbers' holds {len(numbers)} numbers, not {NUMBERS}")
    problem = self._problem(uid, numbers)
    if not problem.demonstration:
      raise ValueError(f"field 'numbers': {' '.join(map(str, numbers))} cannot make {TARGET}")
    return problem

  def _problem(self, uid: int, numbers: tuple[int, ...]) -> Problem:
    tree = self._solver.solve(numbers)
    solution = None if tree is None else f"{worked(tree)}. Answer: \\boxed{{{write(tree)}}}"
    prompt = f"Numbers: {' '.join(map(str, numbers))}."
    return Problem(uid, prompt, str(TARGET), solution, numbers)
