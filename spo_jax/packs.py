"""Training rows that begin alike, packed so that every token is computed once. Host side.

Rows in lexicographic order are a depth-first walk through the trie of their tokens: each one
adds what it does not share with the row in front of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from spo_jax.layout import before, between, concatenate, fill, select
from spo_jax.structs import TrainRows, Trie


def most_packs(rows: int, row_tokens: int, pack_tokens: int) -> int:
  """No more packs than this are made of so many rows; as many as rows where pack_tokens is 0.

  A row begins a pack only where it fits into none that is there, so each of those is filled to
  more than pack_tokens - row_tokens, by rows of at most row_tokens.
  """
  return -(-rows // (pack_tokens // row_tokens)) if pack_tokens else rows


@dataclass(frozen=True)
class Packing:
  """Which row is in which pack; `make` makes any of the packs.

  Attributes:
    rows: in lexicographic order; pack_of: i[B]; count: of packs.
    cut, length: i[B], a row has slots of its own from column `cut` to `length`.
  """

  rows: TrainRows
  pack_of: np.ndarray
  cut: np.ndarray
  length: np.ndarray
  pack_tokens: int
  count: int

  def make(self, packs: np.ndarray | None = None) -> TrainRows:
    """Packs by number, all if None: [packs, pack_tokens] with `trie`, empty from `count` on.

    Args:
      packs: i[n], ascending.
    """
    packs = np.arange(self.count) if packs is None else packs
    made = []
    for number in packs[: max(np.searchsorted(packs, self.count), 1)]:  # one, be it empty
      own = np.flatnonzero(self.pack_of == number)
      made.append(_walk(select(self.rows, own), self.cut[own], self.length[own], self.pack_tokens))
    return jax.tree.map(lambda x: fill(x, len(packs)), concatenate(made))


def pack(rows: TrainRows, pack_tokens: int) -> Packing:
  """Rows with a loss as packs: their losses, each on a slot of its own, and what those see.

  A row shares slots of the row in front of it up to its first loss, and ends with its last:
  equal tokens with a loss each have a slot each.

  Args:
    rows: [B, L], each with a token in its mask, but none at its first slot.
    pack_tokens: slots of a pack, L at least.
  """
  row_tokens = rows.tokens.shape[1]
  start = rows.mask.argmax(axis=1)
  length = row_tokens - rows.mask[:, ::-1].argmax(axis=1)
  # Padding is 0, below all tokens: a row stands in front of those that go on from it.
  content = np.where(before(length, row_tokens), rows.tokens + 1, 0)
  order = _lexicographic(content, start)
  rows, content, start, length = select(rows, order), content[order], start[order], length[order]
  pack_of, cut = _assign(content, start, length, pack_tokens)
  return Packing(rows, pack_of, cut, length, pack_tokens, count=int(pack_of.max(initial=-1)) + 1)


def _lexicographic(content: np.ndarray, start: np.ndarray) -> np.ndarray:
  """The order of i32[B, L] as words, and of equal ones by `start`."""
  words = np.ascontiguousarray(content.astype(">u4")).view(f"V{4 * content.shape[1]}")[:, 0]
  order = np.argsort(start, kind="stable")
  return order[np.argsort(words[order], kind="stable")]


def _assign(
  content: np.ndarray, start: np.ndarray, length: np.ndarray, pack_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
  """The pack of every row, and its first column that is not a slot of the row in front of it.

  A row joins the pack to which it adds least, of those with room for it.
  """
  same = np.logical_and.accumulate(content[1:] == content[:-1], axis=1).sum(axis=1)
  alike = np.concatenate([[0], same])[: len(content)]
  pack_of, cut = np.zeros_like(start), np.zeros_like(start)
  room = np.full(most_packs(len(content), content.shape[1], pack_tokens), pack_tokens)
  shared = np.zeros_like(room)  # columns in which a row agrees with the last one of a pack
  for i in range(len(content)):
    shared = np.minimum(shared, alike[i])
    added = length[i] - np.minimum(shared, start[i])
    chosen = np.argmin(np.where(added <= room, added, pack_tokens + 1))
    pack_of[i], cut[i] = chosen, length[i] - added[chosen]
    room[chosen] -= added[chosen]
    shared[chosen] = pack_tokens  # the next row is compared with this one
  return pack_of, cut


def _walk(
  rows: TrainRows, cut: np.ndarray, length: np.ndarray, pack_tokens: int
) -> TrainRows:
  """Sorted rows as one pack, arrays of [1, pack_tokens]; `cut` and `length` bound what is new."""
  width = rows.tokens.shape[1]
  is_new = between(cut, length, width)
  slot = np.where(is_new, np.cumsum(is_new, dtype=np.int32).reshape(is_new.shape) - 1, -1)
  path = np.maximum.accumulate(slot, axis=0)  # slots only grow: the last one of its depth
  previous = np.concatenate([path[:, :1], path[:, :-1]], axis=1)
  # A token ends where a later row leaves its path: at the first slot of that row.
  first = np.append(np.int32(0), np.cumsum(length - cut, dtype=np.int32))
  leaves = np.where(cut[:, None] <= np.arange(width), first[:-1, None], first[-1])
  later = np.concatenate([leaves, np.full((1, width), first[-1])])[1:]
  end = np.minimum.accumulate(later[::-1], axis=0)[::-1]
  positions = np.broadcast_to(np.arange(width, dtype=np.int32), is_new.shape)

  def place(x: np.ndarray) -> np.ndarray:
    return fill(x[is_new], pack_tokens)[None]

  return TrainRows(
    place(rows.tokens), place(is_new), place(rows.mask), place(rows.logprobs),
    place(rows.advantages), Trie(
      place(positions), place(previous), place(end), np.array([len(cut)], np.int32), width
    ),
  )  # fmt: skip
