"""Rollouts to training rows, and the edge buffer of SPO-tree. Host side, vectorised."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from spo_jax.config import TrainConfig
from spo_jax.layout import (
  before,
  behind_prompts,
  between,
  concatenate,
  fill,
  join,
  select,
  shift,
  unsampled,
)
from spo_jax.packs import most_packs, pack
from spo_jax.segments import uncertain_tokens
from spo_jax.structs import Array, Edges, Prompts, RolloutTree, Samples, TrainRows, Trajectories


def trajectory_rows(
  prompts: Prompts, trajectories: Trajectories, advantages: np.ndarray, threshold: float | None
) -> TrainRows:
  """One row per response.

  Args:
    advantages: f32[B, T]; threshold: train only on tokens with p < threshold, None: on all.
  """
  own = trajectories.samples
  tokens, is_token, is_response = behind_prompts(
    prompts, trajectories.prompt, own.tokens, own.lengths
  )
  start, width = prompts.lengths[trajectories.prompt], tokens.shape[1]

  def place(x: np.ndarray) -> np.ndarray:
    return np.where(is_response, shift(x, start, width), 0).astype(np.float32)

  logprobs = place(own.logprobs)
  mask = _probability_mask(logprobs, is_response, threshold)
  return TrainRows(tokens, is_token, mask, logprobs, place(advantages))


def tree_edges(
  prompts: Prompts, tree: RolloutTree, advantages: tuple[np.ndarray, ...], iteration: int
) -> Edges:
  """Every node with a signal as one sample; edges with advantage 0 are dropped.

  Args:
    advantages: levels 1..D of f32[P, n_d].
  """
  count, response_tokens = len(prompts.lengths), tree.tokens[-1].shape[2]
  response_tokens += sum(level.shape[2] for level in tree.tokens[:-1])
  path = unsampled(count, response_tokens)
  parts = []
  for depth, branch in enumerate(tree.branch_factors):
    parent = np.repeat(np.arange(len(path.lengths)), branch)
    own = Samples(*(
      level[depth].reshape(len(parent), *level[depth].shape[2:])
      for level in (tree.tokens, tree.logprobs, tree.lengths, tree.finished)
    ))  # fmt: skip
    response_start = path.lengths[parent]
    path = join(path.tokens[parent], response_start, own)
    advantage = advantages[depth].reshape(-1)
    kept = np.flatnonzero(tree.valid[depth].reshape(-1) & (advantage != 0))
    prompt = (np.arange(len(parent)) // (len(parent) // count))[kept]
    tokens, _, is_response = behind_prompts(
      prompts, prompt, path.tokens[kept], path.lengths[kept]
    )
    start = prompts.lengths[prompt]
    logprobs = np.where(is_response, shift(path.logprobs[kept], start, tokens.shape[1]), 0)
    parts.append(
      Edges(
        tokens=tokens,
        logprobs=logprobs.astype(np.float32),
        start=(start + response_start[kept]).astype(np.int32),
        end=(start + path.lengths[kept]).astype(np.int32),
        advantage=advantage[kept].astype(np.float32),
        question=prompts.question[prompt],
        born=np.full(len(kept), iteration, np.int32),
      )
    )
  return concatenate(parts)


def edge_rows(edges: Edges, threshold: float | None, rows: int) -> TrainRows:
  """One row per edge: loss on the node's own tokens, one advantage for all of them.

  Args:
    rows: empty rows fill up to this count, so that the shape is always the same.
  """
  edges = jax.tree.map(lambda x: fill(x, rows), edges)
  width = edges.tokens.shape[1]
  is_own = between(edges.start, edges.end, width)
  return TrainRows(
    tokens=edges.tokens,
    is_token=before(edges.end, width),
    mask=_probability_mask(edges.logprobs, is_own, threshold),
    logprobs=edges.logprobs,
    advantages=np.where(is_own, edges.advantage[:, None], 0),
  )


class EdgeBuffer:
  """Edges waiting to be trained on, each at most once (spo-method, section 2).

  A draw takes at most `quota` random edges per question, shuffles and cuts; what the cut
  leaves over stays. Edges `max_age` or more iterations old are discarded.
  """

  def __init__(self, quota: int, max_age: int, edges: Edges | None = None):
    self.quota = quota
    self.max_age = max_age
    self.edges = edges

  def __len__(self) -> int:
    return 0 if self.edges is None else len(self.edges.start)

  def add(self, edges: Edges) -> None:
    """Edges of one iteration; rows may grow wider from one to the next, never narrower."""
    if self.edges is None:
      self.edges = edges
      return
    more = ((0, 0), (0, edges.tokens.shape[1] - self.edges.tokens.shape[1]))
    waiting = self.edges.replace(
      tokens=np.pad(self.edges.tokens, more), logprobs=np.pad(self.edges.logprobs, more)
    )
    self.edges = concatenate([waiting, edges])

  def draw(
    self, count: int, iteration: int, rng: np.random.Generator, repeat: bool = False
  ) -> Edges:
    """At most `count` edges (exactly, with `repeat`, unless the buffer is empty).

    Raises:
      ValueError: nothing was ever added.
    """
    if self.edges is None:
      raise ValueError("draw from an edge buffer to which nothing was added; add a tree first.")
    fresh = select(self.edges, iteration - self.edges.born < self.max_age)
    shuffled = rng.permutation(len(fresh.start))
    by_question = shuffled[np.argsort(fresh.question[shuffled], kind="stable")]
    question = fresh.question[by_question]
    rank = np.arange(len(question)) - np.searchsorted(question, question)
    drawn = rng.permutation(by_question[rank < self.quota])[:count]
    left = np.ones(len(fresh.start), bool)
    left[drawn] = False
    self.edges = select(fresh, left)
    return select(fresh, np.resize(drawn, count) if repeat and len(drawn) else drawn)


def micro_batch_size(train: TrainConfig, row_tokens: int, shards: int) -> int:
  """How many rows, or packs, of a micro-batch: packs have the slots of as many rows.

  Args:
    shards: parts of a micro-batch, which have a pack each at least.
  """
  if not train.pack_tokens:
    return train.micro_batch_rows
  packs = train.micro_batch_rows * row_tokens // train.pack_tokens
  return max(packs // shards, 1) * shards


def optimiser_batches(
  rows: TrainRows,
  batch_rows: int,
  micro_batch: int,
  epochs: int,
  rng: np.random.Generator,
  pack_tokens: int = 0,
  own: np.ndarray | None = None,
  even: bool = False,
) -> Iterator[tuple[TrainRows, int]]:
  """Shuffled batches of fixed shape [micro-batches, micro_batch, L].

  Rows without signal (no masked token with an advantage) are left out. The rest is spread
  evenly over the fewest updates that hold it, so that no update is made from a few rows.

  Args:
    pack_tokens: more than 0: the rows of an update are packed, and L is this.
    own: bool[micro_batch], the rows of a micro-batch that this process has; None: all.
    even: whether rows are spread evenly over the micro-batches that are used, as where each of
      these counts the same (train.official). Without, one is filled after the other.
  Yields: its rows of the batch, filled up with empty ones, and how many micro-batches are used.
  """
  signal = np.flatnonzero((rows.mask & (rows.advantages != 0)).any(axis=1))
  updates = -(-len(signal) // batch_rows)
  micro_batches = -(-most_packs(batch_rows, rows.tokens.shape[1], pack_tokens) // micro_batch)
  own = np.ones(micro_batch, bool) if own is None else own
  places = np.flatnonzero(np.tile(own, micro_batches))
  for _ in range(epochs if updates else 0):
    for part in np.array_split(rng.permutation(signal), updates):
      packing = pack(select(rows, part), pack_tokens) if pack_tokens else None
      count = packing.count if packing else len(part)
      used = -(-count // micro_batch)
      if packing:
        made = packing.make(places)
      else:
        order, source = np.arange(count), np.full(micro_batches * micro_batch, -1)
        source[order % used * micro_batch + order // used if even else order] = part
        made = jax.tree.map(partial(_taken, source[places]), rows)
      yield jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), made), used


def _taken(source: np.ndarray, x: np.ndarray) -> np.ndarray:
  """Rows of x by number; those of number -1 are empty."""
  out = np.zeros((len(source), *x.shape[1:]), x.dtype)
  out[source >= 0] = x[source[source >= 0]]
  return out


def _probability_mask(
  logprobs: Array, is_response: Array, threshold: float | None
) -> np.ndarray:
  if threshold is None:
    return is_response
  return np.asarray(uncertain_tokens(logprobs, is_response, threshold))
