"""Which rows grow next: flat responses, chains of cutpoints, trees.

Every prompt is prefilled once; everything else is forked from rows that exist. Text
exists only inside `grade`, on the host.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spo_jax import sampler, sharding
from spo_jax.compiles import program
from spo_jax.config import ModelConfig
from spo_jax.distributed import gather, own_share, to_host
from spo_jax.layout import before, concatenate, fill, join, select, unsampled
from spo_jax.model import Params
from spo_jax.segments import cutpoint_segments, segment_starts
from spo_jax.stops import prefix_states
from spo_jax.structs import KVCache, Prompts, RolloutTree, Samples, Sampling, Trajectories

# (problems, response tokens i32[B, T], lengths i32[B], finished bool[B]) -> rewards f32[B]
Grade = Callable[[Sequence[Any], np.ndarray, np.ndarray, np.ndarray], np.ndarray]
# (prompts, prompt row i[B], samples) -> trainer's logprobs f32[B, T]
Score = Callable[[Prompts, np.ndarray, Samples], np.ndarray]


@dataclass
class Engine:
  """What samples and grades. Counts and seconds add up until they are taken.

  Attributes:
    mesh: where it samples, None: where the parameters are. Rows are filled up so that all of
      its devices share them.
  """

  config: ModelConfig
  sampling: Sampling
  rows: int  # rows decoded at once: the shape of every program
  response_tokens: int  # T
  grade_fn: Grade
  mesh: Mesh | None = None
  counts: dict[str, int] = field(default_factory=dict)
  grade_seconds: float = 0.0
  reshard_seconds: float = 0.0

  def __post_init__(self) -> None:
    self.take_counts()

  def take_counts(self) -> tuple[dict[str, int], dict[str, float]]:
    """Tokens counted, and seconds per kind of work, since this was last asked."""
    taken = self.counts, {"grade": self.grade_seconds, "reshard": self.reshard_seconds}
    self.counts = dict.fromkeys(("prefilled", "decoded", "unique", "slot_steps"), 0)
    self.grade_seconds = self.reshard_seconds = 0.0
    return taken

  def place(self, params: Params) -> Params:
    """Parameters where the engine samples; those that are there already stay as they are."""
    if self.mesh is None or sharding.is_on(params, self.mesh):
      return params
    started = time.perf_counter()
    placed = jax.block_until_ready(sharding.move(params, self.mesh))
    self.reshard_seconds += time.perf_counter() - started
    return placed

  def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  def _shared_out(self, x: np.ndarray, filler: int = 0) -> np.ndarray:
    """i32 rows, filled up to a number that all devices share."""
    shards = 1 if self.mesh is None else sharding.row_shards(self.mesh)
    return fill(x.astype(np.int32), -(-len(x) // shards) * shards, filler)

  def grade(self, prompts: Prompts, prompt: np.ndarray, samples: Samples) -> np.ndarray:
    """Rewards f32[B] of whole responses to prompts i[B]; the only place where text is made.

    Each process grades its share of the rows.
    """
    started = time.perf_counter()
    share = own_share(len(prompt))
    own = select(samples, share)
    problems = [prompts.problems[i] for i in prompt[share]]
    rewards = self.grade_fn(problems, own.tokens, own.lengths, own.finished)
    rewards = gather(np.asarray(rewards, np.float32), len(prompt))
    self.grade_seconds += time.perf_counter() - started
    return rewards

  def prefill(self, params: Params, tokens: np.ndarray, lengths: np.ndarray) -> KVCache:
    """Encodes prompts i32[P, Lp]; rows of length 0 are fillers of the fixed shape."""
    self.counts["prefilled"] += int(lengths.sum())
    slots = tokens.shape[1] + self.response_tokens
    tokens, lengths = self._shared_out(tokens), self._shared_out(np.maximum(lengths, 1), 1)
    with self._on_mesh():
      return sampler.prefill(self.config, params, tokens, lengths, slots=slots)

  def grow(
    self,
    params: Params,
    cache: KVCache,
    parent: np.ndarray,
    prefix: np.ndarray,
    token: np.ndarray,
    stop_state: np.ndarray,
    key: jax.Array,
    ids: np.ndarray,
    limit: np.ndarray,
    max_tokens: int,
    keep_cache: bool = False,
  ) -> tuple[Samples, Any, jax.Array]:
    """`sampler.grow`, still on the device; `fetch` brings the samples over.

    Fillers may follow the rows that were asked for.
    """
    if self.mesh is not None and not sharding.is_on(key, self.mesh):
      key = sharding.move(key, self.mesh)
    with self._on_mesh():
      return sampler.grow(
        self.config, params, cache, self._shared_out(parent), self._shared_out(prefix, 1),
        self._shared_out(token), self._shared_out(stop_state), key, self._shared_out(ids),
        self._shared_out(limit), self.sampling, max_tokens=max_tokens, keep_cache=keep_cache,
      )  # fmt: skip

  def fetch(self, samples: Samples, steps: jax.Array) -> Samples:
    """Host copy of what was sampled, counted."""
    on_host, steps = to_host((samples, steps))
    self.counts["decoded"] += int(on_host.lengths.sum())
    self.counts["slot_steps"] += int(steps) * len(on_host.lengths)
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
  """`samples` responses per question, one segment each (GRPO, RLOO, evaluation).

  Raises: ValueError where `engine.rows` does not hold the samples of one question.
  """
  params, parts = engine.place(params), []
  for prompt, response, _ in _respond(engine, params, prompts, samples, key, score):
    parts.append(
      Trajectories(
        prompt=prompt,
        samples=response,
        rewards=engine.grade(prompts, prompt, response),
        segment=before(response.lengths, engine.response_tokens).astype(np.int32) - 1,
        values=np.zeros((len(prompt), 1), np.float32),
      )
    )
  taken = concatenate(parts)
  engine.count_unique(prompts.lengths, taken.samples.lengths)
  return taken


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

  Raises: ValueError where `engine.rows` does not hold the samples of one question.
  """
  own_key, continue_key = jax.random.split(key)
  max_segments = -(-engine.response_tokens // interval)
  params, parts, estimated = engine.place(params), [], 0
  for prompt, response, cache in _respond(engine, params, prompts, samples, own_key, score):
    segment, starts = to_host(
      _cut(response.logprobs, response.lengths, threshold, interval, max_segments=max_segments)
    )
    values = np.zeros(starts.shape, np.float32)
    row, k = np.nonzero(starts < engine.response_tokens)
    first, inverse = _unique_prefixes(prompt, response.tokens, row, starts[row, k])
    means = _continue(
      engine, params, cache, prompts, prompt, response, row[first], starts[row, k][first],
      continuations, continue_key, estimated,
    )  # fmt: skip
    values[row, k] = means[inverse]
    estimated += len(first)
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

  As many whole trees as `engine.rows` holds grow at once (SPO-tree, arXiv:2505.23564).

  Raises: ValueError where `engine.rows` does not hold the leaves of one.
  """
  at_once = _groups_at_once(engine, int(np.prod(branch_factors)), "leaves of a tree")
  params, parts = engine.place(params), []
  for first in range(0, len(prompts.lengths), at_once):
    rows = np.arange(first, min(first + at_once, len(prompts.lengths)))
    parts.append(
      _grow_trees(engine, params, prompts, rows, at_once, branch_factors, segment_tokens, key)
    )
  taken = concatenate(parts)
  own = (lengths[valid] for lengths, valid in zip(taken.lengths, taken.valid))
  engine.count_unique(prompts.lengths, *own)
  return taken


def _groups_at_once(engine: Engine, group: int, what: str) -> int:
  """How many questions grow at once when each takes `group` rows."""
  if group > engine.rows:
    raise ValueError(f"rollout.rows={engine.rows} cannot hold the {group} {what}. Raise "
                     f"rollout.rows to {group}.")  # fmt: skip
  return engine.rows // group


def _respond(
  engine: Engine,
  params: Params,
  prompts: Prompts,
  samples: int,
  key: jax.Array,
  score: Score | None,
) -> Iterator[tuple[np.ndarray, Samples, KVCache]]:
  """Chunks of whole groups: (prompt row i[B], samples, their cache rows on the device)."""
  at_once = _groups_at_once(engine, samples, "samples of a question")
  for first in range(0, len(prompts.lengths), at_once):
    questions = np.arange(first, min(first + at_once, len(prompts.lengths)))
    tokens, lengths = _take(prompts, questions, at_once)
    parent = np.repeat(np.arange(at_once), samples)
    ids = first * samples + np.arange(at_once * samples)
    is_real = parent < len(questions)
    prefix = np.maximum(lengths, 1)[parent]
    drawn, cache, steps = engine.grow(
      params, engine.prefill(params, tokens, lengths), parent, prefix, tokens[parent, prefix - 1],
      np.zeros(len(parent)), key, ids, is_real * engine.response_tokens, engine.response_tokens,
      keep_cache=True,
    )  # fmt: skip
    response = select(engine.fetch(drawn, steps), np.flatnonzero(is_real))
    prompt = questions[parent[is_real]]
    if score is not None:
      response = response.replace(logprobs=score(prompts, prompt, response))
    yield prompt, response, cache


def _unique_prefixes(
  prompt: np.ndarray, tokens: np.ndarray, row: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Indices of the distinct (question, tokens before start) and each boundary's index there.

  Sorted by question first, so the numbering does not depend on how rows are chunked.
  """
  prefix = np.where(before(start, tokens.shape[1]), tokens[row], -1)
  named = np.concatenate([prompt[row, None], prefix], axis=1)
  _, first, inverse = np.unique(named, axis=0, return_index=True, return_inverse=True)
  return first, inverse.reshape(-1)


def _continue(
  engine: Engine,
  params: Params,
  cache: KVCache,
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

  Rows are decoded in order of their start, so that those of one program end together.
  """
  ids = first_id * continuations + np.arange(len(row) * continuations)
  order = np.argsort(np.repeat(start, continuations), kind="stable")
  source = np.repeat(np.arange(len(row)), continuations)[order]
  row, start, ids = row[source], start[source], ids[order]
  prefix = prompts.lengths[prompt[row]] + start
  last_of_prompt = prompts.tokens[prompt[row], prompts.lengths[prompt[row]] - 1]
  token = np.where(start > 0, response.tokens[row, start - 1], last_of_prompt)
  stop_state = prefix_states(engine.sampling.stop_table, response.tokens)[row, start]
  limit = engine.response_tokens - start

  drawn = []
  for begin in range(0, len(row), engine.rows):
    part = slice(begin, begin + engine.rows)
    samples, _, steps = engine.grow(
      params, cache, fill(row[part], engine.rows), fill(prefix[part], engine.rows, 1),
      fill(token[part], engine.rows), fill(stop_state[part], engine.rows), key,
      fill(ids[part], engine.rows), fill(limit[part], engine.rows), engine.response_tokens,
    )  # fmt: skip
    drawn.append((part, samples, steps))

  rewards = np.zeros(len(row), np.float32)
  for part, samples, steps in drawn:
    fetched = select(engine.fetch(samples, steps), slice(len(row[part])))
    whole = join(response.tokens[row[part]], start[part], fetched)
    rewards[part] = engine.grade(prompts, prompt[row[part]], whole)
    engine.count_unique(whole.lengths - start[part])
  total = np.bincount(source, rewards, len(row) // continuations)
  return (total / continuations).astype(np.float32)


def _grow_trees(
  engine: Engine,
  params: Params,
  prompts: Prompts,
  questions: np.ndarray,
  at_once: int,
  branch_factors: tuple[int, ...],
  segment_tokens: int,
  key: jax.Array,
) -> RolloutTree:
  """One chunk of trees, level by level; `at_once` trees is the fixed shape."""
  tokens, lengths = _take(prompts, questions, at_once)
  cache = engine.prefill(params, tokens, lengths)
  prefix = np.maximum(lengths, 1)
  token = tokens[np.arange(at_once), prefix - 1]
  stop_state = np.zeros(at_once, np.int32)
  alive = np.arange(at_once) < len(questions)
  # The whole response down to each node of the level above.
  path = unsampled(at_once, engine.response_tokens)
  levels = []
  for depth, branch in enumerate(branch_factors):
    is_last = depth == len(branch_factors) - 1
    room = engine.response_tokens - depth * segment_tokens
    max_tokens = room if is_last else segment_tokens
    parent = np.repeat(np.arange(len(alive)), branch)
    nodes = len(parent) // at_once
    valid = alive[parent]
    # A node's key is its place in its own tree and the question's place in the iteration.
    ids = questions[0] * nodes + np.arange(len(parent))
    drawn, cache, steps = engine.grow(
      params, cache, parent, prefix[parent], token[parent], stop_state[parent],
      jax.random.fold_in(key, depth), ids, valid * max_tokens, max_tokens, keep_cache=not is_last,
    )  # fmt: skip
    own = select(engine.fetch(drawn, steps), slice(len(parent)))
    path = join(path.tokens[parent], path.lengths[parent], own)
    graded = np.flatnonzero(valid & (own.finished | is_last))
    rewards = np.zeros(len(parent), np.float32)
    prompt = questions[0] + np.arange(len(parent)) // nodes
    rewards[graded] = engine.grade(prompts, prompt[graded], select(path, graded))
    levels.append((own.tokens, own.logprobs, own.lengths, own.finished, valid, rewards))
    prefix = prefix[parent] + own.lengths
    nodes_of_level = np.arange(len(parent))
    token = own.tokens[nodes_of_level, np.maximum(own.lengths, 1) - 1]
    stop_states = prefix_states(engine.sampling.stop_table, own.tokens, stop_state[parent])
    stop_state = stop_states[nodes_of_level, own.lengths]
    alive = valid & ~own.finished

  def by_tree(x: np.ndarray) -> np.ndarray:
    return x.reshape(at_once, -1, *x.shape[1:])[: len(questions)]

  names = ("tokens", "logprobs", "lengths", "finished", "valid", "rewards")
  columns: dict[str, Any] = {
    name: tuple(map(by_tree, column)) for name, column in zip(names, zip(*levels))
  }
  return RolloutTree(**columns, branch_factors=branch_factors)


def _take(prompts: Prompts, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """Prompt tokens and lengths, filled up to `count` rows of length 0."""
  return fill(prompts.tokens[rows], count), fill(prompts.lengths[rows], count)
