"""GSM8K: grade-school word problems with a number as the answer (Cobbe et al., 2021)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from spo_jax.config import TaskConfig
from spo_jax.tasks.answers import TAIL_CHARS, last_boxed, line_behind, line_behind_answer_is
from spo_jax.tasks.base import Grade, Problem, Task
from spo_jax.tasks.data import Dataset, text_field

HUB = "openai/gsm8k:main"
MARK = "####"
# The data's calculator notes, `48/2 = <<48/2=24>>24`, are for a tool that no model here has.
CALCULATOR_NOTE = re.compile(r"<<[^<>\n]*>>")

MAX_LINE_CHARS = 100
_DIGITS = r"[0-9]{1,30}"
_NUMBER = re.compile(
  r"(?P<sign>(?:[-+−]\s?)?(?:[$€£]\s?)?|[$€£]\s?[-−]\s?)"
  rf"(?:(?P<whole>[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,9}}|{_DIGITS})(?:\.(?P<decimals>{_DIGITS})?)?"
  rf"|\.(?P<only_decimals>{_DIGITS}))"
  # Words may follow, as in "18 dollars."; more digits or an operator would make another number.
  r"(?!\s*(?:hundred|thousand|[bmtr]+illion|k\b))"
  r"(?P<words>(?:[^0-9+*/^=_\\]|(?<=[A-Za-z])/(?=[A-Za-z]))*)"
)
_NOISE = re.compile(
  r"\\[!,; ]|\\(?=[$%])|\\(?:text|mbox|mathrm|textbf|mathbf)(?=\{)|[`{}]"
  r"|(?<![0-9)])\*\*|\*\*(?![0-9(])"  # bold text, and not a power
  r"|(?<=[A-Za-z}])\^\{?[23]\}?(?![0-9])|\^\{?\\circ\}?"  # of units: m^2, degrees
)
_HEADING = re.compile(r"[0-9]{1,2}[.)]\s+[^\W\d]")


class GSM8K(Task):
  """Fields `question` and `answer`, which ends in `#### N`.

  A response's answer is the number behind its last `####` or in its last `\\boxed{}`, whichever
  comes later, else behind its last "answer is", else one that begins a heading (`#### 2. Total`).
  Numbers are compared exactly: 1,080 is 1080.0.
  """

  name = "gsm8k"
  prompt = "rho"
  conclusion = MARK

  def __init__(self, config: TaskConfig, seed: int):
    super().__init__(config)
    self._data = Dataset(self, config.path or HUB)

  def split(self, name: str) -> Sequence[Problem]:
    return self._data.split(name)

  def judge(self, problem: Problem, response: str) -> Grade:
    extracted = answer_of(response)
    return Grade(float(extracted == problem.answer), extracted)

  def from_record(self, record: Mapping[str, Any], uid: int) -> Problem:
    worked, mark, gold = text_field(record, "answer").rpartition(MARK)
    answer = number_of(gold)
    if answer is None:
      raise ValueError(f"field 'answer' has no number behind {MARK}: {gold.strip()[:40]!r}")
    demonstration = CALCULATOR_NOTE.sub("", worked) + mark + gold if mark else None
    return Problem(uid, str(record.get("question", "")), answer, demonstration)


def answer_of(response: str) -> str | None:
  """The number that a response concludes with, see GSM8K; as `number_of` writes it."""
  tail = response[-TAIL_CHARS:]
  marked, boxed, said = line_behind(tail, MARK), last_boxed(tail), line_behind_answer_is(tail)
  # Of an equation, x = 18, a box holds the number last.
  boxed = boxed and boxed.rpartition("=")[2]
  texts = [marked, boxed] if tail.rfind(MARK) > tail.rfind("\\boxed") else [boxed, marked]
  texts.append(said)
  # "####" is also a heading in Markdown, which chat models put in front of their steps.
  if marked is not None and _HEADING.match(marked):
    texts.remove(marked)
    texts.append(marked)
  numbers = (number_of(text) for text in texts if text is not None)
  return next((number for number in numbers if number is not None), None)


def number_of(line: str) -> str | None:
  """The number that a line begins with, in the one way of writing it: 1,080.0 is "1080".

  Equal numbers are equal texts, exactly, so nothing is ever computed. None where there is no
  number, more than one, or one with over 30 digits.
  """
  if len(line) > MAX_LINE_CHARS:
    line = line[:MAX_LINE_CHARS + 1]
  match = _NUMBER.fullmatch(_NOISE.sub("", line).strip())
  if match is None or len(line) > MAX_LINE_CHARS or any(map(str.isnumeric, match["words"])):
    return None
  whole = (match["whole"] or "0").replace(",", "").lstrip("0") or "0"
  decimals = (match["decimals"] or match["only_decimals"] or "").rstrip("0")
  value = f"{whole}.{decimals}" if decimals else whole
  is_negative = value != "0" and not {"-", "−"}.isdisjoint(match["sign"])
  return f"-{value}" if is_negative else value
