"""Every program of a run as something that can be lowered without arrays, with what it costs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spo_jax import model, sampler, sharding
from spo_jax.attention import kernel_for, trie_keys
from spo_jax.config import Config, ModelConfig, OptimizerConfig
from spo_jax.packing import micro_batch_size
from spo_jax.packs import most_packs
from spo_jax.plan import costs
from spo_jax.queues import QUEUE, filled, kept_at_once
from spo_jax.structs import KVStore, Requests, Sampling, TrainRows, Trie
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

  def rounded(self) -> Any:
    """Parameters as rollouts take them."""
    params = self.params()
    types = jax.eval_shape(functools.partial(model.rounded, self.model_config), params)
    return jax.tree.map(lambda x, of: x.update(dtype=of.dtype), params, types)

  def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    place = sharding.activation(name, shape, self.mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def store(self, rows: int, width: int) -> KVStore:
    with jax.set_mesh(self.mesh):
      shapes = jax.eval_shape(lambda: sampler.empty_store(self.model_config, rows, width))
    return jax.tree.map(lambda x: self.array("cache", x.shape, x.dtype), shapes)


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
      where it is another mesh, or they are rounded.
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
    self.copied = 0  # bytes of parameters for rollouts, where those are rounded or elsewhere
    if self.rollout_mesh != mesh or model_config.compute_dtype != "float32":
      own = self._shapes(model_config.num_layers, self.rollout_mesh).rounded()
      self.copied = chip_bytes(own)
    self.count = model.count_params(model_config)

  def listed(self) -> list[Program]:
    train, sft, held_out = self.config.train, self.config.sft, self.config.eval
    found = []
    if sft.max_steps:  # calls are 0: it is over before the first iteration, and has no reference
      checks = self._answers("check", "sft.check_problems", sft.check_problems, 0)
      found += [self._warm_start(), *(
        dataclasses.replace(
          p, held=p.held | {"reference": 0}, beside=p.beside - p.held["reference"]
        ) for p in checks
      )]  # fmt: skip
    if train.iterations:
      found += [*self._rollouts(), *self._rescoring(), self._update()]
    # Every so often, the first and the last iteration included.
    times = (1 + -(-train.iterations // held_out.every)) / max(train.iterations, 1)
    # Greedily and, at another temperature than 0, once more.
    of_test = times * (1 + (held_out.temperature > 0))
    found += self._answers("evaluate", "eval.problems", held_out.problems, of_test)
    validated = held_out.validation_problems  # they choose the best policy
    return found + self._answers("validate", "eval.validation_problems", validated, times)

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

  def _filled(self, questions: int, each: int) -> int:
    shards = sharding.row_shards(self.rollout_mesh)
    return filled(questions, each, self.config.rollout.rows, shards)

  def _kept_at_once(self) -> int:
    rollout = self.config.rollout
    return kept_at_once(rollout.questions, rollout.samples, rollout.rows)

  def _store_bytes(self, rows: int, width: int) -> int:
    shapes = self._shapes(self.model_config.num_layers, self.rollout_mesh)
    return chip_bytes(shapes.store(rows, width))

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

  def _prefill(
    self, name: str, prompts: int, calls: float, setting: str = "rollout.rows"
  ) -> Program:
    mesh, width = self.rollout_mesh, self.config.rollout.max_prompt_tokens

    def lower(layers: int) -> Any:
      shapes = self._shapes(layers, mesh)
      with jax.set_mesh(mesh):
        return _lower(
          sampler.prefill,
          shapes.model_config, shapes.rounded(), _host((prompts, width)), _host((prompts,)),
        )  # fmt: skip

    return Program(
      name, lower, costs.prefill(self.model_config, prompts, width, self._split(mesh)), calls,
      prompts * width, {}, setting,
      *self._sampled(self._store_bytes(prompts, width)),
    )  # fmt: skip

  def _grow(
    self, name: str, pieces: list[tuple[int, int]], rows: int, room: int, tokens: int, keep: bool,
    calls: float, setting: str = "rollout.rows", evaluating: bool = False,
  ) -> Program:  # fmt: skip
    """`rows` of at most `tokens` more, behind `pieces` of prompts and responses: (rows, width)."""
    mesh, key = self.rollout_mesh, jax.eval_shape(lambda: jax.random.key(0))
    slots = min(self.config.rollout.rows, rows)
    width = pieces[0][1] + room
    steps = -(-rows // slots) * tokens

    def lower(layers: int) -> Any:
      shapes, one, each = self._shapes(layers, mesh), _host((rows,)), _host((rows, len(pieces)))
      stores = tuple(shapes.store(*piece) for piece in pieces)
      with jax.set_mesh(mesh):
        return _lower(
          sampler.grow,
          shapes.model_config, shapes.rounded(), stores,
          Requests(each, each, one, one, one, one, one), key, self._sampling(evaluating),
          slots=slots, width=width, max_tokens=tokens, keep=keep,
        )  # fmt: skip

    cost = costs.decode(self.model_config, slots, width, steps, self._split(mesh))
    held = [*pieces, (slots, width), *[(rows, tokens)] * keep]
    return Program(
      name, lower, cost, calls, rows * tokens, {r"grow\)/while$": steps}, setting,
      *self._sampled(sum(self._store_bytes(*store) for store in held)),
    )  # fmt: skip

  def _sampled(self, kv_cache: int) -> tuple[dict[str, int], int]:
    """What the chip holds while tokens are sampled, and what of it waits: moments, reference,
    and the parameters of training where rollouts have a copy."""
    held = {**self.held, "parameters": self.held["parameters"] + self.copied}
    waiting = self.held["optimiser"] + self.held["reference"]
    return {**held, "kv_cache": kv_cache}, waiting + bool(self.copied) * self.held["parameters"]

  def _rollouts(self) -> list[Program]:
    rollout, spo = self.config.rollout, self.config.spo
    room = rollout.max_response_tokens
    if self.config.algorithm == "tree":
      rows = self._filled(rollout.questions, self.config.leaves)
      found, pieces = [self._prefill("prefill", rows, 1)], [(rows, rollout.max_prompt_tokens)]
      for depth, branch in enumerate(spo.branch_factors):
        is_last = depth == len(spo.branch_factors) - 1
        begun, rows = depth * spo.segment_tokens, rows * branch
        tokens = room - begun if is_last else spo.segment_tokens
        name = f"grow level {depth + 1}"
        found.append(self._grow(name, pieces, rows, begun + tokens, tokens, not is_last, 1))
        pieces = [*pieces, (rows, tokens)]
      return found
    is_chain = self.config.algorithm == "chain"
    at_once = self._kept_at_once() if is_chain else rollout.questions
    prompts, calls = self._filled(at_once, rollout.samples), -(-rollout.questions // at_once)
    rows = prompts * rollout.samples
    stores = [(prompts, rollout.max_prompt_tokens), (rows, room)]
    found = [
      self._prefill("prefill", prompts, calls),
      self._grow("grow", stores[:1], rows, room, room, is_chain, calls),
    ]
    if is_chain:
      waiting = QUEUE * rollout.rows
      most = at_once * rollout.samples * -(-room // spo.interval) * spo.continuations
      calls *= -(-most // waiting)
      found.append(self._grow("continue", stores, waiting, room, room, False, calls))
    return found

  def _rescoring(self) -> list[Program]:
    config, rollout = self.config, self.config.rollout
    if not rollout.recompute_logprobs:
      return []
    length = config.row_tokens
    rows = rollout.questions * rollout.samples
    waiting = 0
    if config.algorithm == "tree":
      nodes, level = 0, 1
      for branch in config.spo.branch_factors:
        level *= branch
        nodes += level
      rows = rollout.questions * nodes
    elif config.algorithm == "chain":  # continued from afterwards
      prompts = self._filled(self._kept_at_once(), rollout.samples)
      waiting = self._store_bytes(prompts, rollout.max_prompt_tokens)
      waiting += self._store_bytes(prompts * rollout.samples, rollout.max_response_tokens)

    def lower(layers: int) -> Any:
      shapes, shape = self._shapes(layers, self.mesh), (rollout.rows, length)
      with jax.set_mesh(self.mesh):
        return _lower(
          score_rows,
          shapes.model_config, shapes.params(), _host(shape), _host(shape, bool),
          _host(shape, bool), rollout.temperature,
        )  # fmt: skip

    # Rollouts still hold their copy of the parameters, but those of trees, which are over.
    copied = 0 if config.algorithm == "tree" else self.copied
    held = {**self.held, "parameters": self.held["parameters"] + copied, "kv_cache": waiting}
    beside = self.held["optimiser"] + self.held["reference"] + copied + waiting
    cost = costs.score(self.model_config, rollout.rows, length, self._split(self.mesh))
    return [
      Program(
        "score", lower, cost, -(-rows // rollout.rows), rollout.rows * length, {},
        "rollout.rows", held, beside,
      )
    ]  # fmt: skip

  def _update(self) -> Program:
    config, train = self.config, self.config.train
    length = train.pack_tokens or config.row_tokens
    keys = trie_keys(length, config.row_tokens) if train.pack_tokens else 0
    micro = micro_batch_size(train, config.row_tokens, sharding.row_shards(self.mesh))
    most = most_packs(train.batch_rows, config.row_tokens, train.pack_tokens)
    micro_batches = -(-most // micro)
    reference = bool(train.kl.coefficient)

    def lower(layers: int) -> Any:
      shapes = self._shapes(layers, self.mesh)
      state, optimizer = shapes.state(config.optimizer)

      def rows(dtype: Any, *columns: int) -> Any:
        return shapes.array("micro_batches", (micro_batches, micro, *columns), dtype)

      slots, numbers = rows(jnp.int32, length), rows(jnp.float32, length)
      trie = Trie(slots, slots, slots, rows(jnp.int32), config.row_tokens)
      is_any = rows(bool, length)
      batch = TrainRows(slots, is_any, is_any, numbers, numbers, trie if keys else None)
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
      self._split(self.mesh), keys,
    )  # fmt: skip
    return Program(
      "update", lower, cost, train.epochs * -(-rows // train.batch_rows),
      most * length, {r"update\)/while$": micro_batches}, "train.micro_batch_rows",
      {**self.held, "kv_cache": 0}, 0, self._kept(micro, length, keys),
    )  # fmt: skip

  def _kept(self, rows: int, length: int, keys: int = 0) -> float:
    return costs.kept_per_layer(
      self.model_config, rows, length, self.config.train.remat, self._split(self.mesh), keys
    )

  def _answers(self, name: str, setting: str, asked: int, calls: float) -> list[Program]:
    """One answer to each of `asked` held-out questions, which are encoded in one call."""
    if not asked:
      return []
    rollout = self.config.rollout
    prompts, room = self._filled(asked, 1), rollout.max_response_tokens
    pieces = [(prompts, rollout.max_prompt_tokens)]
    if asked <= rollout.rows:  # they are filled up to as many
      setting = "rollout.rows"
    slots = min(rollout.rows, prompts) * self.config.row_tokens
    most = setting if prompts * rollout.max_prompt_tokens > slots else "rollout.rows"
    return [
      self._prefill(f"{name}: prefill", prompts, calls, setting),
      self._grow(f"{name}: grow", pieces, prompts, room, room, False, calls, most, True),
    ]

  def _warm_start(self) -> Program:
    config, sft = self.config, self.config.sft
    length, micro = config.row_tokens, sft.micro_batch_rows or sft.batch_rows
    micro_batches = sft.batch_rows // micro

    def lower(layers: int) -> Any:
      shapes = self._shapes(layers, self.mesh)
      state, optimizer = shapes.state(sft.optimizer)
      tokens, is_token, mask = (
        shapes.array("micro_batches", (micro_batches, micro, length), dtype)
        for dtype in (jnp.int32, bool, bool)
      )
      with jax.set_mesh(self.mesh):
        return _lower(
          supervised_update, shapes.model_config, optimizer, state, tokens, is_token, mask,
          micro_rows=micro, remat=config.train.remat,
        )  # fmt: skip

    cost = costs.update(
      self.model_config, self.count, micro_batches, micro, length, False, config.train.remat,
      self._split(self.mesh),
    )  # fmt: skip
    return Program(
      "supervised update", lower, cost, 0, sft.batch_rows * length,
      {r"update\)/while$": micro_batches}, "sft.micro_batch_rows",
      {**self.held, "reference": 0, "kv_cache": 0}, 0, self._kept(micro, length),
    )  # fmt: skip
