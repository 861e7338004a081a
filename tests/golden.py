"""Reference vectors: inputs and what the authors' published torch functions made of them.

`tests/data/golden_*.json` holds part of that file, unrounded; trees are stored by column.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


def load(name: str) -> dict[str, Any]:
  return json.loads((Path(__file__).parent / "data" / f"golden_{name}.json").read_text())


class TreeLevels(NamedTuple):
  branch_factors: tuple[int, ...]
  rewards: tuple[np.ndarray, ...]  # levels 1..D, NaN wherever nothing was graded
  finished: tuple[np.ndarray, ...]
  valid: tuple[np.ndarray, ...]
  place: list[tuple[int, int]]  # (level, index) of every node of the depth-first list


def tree_levels(tree: dict[str, Any]) -> TreeLevels:
  """One depth-first tree as arrays [1, n_d] per level."""
  parents, depths, rewards = tree["parent"], tree["depth"], tree["leaf_reward"]
  branch = [0] * max(depths)
  place: list[tuple[int, int]] = []
  children = [0] * len(parents)
  for parent, depth in zip(parents, depths):
    if parent >= 0:
      branch[depth - 1] = max(branch[depth - 1], parents.count(parent))
  for parent, depth in zip(parents, depths):
    if parent < 0:
      place.append((0, 0))
      continue
    place.append((depth, place[parent][1] * branch[depth - 1] + children[parent]))
    children[parent] += 1
  sizes = np.cumprod(branch)
  reward = [np.full((1, n), np.nan, np.float32) for n in sizes]
  finished = [np.zeros((1, n), bool) for n in sizes]
  valid = [np.zeros((1, n), bool) for n in sizes]
  for (level, index), value in list(zip(place, rewards))[1:]:
    valid[level - 1][0, index] = True
    if value is not None:
      finished[level - 1][0, index] = True
      reward[level - 1][0, index] = value
  return TreeLevels(tuple(branch), tuple(reward), tuple(finished), tuple(valid), place)
