"""Competition mathematics: MATH, MATH-500, AIME; answers are compared in worker processes."""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spo_jax.config import TaskConfig
from spo_jax.tasks.answers import last_boxed, line_behind_answer_is
from spo_jax.tasks.base import Grade, Problem, Task
from spo_jax.tasks.data import Dataset, text_field
from spo_jax.tasks.pool import WorkerPool
from spo_jax.tasks.verify import equivalent

# The 12,000 train problems of Lightman et al. (2023), whose 500 test problems are MATH-500.
HUB = "nlile/hendrycks-MATH-benchmark"
MAX_ANSWER_CHARS = 300
MAX_DEPTH = 20
MAX_WORKERS = 32

_SPACING = re.compile(r"\\[!,;: ]|\\(?:left|right|displaystyle|q?quad)(?![a-zA-Z])|[\s$]")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbf|textrm)\{([^{}]*)\}")
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:,[0-9]{3})+")
_BASE = re.compile(r"([0-9]+)_\{?([0-9]+)\}?")
_INTEGER = re.compile(r"-?[0-9]{1,50}")


class Math(Task):
  r"""Fields `problem`, `solution` and `answer`; without `answer`, the solution's last `\boxed{}`.

  A response's answer is what its last `\boxed{}` holds; without one, what follows the last
  "answer is". Equal texts are right, different integers wrong; what is left math-verify compares,
  in processes that are stopped and replaced when they take too long.

  Args:
    check: decides in the workers whether (gold, answer) mean the same.
  Raises: ValueError where math-verify is not installed.
  """

  name = "math"
  prompt = "boxed"
  conclusion = "\\boxed"
  question_field = "problem"

  def __init__(
    self, config: TaskConfig, seed: int, check: Callable[[str, str], bool] = equivalent
  ):
    super().__init__(config)
    if check is equivalent and importlib.util.find_spec("math_verify") is None:
      raise ValueError(f"task.name={self.name} compares answers with math-verify, which is not "
                       "installed: pip install 'spo_jax[math]'")  # fmt: skip
    self._data = Dataset(self, config.path or HUB)
    workers = min(os.cpu_count() or 1, MAX_WORKERS)
    self._pool = WorkerPool(check, workers, warm_up=("\\frac{1}{2}", "0.5"))

  def split(self, name: str) -> Sequence[Problem]:
    return self._data.split(name)

  def judge(self, problem: Problem, response: str) -> Grade:
    return self.judge_many([problem], [response])[0]

  def judge_many(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Grade]:
    answers = [answer_of(response) for response in responses]
    verdicts: dict[tuple[str, str], bool | None] = {}
    for problem, answer in zip(problems, answers, strict=True):
      if answer is not None:
        verdicts[problem.answer, answer] = quick_verdict(problem.answer, answer)
    # Samples of one question often agree, and each pair is compared once.
    unclear = [pair for pair, verdict in verdicts.items() if verdict is None]
    for pair, is_right in zip(unclear, self._pool.map(unclear), strict=True):
      verdicts[pair] = is_right
    return [
      Grade(0.0, None) if answer is None
      else Grade(float(verdicts[problem.answer, answer] is True), tidy(answer))
      for problem, answer in zip(problems, answers, strict=True)
    ]  # fmt: skip

  def from_record(self, record: Mapping[str, Any], uid: int) -> Problem:
    solution = record.get("solution")
    if record.get("answer") is not None:
      answer = text_field(record, "answer").strip()
    else:
      boxed = last_boxed(text_field(record, "solution"))
      if boxed is None:
        raise ValueError("field 'answer' is missing, and 'solution' has no \\boxed{} either")
      answer = boxed
    if len(answer) > MAX_ANSWER_CHARS:
      raise ValueError(f"field 'answer' has {len(answer)} characters, over {MAX_ANSWER_CHARS}")
    demonstration = solution if isinstance(solution, str) and solution.strip() else None
    return Problem(uid, str(record.get("problem", "")), answer, demonstration)

  def counters(self) -> dict[str, int]:
    """Gradings that were stopped (`timeouts`), killed their worker (`crashes`) or raised."""
    return self._pool.counters()

  def close(self) -> None:
    self._pool.close()


def answer_of(response: str) -> str | None:
  """The answer that a response concludes with, None where there is none that could be right."""
  answer = last_boxed(response)
  if answer is None:
    line = line_behind_answer_is(response)
    answer = line and line.strip(" .*$")
  if not answer or len(answer) > MAX_ANSWER_CHARS or _depth(answer) > MAX_DEPTH:
    return None
  return answer


def _depth(text: str) -> int:
  """Deepest nesting of brackets of any kind; deep ones exhaust parsers."""
  depth = deepest = 0
  for character in text:
    depth += (character in "{[(") - (character in ")]}")
    deepest = max(deepest, depth)
  return deepest


def tidy(answer: str) -> str:
  r"""One way of writing for what differs only in spaces, sizes and leading zeros."""
  text = _TEXT.sub(r"\1", _FRACTION.sub(r"\\frac", _SPACING.sub("", answer))).rstrip(".")
  if _THOUSANDS.fullmatch(text):
    text = text.replace(",", "")
  return str(int(text)) if _INTEGER.fullmatch(text) else text


def quick_verdict(gold: str, answer: str) -> bool | None:
  """Whether the answer is right, None where that takes a computation. Bounded string work."""
  wanted, given = tidy(gold), tidy(answer)
  if wanted == given:
    return True
  if (own := _BASE.fullmatch(wanted)) and (other := _BASE.fullmatch(given)):
    return own.groups() == other.groups()  # a parser would leave the base out
  if _INTEGER.fullmatch(wanted) and _INTEGER.fullmatch(given):
    return False
  if _TEXT.fullmatch(gold.strip()) and not any(map(str.isdigit, wanted)):
    # Words, which a parser would take for products of their letters.
    return wanted.strip("()").casefold() == given.strip("()").casefold()
  return None
