"""Arithmetic expressions of models, read exactly: integers, + - * /, parentheses, nothing else."""

import re
from fractions import Fraction

from spo_jax.tasks.answers import TAIL_CHARS, last_boxed
from spo_jax.tasks.base import Grade, Problem

ANSWER_MARK = "Answer:"
MAX_CHARS = 300
MAX_DEPTH = 30
MAX_INTEGERS = 16

_REWRITES = (
  (re.compile(r"\\(?:left|right|displaystyle|,|;|!|quad| |\(|\))|[ $`]"), ""),
  (re.compile(r"\["), "("),
  (re.compile(r"\]"), ")"),
  (re.compile(r"(?<=[0-9)])(?=\()"), "*"),  # (8-4)(7-1), as people write a product
  (re.compile(r"\\(?:times|cdot|ast)|[×·∗⋅]"), "*"),
  (re.compile(r"\\div|÷"), "/"),
  (re.compile(r"[−–]"), "-"),
  (re.compile(r"\\[dt]frac"), r"\\frac"),
)
_SPACE = re.compile(r"(?<![0-9]) | (?![0-9])")
_SPLIT_NUMBER = re.compile(r"[0-9] [0-9]")
_TOKEN = re.compile(r"[0-9]{1,9}(?![0-9])|\\frac|[-+*/(){}]")


class _Reader:
  """Recursive descent over tokens; every method raises ValueError where they make no sense."""

  def __init__(self, tokens: list[str]):
    self._tokens = [*tokens, "end"]
    self._at = self._depth = 0
    self.integers: list[int] = []

  def whole(self) -> Fraction:
    value = self._sum()
    self._take("end")
    return value

  def _take(self, *wanted: str) -> str:
    token = self._tokens[self._at]
    if token not in wanted:
      raise ValueError(f"{token} where {wanted} was to be")
    self._at += 1
    return token

  def _next_is(self, *wanted: str) -> bool:
    return self._tokens[self._at] in wanted

  def _sum(self) -> Fraction:
    value = self._product()
    while self._next_is("+", "-"):
      sign = self._take("+", "-")
      term = self._product()
      value = value + term if sign == "+" else value - term
    return value

  def _product(self) -> Fraction:
    value = self._signed()
    while self._next_is("*", "/"):
      operator = self._take("*", "/")
      factor = self._signed()
      value = value * factor if operator == "*" else _divide(value, factor)
    return value

  def _signed(self) -> Fraction:
    # Behind an operator too, as in 3*-2; a second sign is no expression of a person.
    if self._next_is("-"):
      self._take("-")
      return -self._atom()
    return self._atom()

  def _atom(self) -> Fraction:
    if self._next_is("("):
      return self._inside("(", ")")
    if self._next_is("\\frac"):
      self._take("\\frac")
      numerator = self._inside("{", "}")
      return _divide(numerator, self._inside("{", "}"))
    token = self._tokens[self._at]
    if not token.isdigit() or len(self.integers) >= MAX_INTEGERS:
      raise ValueError(f"{token} is no integer")
    self._at += 1
    self.integers.append(int(token))
    return Fraction(self.integers[-1])

  def _inside(self, opening: str, closing: str) -> Fraction:
    self._take(opening)
    self._depth += 1
    if self._depth > MAX_DEPTH:
      raise ValueError("nested too deeply")
    value = self._sum()
    self._depth -= 1
    self._take(closing)
    return value


def _divide(value: Fraction, divisor: Fraction) -> Fraction:
  if not divisor:
    raise ValueError("division by zero")
  return value / divisor


def evaluate(text: str) -> tuple[Fraction, list[int]]:
  r"""Value and integers of an expression, in the order in which they stand.

  Understands + - * / × ÷ · \times \cdot \div \frac{a}{b}, parentheses and brackets, products
  without a sign in front of these, and a minus sign.

  Raises: ValueError for everything else, and beyond 300 characters, 30 levels or 16 integers.
  """
  if len(text) > MAX_CHARS:
    raise ValueError(f"over {MAX_CHARS} characters")
  text = " ".join(text.split())
  if _SPLIT_NUMBER.search(text):
    raise ValueError("two numbers without an operator")
  for pattern, replacement in _REWRITES:
    text = pattern.sub(replacement, text)
  tokens = _TOKEN.findall(text)
  if "".join(tokens) != text:
    raise ValueError("characters that no expression has")
  reader = _Reader(tokens)
  return reader.whole(), reader.integers


def judge_expression(problem: Problem, response: str) -> Grade:
  """1 where the response's expression uses `problem.numbers`, each once, and is `problem.answer`.

  The expression stands behind the last "Answer:" or in the last `\\boxed{}`, whichever comes
  later and can be read. It may be one side of an equation, or of a chain of them, all of whose
  sides have to be right.
  """
  extracted = expression_of(response)
  if extracted is None:
    return Grade(0.0, None)
  try:
    sides = [evaluate(side) for side in extracted.split("=")]
  except ValueError:
    return Grade(0.0, extracted)
  are_equal = all(value == int(problem.answer) for value, _ in sides)
  is_used = any(sorted(used) == sorted(problem.numbers) for _, used in sides)
  return Grade(float(are_equal and is_used), extracted)


def expression_of(response: str) -> str | None:
  """The text that a response gives as its expression; None where there is none."""
  tail = response[-TAIL_CHARS:]
  _, marked, behind = tail.rpartition(ANSWER_MARK)
  line = behind.lstrip().partition("\n")[0] if marked else None
  texts = [line, last_boxed(tail)]
  if tail.rfind(ANSWER_MARK) < tail.rfind("\\boxed"):
    texts.reverse()
  # Spaces say nothing, except between two numbers.
  found = [
    _SPACE.sub("", " ".join(text.strip(" .*$").split()))
    for text in texts if text and len(text) <= MAX_CHARS
  ]  # fmt: skip
  return next(filter(_is_readable, found), next(filter(None, found), None))


def _is_readable(text: str) -> bool:
  try:
    return bool([evaluate(side) for side in text.split("=")])
  except ValueError:
    return False
