"""Bytes that each chip sends in one call of a compiled program, read from its HLO text.

A collective inside a loop counts once per turn. The compiler's own cost analysis counts loop
bodies once, and knows nothing of loops that run until the data says stop.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b(pred|[suf]\d+(?:e\w+)?|bf16|c64|c128)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass
class _Instruction:
  name: str
  kind: str  # opcode
  result: str  # its type as text
  operands: list[str]
  attributes: str


@dataclass
class _Computation:
  instructions: dict[str, _Instruction] = field(default_factory=dict)
  root: str = ""


def collective_bytes(hlo: str, turns: Mapping[str, int] | None = None) -> dict[str, float]:
  """Bytes sent per chip and kind of collective.

  Of a ring of g chips each sends (g - 1)/g of an all-gather's result, of a reduce-scatter's or
  all-to-all's operand, twice that of an all-reduce's, and the whole of a permute's.

  Args:
    hlo: `compiled.as_text()`.
    turns: how often loops run whose number of turns is not in the program, by a pattern that is
      searched in the `op_name` that JAX gave them; once where none is found.
  """
  computations, entry = _parse(hlo)
  counted: dict[str, tuple[str, float]] = {}

  def visit(name: str, times: float) -> None:
    for instruction in computations[name].instructions.values():
      kind = instruction.kind
      base = kind.removesuffix("-start")
      if base in KINDS:
        # One transfer may be written down in several phases, which share their channel.
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        key = channel[0] if channel else f"{name}/{instruction.name}"
        sent = times * _sent(base, instruction)
        if sent > counted.get(key, ("", -1.0))[1]:
          counted[key] = base, sent
      if kind.endswith(("-done", "-update")):
        continue  # their computation is that of their -start
      inner = times
      if kind == "while":
        known = _known_turns(computations, instruction)
        inner *= _told_turns(instruction, turns or {}) if known is None else known
      for called in _called(instruction):
        if called in computations:
          visit(called, inner)

  visit(entry, 1.0)
  sums: dict[str, float] = defaultdict(float)
  for kind, sent in counted.values():
    sums[kind] += sent
  return dict(sums)


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
  computations: dict[str, _Computation] = {}
  entry, current = "", _Computation()
  for line in hlo.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations.setdefault(match[1], _Computation())
      entry = match[1] if line.startswith("ENTRY") else entry
    elif match := _INSTRUCTION.match(line):
      result, rest = _split_type(line[match.end() :])
      opcode, _, rest = rest.partition("(")
      inside, attributes = _split_parenthesis(rest)
      operands = re.findall(r"%([\w.\-]+)", inside)
      if opcode == "constant":
        operands = [inside]
      current.instructions[match[2]] = _Instruction(
        match[2], opcode.strip(), result, operands, attributes
      )
      current.root = match[2] if match[1] else current.root
  if not entry:
    raise ValueError("the text holds no ENTRY computation; pass what compiled.as_text() returns.")
  return computations, entry


def _split_type(text: str) -> tuple[str, str]:
  """A type, which is a tuple in parentheses or ends at a space, and what follows it."""
  if text.startswith("("):
    inside, rest = _split_parenthesis(text[1:])
    return inside, rest
  result, _, rest = text.partition(" ")
  return result, rest


def _split_parenthesis(text: str) -> tuple[str, str]:
  """What stands in front of the parenthesis that closes, and behind it."""
  depth = 1
  for place, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if not depth:
      return text[:place], text[place + 1 :]
  return text, ""


def _called(instruction: _Instruction) -> list[str]:
  called = _CALLED.findall(instruction.attributes)
  for branches in _BRANCHES.findall(instruction.attributes):
    called += [name.strip().lstrip("%") for name in branches.split(",")]
  return called


def _told_turns(loop: _Instruction, turns: Mapping[str, int]) -> int:
  named = re.search(r'op_name="([^"]*)"', loop.attributes)
  found = [count for pattern, count in turns.items() if named and re.search(pattern, named[1])]
  return found[0] if found else 1


def _known_turns(computations: dict[str, _Computation], loop: _Instruction) -> int | None:
  """Turns of a loop that says so, or that counts up from 0 to a constant."""
  if match := re.search(r'known_trip_count"?:\{"?n"?:"(\d+)"', loop.attributes):
    return int(match[1])
  names = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.attributes))
  condition, body = computations[names["condition"]], computations[names["body"]]
  test = condition.instructions[condition.root]
  if test.kind != "compare" or "direction=LT" not in test.attributes:
    return None
  counter, bound = (condition.instructions[name] for name in test.operands)
  if counter.kind != "get-tuple-element" or bound.kind != "constant":
    return None
  index = re.search(r"index=(\d+)", counter.attributes)
  assert index is not None
  step = 1
  following = body.instructions[body.root]
  if following.kind == "tuple":
    addition = body.instructions.get(following.operands[int(index[1])])
    if addition is not None and addition.kind == "add":
      operands = [body.instructions[name] for name in addition.operands]
      steps = [int(x.operands[0]) for x in operands if x.kind == "constant"]
      step = steps[0] if steps else 1
  return -(-int(bound.operands[0]) // step)


def _sent(kind: str, instruction: _Instruction) -> float:
  sizes = [_bytes(*found) for found in _ARRAY.findall(instruction.result)]
  # An asynchronous start returns its operands and contexts too; the result is the largest.
  whole = max(sizes) if instruction.kind.endswith("-start") and kind != "all-reduce" else sum(sizes)
  group = _group_size(instruction.attributes)
  if kind == "collective-permute":
    return whole
  if kind == "reduce-scatter":
    return whole * (group - 1)
  return (2 if kind == "all-reduce" else 1) * whole * (group - 1) / group


def _bytes(dtype: str, dimensions: str) -> float:
  bits = _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0])
  return bits / 8 * math.prod(int(size) for size in dimensions.split(",") if size)


def _group_size(attributes: str) -> int:
  """Chips of one replica group, in each of the three ways in which HLO writes groups."""
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
  if match := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
    return int(match[1])
  if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
    return len(match[1].split(","))
  return 1
