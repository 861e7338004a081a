"""Which rows grow next: flat responses, chains of cutpoints, trees.

Every prompt is prefilled once; everything else grows from rows that exist. The rows of an iteration
wait in one queue for the slots of the engine. Text exists only inside `grade`, on the
host.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spo_jax import model, sampler, sharding
from spo_jax.compiles import program
from spo_jax.config import ModelConfig
from spo_jax.distributed import in_shares, to_host
from spo_jax.layout import before, concatenate, fill, join, select, unsampled
from spo_jax.model import Params
from spo_jax.queues import (
  QUEUE,
  at_prompts,
  behind,
  filled,
  kept_at_once,
  only,
  queues,
  unique_prefixes,
)
from spo_jax.segments import cutpoint_segments, segment_starts
from spo_jax.stops import prefix_states
from spo_jax.structs import (
  KVStore,
  Prompts,
  Requests,
  RolloutTree,
  Samples,
  Sampling,
  Trajectories,
)

# (problems, response tokens i32[B, T], lengths i32[B], finished bool[B]) -> rewards f32[B]
Grade = Callable[[Sequence[Any], np.ndarray, np.ndarray, np.ndarray], np.ndarray]
# (prompts, prompt row i[B], samples) -> trainer's logprobs f32[B, T]
Score = Callable[[Prompts, np.ndarray, Samples], np.ndarray]


@dataclass
class Engine:
  """What samples and grades. Counts and seconds add up until they are taken.

  Attributes:
    rows: slots of the sampler; the number of rows to grow is not bound by it.
    mesh: where it samples, None: where the parameters are. Its devices share slots and rows.
    kv_bytes: the most bytes of keys and values held at a time since counts were last taken.
  """

  config: ModelConfig
  sampling: Sampling
  rows: int  # decoded at once
  response_tokens: int  # T
  grade_fn: Grade
  mesh: Mesh | None = None
  counts: dict[str, int] = field(default_factory=dict)
  grade_seconds: float = 0.0
  reshard_seconds: float = 0.0
  kv_bytes: int = 0

  def __post_init__(self) -> None:
    self.take_counts()

  def take_counts(self) -> tuple[dict[str, int], dict[str, float]]:
    """Tokens counted, and seconds per kind of work, since this was last asked."""
    taken = self.counts, {"grade": self.grade_seconds, "reshard": self.reshard_seconds}
    self.counts = dict.fromkeys(("prefilled", "decoded", "unique", "slot_steps"), 0)
    self.grade_seconds = self.reshard_seconds = 0.0
    self.kv_bytes = 0
    return taken

  def place(self, params: Params) -> Params:
    """Parameters as the engine multiplies with them, rounded, and where it samples.

    Those that are so already stay as they are. They are rounded first: less is moved, and held.
    """
    started = time.perf_counter()
    placed = model.rounded(self.config, params)
    if self.mesh is not None and not sharding.is_on(placed, self.mesh):
      placed = sharding.move(placed, self.mesh)
    if placed is not params:
      jax.block_until_ready(placed)
      self.reshard_seconds += time.perf_counter() - started
    return placed

  def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  @property
  def shards(self) -> int:
    """Parts into which rows are shared out."""
    return 1 if self.mesh is None else sharding.row_shards(self.mesh)

  @property
  def slots(self) -> int:
    return -(-self.rows // self.shards) * self.shards

  def filled(self, questions: int, each: int) -> int:
    return filled(questions, each, self.rows, self.shards)

  def grade(self, prompts: Prompts, prompt: np.ndarray, samples: Samples) -> np.ndarray:
    """Rewards f32[B] of whole responses to prompts i[B]; the only place where text is made.

    Each process grades its share of the rows.
    """
    started = time.perf_counter()

    def graded(share: slice) -> np.ndarray:
      own = select(samples, share)
      problems = [prompts.problems[i] for i in prompt[share]]
      rewards = self.grade_fn(problems, own.tokens, own.lengths, own.finished)
      return np.asarray(rewards, np.float32)

    rewards = in_shares(len(prompt), graded)
    self.grade_seconds += time.perf_counter() - started
    return rewards

  def prefill(self, params: Params, tokens: np.ndarray, lengths: np.ndarray) -> KVStore:
    """Encodes prompts i32[P, Lp]; rows of length 0 are fillers of the fixed shape."""
    self.counts["prefilled"] += int(lengths.sum())
    with self._on_mesh():
      return sampler.prefill(self.config, params, tokens, np.maximum(lengths, 1))

  def grow(
    self,
    params: Params,
    stores: tuple[KVStore, ...],
    requests: Requests,
    key: jax.Array,
    room: int,
    max_tokens: int,
    keep: bool = False,
  ) -> tuple[Samples, KVStore | None, jax.Array]:
    """`sampler.grow`, still on the device; `fetch` brings the samples over.

    Args:
      stores: prompts, then what responses are made of; room: tokens of response that the
        context of a request and what it samples may have together.
    """
    self._assert_pieces_are_near(stores, requests)
    slots, rows = min(self.slots, len(requests.limit)), len(requests.limit)
    width = sampler.store_width(stores[0]) + room
    held = sum(x.nbytes for x in jax.tree.leaves(stores))
    held += sampler.store_bytes(self.config, slots, width)
    held += sampler.store_bytes(self.config, rows, max_tokens) if keep else 0
    self.kv_bytes = max(self.kv_bytes, held)
    if self.mesh is not None and not sharding.is_on(key, self.mesh):
      key = sharding.move(key, self.mesh)
    with self._on_mesh():
      return sampler.grow(
        self.config, params, stores, requests, key, self.sampling, slots=slots, width=width,
        max_tokens=max_tokens, keep=keep,
      )  # fmt: skip

  def _assert_pieces_are_near(self, stores: tuple[KVStore, ...], requests: Requests) -> None:
    """Nothing is sent from shard to shard: each has the pieces of its own requests."""
    counts = np.array([len(store.keys[0]) for store in stores])
    own = np.arange(len(requests.limit)) * self.shards // len(requests.limit)
    is_near = requests.pieces * self.shards // counts == own[:, None]
    assert is_near[requests.limit > 0].all(), "a request lies apart from the pieces of its context"

  def fetch(self, samples: Samples, slot_steps: jax.Array) -> Samples:
    """Host copy of what was sampled, counted."""
    on_host, slot_steps = to_host((samples, slot_steps))
    self.counts["decoded"] += int(on_host.lengths.sum())
    self.counts["slot_steps"] += int(slot_steps)
    return on_host

  def count_unique(self, *lengths: np.ndarray) -> None:
    """Counts tokens that a rollout is made of: each prompt and each drawn token once.

    They are taken from what a rollout returns. `prefilled` and `decoded` count the work that
    was done, so a prompt encoded or a prefix decoded again shows in the ratio of the two.
    """
    self.counts["unique"] += sum(int(x.sum()) for x in lengths)


@program(static_argnames=("interval", "max_segments"))
def _cut(
  logprobs: jax.Array, lengths: jax.Array, threshold: float, interval: int, max_segments: int
) -> tuple[jax.Array, jax.Array]:
  is_response = jnp.arange(logprobs.shape[1])[None] < lengths[:, None]
  segment = cutpoint_segments(logprobs, is_response, threshold, interval)
  return segment, segment_starts(segment, max_segments)


def flat(
  engine: Engine,
  params: Params,
  prompts: Prompts,
  samples: int,
  key: jax.Array,
  score: Score | None = None,
) -> Trajectories:
  """`samples` responses per question, one segment each (GRPO, RLOO, evaluation)."""
  params = engine.place(params)
  prompt, response, _ = _respond(
    engine, params, prompts, 0, len(prompts.lengths), samples, key, score
  )
  engine.count_unique(prompts.lengths, response.lengths)
  return Trajectories(
    prompt=prompt,
    samples=response,
    rewards=engine.grade(prompts, prompt, response),
    segment=before(response.lengths, engine.response_tokens).astype(np.int32) - 1,
    values=np.zeros((len(prompt), 1), np.float32),
  )


def chain(
  engine: Engine,
  params: Params,
  prompts: Prompts,
  samples: int,
  continuations: int,
  threshold: float,
  interval: int,
  key: jax.Array,
  score: Score | None = None,
) -> Trajectories:
  """Responses cut in front of low-probability tokens, each boundary's value estimated.

  V(s_b) is the mean reward of `continuations` fresh rollouts from s_b; identical prefixes
  are estimated once; behind the last segment stands the response's own reward
  (SPO-chain, arXiv:2505.23564).
  """
  own_key, continue_key = jax.random.split(key)
  max_segments = -(-engine.response_tokens // interval)
  params, parts, estimated = engine.place(params), [], 0
  at_once = kept_at_once(len(prompts.lengths), samples, engine.slots)
  for first in range(0, len(prompts.lengths), at_once):
    prompt, response, stores = _respond(
      engine, params, prompts, first, at_once, samples, own_key, score, keep=True
    )
    segment, starts = to_host(
      _cut(response.logprobs, response.lengths, threshold, interval, max_segments=max_segments)
    )
    values = np.zeros(starts.shape, np.float32)
    row, k = np.nonzero(starts < engine.response_tokens)
    distinct, inverse = unique_prefixes(prompt, response.tokens, row, starts[row, k])
    means = _continue(
      engine, params, stores, prompts, prompt, response, row[distinct], starts[row, k][distinct],
      continuations, continue_key, estimated,
    )  # fmt: skip
    del stores  # or they are held while the next part samples
    values[row, k] = means[inverse]
    estimated += len(distinct)
    parts.append(
      Trajectories(
        prompt=prompt,
        samples=response,
        rewards=engine.grade(prompts, prompt, response),
        segment=segment,
        values=values,
      )
    )
  taken = concatenate(parts)
  engine.count_unique(prompts.lengths, taken.samples.lengths)
  return taken


def tree(
  engine: Engine,
  params: Params,
  prompts: Prompts,
  branch_factors: tuple[int, ...],
  segment_tokens: int,
  key: jax.Array,
) -> RolloutTree:
  """Trees of fixed-length segments; a node that ends early is a leaf, the last level runs free.

  All trees grow level by level (SPO-tree, arXiv:2505.23564).
  """
  params = engine.place(params)
  questions = len(prompts.lengths)
  count = engine.filled(questions, int(np.prod(branch_factors)))
  tokens, lengths = _take(prompts, np.arange(questions), count)
  stores: tuple[KVStore, ...] = (engine.prefill(params, tokens, lengths),)
  nodes = at_prompts(tokens, lengths)
  alive = np.arange(count) < questions
  # The whole response down to each node of the level above.
  path = unsampled(count, engine.response_tokens)
  levels = []
  for depth, branch in enumerate(branch_factors):
    is_last = depth == len(branch_factors) - 1
    begun = depth * segment_tokens
    max_tokens = engine.response_tokens - begun if is_last else segment_tokens
    parent = np.repeat(np.arange(len(alive)), branch)
    valid = alive[parent]
    # A node's key is its place in its own tree and the question's place in the iteration.
    nodes = select(nodes, parent).replace(
      ids=np.arange(len(parent), dtype=np.int32), limit=(valid * max_tokens).astype(np.int32)
    )
    drawn, kept, slot_steps = engine.grow(
      params, stores, nodes, jax.random.fold_in(key, depth), begun + max_tokens, max_tokens,
      keep=not is_last,
    )  # fmt: skip
    own = engine.fetch(drawn, slot_steps)
    path = join(path.tokens[parent], path.lengths[parent], own)
    graded = np.flatnonzero(valid & (own.finished | is_last))
    rewards = np.zeros(len(parent), np.float32)
    prompt = np.arange(len(parent)) // (len(parent) // count)
    rewards[graded] = engine.grade(prompts, prompt[graded], select(path, graded))
    levels.append((own.tokens, own.logprobs, own.lengths, own.finished, valid, rewards))
    alive = valid & ~own.finished
    if kept is not None:
      stores, nodes = (*stores, kept), behind(nodes, own, engine.sampling.stop_table)
  engine.count_unique(prompts.lengths, *(lengths[valid] for _, _, lengths, _, valid, _ in levels))

  def by_tree(x: np.ndarray) -> np.ndarray:
    return x.reshape(count, -1, *x.shape[1:])[:questions]

  names = ("tokens", "logprobs", "lengths", "finished", "valid", "rewards")
  columns: dict[str, Any] = {
    name: tuple(map(by_tree, column)) for name, column in zip(names, zip(*levels))
  }
  return RolloutTree(**columns, branch_factors=branch_factors)


def _respond(
  engine: Engine,
  params: Params,
  prompts: Prompts,
  first: int,
  at_once: int,
  samples: int,
  key: jax.Array,
  score: Score | None,
  keep: bool = False,
) -> tuple[np.ndarray, Samples, tuple[KVStore, ...]]:
  """Of questions first .. first + at_once - 1: prompt row i[B], samples, and with `keep` the stores
  of prompts and of responses."""
  questions = np.arange(first, min(first + at_once, len(prompts.lengths)))
  count, rows = engine.filled(at_once, samples), len(questions) * samples
  tokens, lengths = _take(prompts, questions, count)
  store = engine.prefill(params, tokens, lengths)
  parent = np.repeat(np.arange(count), samples)
  number = np.arange(len(parent), dtype=np.int32)
  requests = select(at_prompts(tokens, lengths), parent).replace(
    ids=first * samples + number,
    limit=((number < rows) * engine.response_tokens).astype(np.int32),
  )
  drawn, own, slot_steps = engine.grow(
    params, (store,), requests, key, engine.response_tokens, engine.response_tokens, keep
  )
  response = select(engine.fetch(drawn, slot_steps), slice(rows))
  stores = () if own is None else (store, own)
  del store  # or it is held while responses are scored
  prompt = first + parent[:rows]
  if score is not None:
    response = response.replace(logprobs=score(prompts, prompt, response))
  return prompt, response, stores


def _continue(
  engine: Engine,
  params: Params,
  stores: tuple[KVStore, ...],
  prompts: Prompts,
  prompt: np.ndarray,
  response: Samples,
  row: np.ndarray,
  start: np.ndarray,
  continuations: int,
  key: jax.Array,
  first_id: int,
) -> np.ndarray:
  """Mean reward f32[U] of fresh continuations of `response[row, :start]`.

  Args:
    stores: of prompts and responses, whose rows those of `response` are; first_id: prefixes
      that were continued before.
  """
  source = np.repeat(np.arange(len(row)), continuations)
  row, start = row[source], start[source]
  length = prompts.lengths[prompt[row]]
  last_of_prompt = prompts.tokens[prompt[row], length - 1]
  states = prefix_states(engine.sampling.stop_table, response.tokens)
  requests = Requests(
    pieces=np.column_stack([prompt[row] - prompt[0], row]).astype(np.int32),
    offsets=np.column_stack([np.zeros_like(length), length - 1]),
    prefix=length + start,
    token=np.where(start > 0, response.tokens[row, start - 1], last_of_prompt),
    stop_state=states[row, start].astype(np.int32),
    ids=first_id * continuations + np.arange(len(row), dtype=np.int32),
    limit=engine.response_tokens - start,
  )
  shard = row * engine.shards // len(stores[-1].keys[0])
  calls = queues(shard, engine.shards, engine.slots * QUEUE)
  drawn = [
    engine.grow(
      params, stores, only(requests, call), key, engine.response_tokens, engine.response_tokens
    )
    for call in calls
  ]
  rewards = np.zeros(len(row), np.float32)
  for call, (samples, _, slot_steps) in zip(calls, drawn):
    mine = call[call >= 0]
    fetched = select(engine.fetch(samples, slot_steps), call >= 0)
    whole = join(response.tokens[row[mine]], start[mine], fetched)
    rewards[mine] = engine.grade(prompts, prompt[row[mine]], whole)
    engine.count_unique(fetched.lengths)
  total = np.bincount(source, rewards, len(row) // continuations)
  return (total / continuations).astype(np.float32)


def _take(prompts: Prompts, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompt tokens and lengths, filled up to `count` rows of length 0."""
  return fill(prompts.tokens[rows], count), fill(prompts.lengths[rows], count)
