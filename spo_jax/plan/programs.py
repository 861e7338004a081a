"""Every program of a run as something that can be lowered without arrays, with what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from spo_jax import model, sampler, sharding
from spo_jax.attention import kernel_for
from spo_jax.config import Config, ModelConfig, OptimizerConfig
from spo_jax.layout import fill
from spo_jax.plan import costs
from spo_jax.structs import KVCache, Sampling, TrainRows
from spo_jax.update import (
  make_optimizer,
  policy_update,
  score_rows,
  state_template,
  supervised_update,
)


@dataclass(frozen=True)
class Program:
  """One compiled program; bytes are those of one chip, and of the whole model."""

  name: str
  lower: Callable[[int], Any]  # number of layers -> jax.stages.Lowered
  cost: costs.Cost  # of one call
  calls: float  # per iteration, at most
  tokens: int  # of one call, on all chips: prefilled, decoded or trained on, at most
  turns: dict[str, int]  # of loops that run until the data says stop, see collectives.py
  setting: str  # the row count that its memory follows
  held: dict[str, int]  # bytes by what they hold, inside the program or beside it
  beside: int  # bytes that stay on the chip and are no argument
  per_layer: float = 0  # bytes of temporaries that one more layer adds at least


@dataclass(frozen=True)
class Shapes:
  """Arguments of the programs as shapes with their placement on a mesh."""

  config: Config
  model_config: ModelConfig
  mesh: Mesh

  def state(self, optimizer: OptimizerConfig) -> tuple[Any, optax.GradientTransformation]:
    made = make_optimizer(optimizer)
    return state_template(self.model_config, made, self.mesh), made

  def params(self) -> Any:
    return self.state(OptimizerConfig())[0].params

  def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    place = sharding.activation(name, shape, self.mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def cache(self, rows: int) -> KVCache:
    c = self.model_config
    shape = (rows, c.num_kv_heads, self.config.row_tokens, model.head_width(c))
    layer = self.array("cache", shape, c.compute_dtype)
    return KVCache(
      keys=(layer,) * c.num_layers, values=(layer,) * c.num_layers, length=_host((rows,))
    )


def _host(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
  """An array that comes from the host: where it goes is left to the compiler."""
  return jax.ShapeDtypeStruct(shape, dtype)


def _lower(program: Any, *inputs: Any, **options: Any) -> Any:
  return program.lower(*inputs, **options)


def chip_bytes(tree: Any) -> int:
  """Bytes of one chip's part of arrays with a placement."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    size = jnp.dtype(leaf.dtype).itemsize
    for length in shape:
      size *= length
    total += size
  return total


