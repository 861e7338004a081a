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
  r"(?P<sign>(?:-\s?)?(?:\$\s?)?|\$\s?-\s?)"
  rf"(?:(?P<whole>[0-9]{{1,3}}(?:,[0-9]{{3}}){{1,9}}|{_DIGITS})(?:\.(?P<decimals>{_DIGITS})?)?"
  rf"|\.(?P<only_decimals>{_DIGITS}))"
  # Words may follow, as in "18 dollars."; more digits or an operator would make another number.
  r"(?P<words>[^0-9+*/^=_\\]*)"
)
_NOISE = re.compile(r"\\[!,; ]|\\(?=[$%])|\\(?:text|mbox|mathrm)(?=\{)|\*\*|[`{}]")


class GSM8K(Task):
  """Fields `question` and `answer`, which ends in `#### N`.

  A response's answer is the number behind its last `####` or in its last `\\boxed{}`, whichever
  comes later, else behind its last "answer is". Numbers are compared exactly: 1,080 is 1080.0.
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
  readers = [(tail.rfind(MARK), line_behind(tail, MARK)), (tail.rfind("\\boxed"), last_boxed(tail))]
  # "####" is also a heading in Markdown, which chat models put in front of their steps.
  for _, text in sorted(readers, key=lambda reader: reader[0], reverse=True):
    if text is not None and (number := number_of(text)) is not None:
      return number
  line = line_behind_answer_is(tail)
  return None if line is None else number_of(line)


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
  return f"-{value}" if "-" in match["sign"] and value != "0" else value
