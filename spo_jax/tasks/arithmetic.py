"""Chained arithmetic, generated: `05+1-5=` is answered `05+1=06;06-5=01;#01`."""

from collections.abc import Mapping, Sequence
from typing import Any

from spo_jax.config import TaskConfig
from spo_jax.tasks.base import Grade, Problem, Task
from spo_jax.tasks.data import text_field
from spo_jax.tasks.generated import GeneratedSplit, draw_words

LARGEST_VALUE = 99
MAX_ANSWER_CHARS = 4


class Arithmetic(Task):
  """`operations` additions and subtractions of single digits, running value always in 0..99.

  Values have two digits, so that every step of a worked answer has the same length.

  Raises: ValueError where operations < 1, or a path is given.
  """

  name = "arithmetic"
  charset = "#+-0123456789;="
  conclusion = "#"

  def __init__(self, config: TaskConfig, seed: int):
    super().__init__(config)
    if config.path is not None:
      raise ValueError(f"task.path={config.path!r} is set, but the task 'arithmetic' is generated: "
                       "remove task.path or choose another task.name")  # fmt: skip
    if config.operations < 1:
      raise ValueError(f"task.operations={config.operations} makes no problem: use at least 1")
    self._operations, self._seed = config.operations, seed

  def split(self, name: str) -> Sequence[Problem]:
    return GeneratedSplit(name, self._seed, self._draw)

  def judge(self, problem: Problem, response: str) -> Grade:
    start = response.find("#") + 1
    # One character more than an answer may have: enough to see that it is too long.
    tail = response[start:start + MAX_ANSWER_CHARS + 1]
    if not start or len(tail) > MAX_ANSWER_CHARS or not (tail.isascii() and tail.isdigit()):
      return Grade(0.0, None)
    return Grade(float(int(tail) == int(problem.answer)), tail)

  def from_record(self, record: Mapping[str, Any], uid: int) -> Problem:
    answer = text_field(record, "answer")
    if not (answer.isascii() and answer.isdigit() and len(answer) <= MAX_ANSWER_CHARS):
      raise ValueError(f"field 'answer' is {answer[:40]!r}, not a value in 0..{LARGEST_VALUE}")
    return Problem(uid, str(record.get("question", "")), answer, None)

  def _draw(self, key: str, uid: int) -> Problem:
    first, *words = draw_words(key, self._operations + 1)
    value = start = first % (LARGEST_VALUE + 1)
    steps, worked = [], []
    for word in words:
      sign, digit = divmod(word % 18, 9)
      step = -(digit + 1) if sign else digit + 1
      if not 0 <= value + step <= LARGEST_VALUE:
        step = -step
      steps.append(f"{step:+d}")
      worked.append(f"{value:02d}{step:+d}={value + step:02d};")
      value += step
    prompt = f"{start:02d}{''.join(steps)}="
    return Problem(uid, prompt, f"{value:02d}", f"{''.join(worked)}#{value:02d}")