class Programs:
  """The programs of a run on its meshes; `listed` has them in the order in which they run.

  Args:
    rollout_mesh: where rollouts run, over the same devices; parameters lie there once more
      where it is another mesh.
  """

  def __init__(
    self, config: Config, model_config: ModelConfig, mesh: Mesh, rollout_mesh: Mesh | None = None
  ):
    self.config, self.model_config = config, model_config
    self.mesh, self.rollout_mesh = mesh, rollout_mesh or mesh
    state, _ = self._shapes(model_config.num_layers, mesh).state(config.optimizer)
    parameters = chip_bytes(state.params)
    self.held = {
      "parameters": parameters,
      "optimiser": chip_bytes(state.opt_state),
      "reference": parameters if config.train.kl.coefficient else 0,
    }
    self.copied = 0  # bytes of parameters for rollouts, where those have a mesh of their own
    if self.rollout_mesh != mesh:
      own = self._shapes(model_config.num_layers, self.rollout_mesh).params()
      self.copied = chip_bytes(own)
    self.count = model.count_params(model_config)

  def listed(self) -> list[Program]:
    found = [*self._rollouts(), *self._rescoring(), self._update(), *self._evaluation()]
    if self.config.sft.max_steps:
      found = [self._warm_start(), *found]
    return found

  def _shapes(self, layers: int, mesh: Mesh) -> Shapes:
    small = dataclasses.replace(self.model_config, num_layers=layers)
    return Shapes(self.config, small, mesh)

  def _split(self, mesh: Mesh) -> costs.Split:
    c = self.model_config
    with jax.set_mesh(mesh):
      kernel = kernel_for(c.attention, c.compute_dtype, model.head_width(c))
    return costs.Split(
      rows=sharding.row_shards(mesh), parameters=mesh.shape["fsdp"] * mesh.shape["tensor"],
      tensor=mesh.shape["tensor"], fused=kernel != "xla",
    )  # fmt: skip

  def _filled(self, rows: int) -> int:
    """Rows of a rollout, with the fillers that make equal shares."""
    shards = sharding.row_shards(self.rollout_mesh)
    return -(-rows // shards) * shards

  def _cache_bytes(self, rows: int) -> int:
    return chip_bytes(self._shapes(self.model_config.num_layers, self.rollout_mesh).cache(rows))

  def _sampling(self, evaluating: bool = False) -> Sampling:
    rollout, held_out = self.config.rollout, self.config.eval
    table = None
    if rollout.stop:
      # One state per byte that may have been seen of a stop string, and the first and the last.
      states = 1 + sum(len(stop.encode()) for stop in rollout.stop)
      table = _host((self.model_config.vocab_size, states), jnp.int16)
    top_k = 0 if evaluating else rollout.top_k
    top_p = held_out.top_p if evaluating else rollout.top_p
    return Sampling(
      temperature=held_out.temperature if evaluating else rollout.temperature,
      top_p=top_p, end_ids=(0,), pad_id=0, top_k=top_k, truncate=top_p < 1 or top_k > 0,
      stop_table=table,
    )  # fmt: skip

  def _prefill(self, name: str, prompts: int, calls: float) -> Program:
    mesh, width = self.rollout_mesh, self.config.rollout.max_prompt_tokens
    prompts = self._filled(prompts)

    def lower(layers: int) -> Any:
      shapes = self._shapes(layers, mesh)
      with jax.set_mesh(mesh):
        return _lower(
          sampler.prefill,
          shapes.model_config, shapes.params(), _host((prompts, width)), _host((prompts,)),
          slots=self.config.row_tokens,
        )  # fmt: skip

    return Program(
      name, lower, costs.prefill(self.model_config, prompts, width, self._split(mesh)), calls,
      prompts * width, {}, "rollout.rows",
      *self._sampled(self._cache_bytes(prompts)),
    )  # fmt: skip

  def _grow(
    self, name: str, parents: int, each: int, tokens: int, keep: bool, calls: float,
    evaluating: bool = False, rows: int = 0,
  ) -> Program:  # fmt: skip
    """`each` rows of every parent, or `rows` of any."""
    mesh, key = self.rollout_mesh, jax.eval_shape(lambda: jax.random.key(0))
    children = self._filled(rows or parents * each)
    turns = {r"grow\)/while$": tokens, "shard_map": self._passes(parents, each, rows)}
    parents = self._filled(parents)

    def lower(layers: int) -> Any:
      shapes, own = self._shapes(layers, mesh), _host((children,))
      with jax.set_mesh(mesh):
        return _lower(
          sampler.grow,
          shapes.model_config, shapes.params(), shapes.cache(parents), own, own, own, own, key,
          own, own, self._sampling(evaluating), max_tokens=tokens, keep_cache=keep,
        )  # fmt: skip

    cost = costs.decode(
      self.model_config, children, self.config.row_tokens, tokens, self._split(mesh)
    )
    return Program(
      name, lower, cost, calls, children * tokens, turns, "rollout.rows",
      *self._sampled(self._cache_bytes(parents) + self._cache_bytes(children)),
    )  # fmt: skip

  def _passes(self, parents: int, each: int, rows: int) -> int:
    """How often caches are passed on in a fork: never, if children stay with their parents."""
    shards = sharding.row_shards(self.rollout_mesh)
    parent = fill(np.repeat(np.arange(parents), each), self._filled(parents * each))
    owner = parent // (self._filled(parents) // shards)
    here = np.arange(len(parent)) // (len(parent) // shards)
    return shards - 1 if rows or (owner != here).any() else 0

  def _sampled(self, kv_cache: int) -> tuple[dict[str, int], int]:
    """What the chip holds while tokens are sampled, and what of it waits: moments, reference,
    and the parameters of training where rollouts have their own."""
    held = {**self.held, "parameters": self.held["parameters"] + self.copied}
    waiting = self.held["optimiser"] + self.held["reference"]
    return {**held, "kv_cache": kv_cache}, waiting + bool(self.copied) * self.held["parameters"]

  def _rollouts(self) -> list[Program]:
    rollout, spo = self.config.rollout, self.config.spo
    if self.config.algorithm == "tree":
      at_once = rollout.rows // self.config.leaves
      calls = -(-rollout.questions // at_once)
      found, parents = [self._prefill("prefill", at_once, calls)], at_once
      for depth, branch in enumerate(spo.branch_factors):
        is_last = depth == len(spo.branch_factors) - 1
        room = rollout.max_response_tokens - depth * spo.segment_tokens
        tokens = room if is_last else spo.segment_tokens
        found.append(
          self._grow(f"grow level {depth + 1}", parents, branch, tokens, not is_last, calls)
        )
        parents *= branch
      return found
    at_once = rollout.rows // rollout.samples
    calls = -(-rollout.questions // at_once)
    rows = at_once * rollout.samples
    found = [
      self._prefill("prefill", at_once, calls),
      self._grow("grow", at_once, rollout.samples, rollout.max_response_tokens, True, calls),
    ]
    if self.config.algorithm == "chain":
      boundaries = -(-rollout.max_response_tokens // spo.interval) * rows
      more = calls * -(-boundaries * spo.continuations // rollout.rows)
      found.append(
        self._grow(
          "continue", rows, 1, rollout.max_response_tokens, False, more, rows=rollout.rows
        )
      )
    return found

  def _rescoring(self) -> list[Program]:
    config, rollout = self.config, self.config.rollout
    if not rollout.recompute_logprobs:
      return []
    length = config.row_tokens
    rows = rollout.questions * rollout.samples
    waiting = self._cache_bytes(rollout.rows // rollout.samples * rollout.samples)
    if config.algorithm == "tree":
      nodes, level = 0, 1
      for branch in config.spo.branch_factors:
        level *= branch
        nodes += level
      rows, waiting = rollout.questions * nodes, 0

    def lower(layers: int) -> Any:
      shapes, shape = self._shapes(layers, self.mesh), (rollout.rows, length)
      with jax.set_mesh(self.mesh):
        return _lower(
          score_rows,
          shapes.model_config, shapes.params(), _host(shape), _host(shape, bool),
          _host(shape, bool), rollout.temperature,
        )  # fmt: skip

    held, beside = self._sampled(waiting)
    cost = costs.score(self.model_config, rollout.rows, length, self._split(self.mesh))
    return [
      Program(
        "score", lower, cost, -(-rows // rollout.rows), rollout.rows * length, {},
        "rollout.rows", held, beside + waiting,
      )
    ]  # fmt: skip

  def _update(self) -> Program:
    config, train = self.config, self.config.train
    length, micro = config.row_tokens, train.micro_batch_rows
    micro_batches = train.batch_rows // micro
    reference = bool(train.kl.coefficient)

    def lower(layers: int) -> Any:
      shapes = self._shapes(layers, self.mesh)
      state, optimizer = shapes.state(config.optimizer)

      def rows(dtype: Any) -> Any:
        return shapes.array("micro_batches", (micro_batches, micro, length), dtype)

      batch = TrainRows(
        rows(jnp.int32), rows(bool), rows(bool), rows(jnp.float32), rows(jnp.float32)
      )
      with jax.set_mesh(self.mesh):
        return _lower(
          policy_update,
          shapes.model_config, train, optimizer, state, state.params if reference else None, batch,
          shapes.array("scalar", (), jnp.int32), shapes.array("scalar", (), jnp.float32),
        )  # fmt: skip

    rows = config.rollout.questions * config.rollout.samples
    if config.algorithm == "tree":
      rows = config.spo.edges_per_iteration
    cost = costs.update(
      self.model_config, self.count, micro_batches, micro, length, reference, train.remat,
      self._split(self.mesh),
    )  # fmt: skip
    return Program(
      "update", lower, cost, train.epochs * -(-rows // train.batch_rows),
      train.batch_rows * length, {r"update\)/while$": micro_batches}, "train.micro_batch_rows",
      {**self.held, "kv_cache": 0}, 0, self._kept(micro),
    )  # fmt: skip

  def _kept(self, rows: int) -> float:
    return costs.kept_per_layer(
      self.model_config, rows, self.config.row_tokens, self.config.train.remat,
      self._split(self.mesh),
    )  # fmt: skip

  def _evaluation(self) -> list[Program]:
    config = self.config
    rows = config.rollout.rows
    calls = -(-config.eval.problems // rows) / config.eval.every
    return [
      self._prefill("evaluate: prefill", rows, calls),
      self._grow(
        "evaluate: grow", rows, 1, config.rollout.max_response_tokens, True, calls, True
      ),
    ]

  def _warm_start(self) -> Program:
    """Calls are 0: it is over before the first iteration."""
    config, sft = self.config, self.config.sft
    length, micro = config.row_tokens, sft.micro_batch_rows or sft.batch_rows

    def lower(layers: int) -> Any:
      shapes = self._shapes(layers, self.mesh)
      state, optimizer = shapes.state(sft.optimizer)
      shape = (sft.batch_rows, length)
      with jax.set_mesh(self.mesh):
        return _lower(
          supervised_update,
          shapes.model_config, optimizer, state, _host(shape), _host(shape, bool),
          _host(shape, bool), _host((), jnp.float32), micro_rows=micro, remat=config.train.remat,
        )  # fmt: skip

    micro_batches = sft.batch_rows // micro
    cost = costs.update(
      self.model_config, self.count, micro_batches, micro, length, False, config.train.remat,
      self._split(self.mesh),
    )  # fmt: skip
    return Program(
      "supervised update", lower, cost, 0, sft.batch_rows * length,
      {r"update\)/while$": micro_batches}, "sft.micro_batch_rows",
      {**self.held, "reference": 0, "kv_cache": 0}, 0, self._kept(micro),
    )  # fmt: skip
