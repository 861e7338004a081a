"""Expressions that reach a target, and how they are written down and worked out."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import gcd

Tree = int | tuple["Tree", str, "Tree"]  # an expression: a number, or (left, operator, right)
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_Item = tuple[int, int, Tree]  # numerator, denominator and expression of a value


def write(tree: Tree) -> str:
  """The expression with no more parentheses than it needs."""
  if isinstance(tree, int):
    return str(tree)
  left, operator, right = tree
  binds = _PRECEDENCE[operator]
  texts = [write(left), write(right)]
  if not isinstance(left, int) and _PRECEDENCE[left[1]] < binds:
    texts[0] = f"({texts[0]})"
  if not isinstance(right, int):
    inner = _PRECEDENCE[right[1]]
    if inner < binds or (inner == binds and operator in "-/"):
      texts[1] = f"({texts[1]})"
  return operator.join(texts)


def worked(tree: Tree) -> str:
  """The steps that compute an expression: `3*7=21, 25+21=46`."""
  steps: list[str] = []
  _work(tree, steps)
  return ", ".join(steps)


def _work(tree: Tree, steps: list[str]) -> Fraction:
  if isinstance(tree, int):
    return Fraction(tree)
  left, operator, right = tree
  a, b = _work(left, steps), _work(right, steps)
  value = a / b if operator == "/" else {"+": a + b, "-": a - b, "*": a * b}[operator]
  shown = [str(x) if x.denominator == 1 else f"({x})" for x in (a, b)]
  steps.append(f"{operator.join(shown)}={value}")
  return value


class Solver:
  """Finds expressions that are `target`; what it learns of one question helps with the next."""

  def __init__(self, target: int):
    self._target = target
    # Values from which the target cannot be reached, without and with fractions on the way.
    self._dead: dict[bool, set[tuple[tuple[int, int], ...]]] = {False: set(), True: set()}

  def solve(self, numbers: Sequence[int]) -> Tree | None:
    """An expression of all numbers, each once; with fractions only where there is no other way.

    Returns: None where there is none at all. Time grows fast: four numbers take milliseconds,
      six take minutes.
    """
    items = [(number, 1, number) for number in numbers]
    for fractions in (False, True):
      if (tree := self._search(items, fractions)) is not None:
        return tree
    return None

  def _search(self, items: Sequence[_Item], fractions: bool) -> Tree | None:
    if len(items) == 1:
      numerator, denominator, tree = items[0]
      return tree if numerator == self._target * denominator else None
    state = tuple(sorted(item[:2] for item in items))
    if state in self._dead[fractions]:
      return None
    for i in range(len(items)):
      for j in range(i):
        rest = [item for k, item in enumerate(items) if k not in (i, j)]
        for numerator, denominator, tree in _combinations(items[j], items[i]):
          common = gcd(numerator, denominator)
          if fractions or common == denominator:
            combined = numerator // common, denominator // common, tree
            if (found := self._search([*rest, combined], fractions)) is not None:
              return found
    self._dead[fractions].add(state)
    return None


def _combinations(a: _Item, b: _Item) -> Iterator[_Item]:
  """What one operation makes of two values; nothing negative, which is never needed."""
  if a[0] * b[1] < b[0] * a[1]:
    a, b = b, a
  (p, q, left), (r, s, right) = a, b
  yield p * s + r * q, q * s, (left, "+", right)
  yield p * s - r * q, q * s, (left, "-", right)
  yield p * r, q * s, (left, "*", right)
  if r:
    yield p * s, q * r, (left, "/", right)
    yield q * r, p * s, (right, "/", left)
