"""Rollouts of both kinds and an update on meshes of 8 virtual devices; run by test_sharding.py.

    python tests/sharded.py OUT

writes OUT/<mesh>.npz with everything that must not depend on the mesh, and OUT/<mesh>.json with
what does: bytes per device and the collectives of the compiled programs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import jax.numpy as jnp
import numpy as np
from programs import KEEP_GRADIENT, collectives

from spo_jax import algorithms, head, sampler, sharding
from spo_jax.config import load
from spo_jax.experiment import build
from spo_jax.packing import EdgeBuffer, optimiser_batches
from spo_jax.structs import Requests
from spo_jax.update import init_state, make_optimizer, policy_update

MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2), (2, 1, 4))
TIED = ((1, 1, 1), (1, 4, 2))  # with a head that is the embedding
RESHARDED = (1, 8, 1), (4, 1, 2)  # meshes of training and of rollouts
SETTINGS = [
  "model.hidden_size=32", "model.intermediate_size=64", "model.num_layers=1", "model.num_heads=4",
  "model.num_kv_heads=4", "model.head_dim=24", "model.qkv_bias=true",
  "model.tokenizer_tokens=264", "task.name=countdown", "task.prompt=plain",
  "task.unfinished_penalty=1", "spo.threshold=0.9", "spo.interval=8", "spo.continuations=2",
  "spo.branch_factors=[2,2]", "spo.segment_tokens=4", "spo.edges_per_iteration=16",
  "rollout.questions=8", "rollout.samples=2", "rollout.rows=16", "rollout.max_prompt_tokens=40",
  "rollout.max_response_tokens=56", "rollout.temperature=1", "train.batch_rows=16",
  "train.micro_batch_rows=8", "train.kl.coefficient=0.1", "checkpoint.export=false",
]  # fmt: skip
head.SMALL_VOCABULARY = 0  # packed as a large one


def run(
  mesh: tuple[int, int, int],
  out: Path,
  rollout_mesh: tuple[int, int, int] = (0, 0, 0),
  tied: bool = False,
) -> None:
  axes = [f"mesh.{axis}={size}" for axis, size in zip(sharding.AXES, mesh)]
  axes += [f"rollout.mesh.{axis}={size}" for axis, size in zip(sharding.AXES, rollout_mesh)]
  kept: dict[str, np.ndarray] = {}

  def keep(name, tree):
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
      kept[f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"] = np.asarray(leaf)

  experiment = build(load(None, [*SETTINGS, *axes, f"model.tie_embeddings={tied}".lower()]))
  config, places = experiment.config, experiment.mesh
  with jax.set_mesh(places):
    params = experiment.init_params()
    state = init_state(params, KEEP_GRADIENT)
    facts: dict[str, object] = {"bytes_per_device": bytes_per_device(state)}
    trained = init_state(params, make_optimizer(config.optimizer))
    trained = jax.device_put(trained, sharding.placements(trained, places))  # as a run does
    facts["optimizer_bytes_per_device"] = bytes_per_device(trained.opt_state)
    reference = jax.tree.map(lambda x: x * 0.9, params)
    with jax.transfer_guard("disallow_explicit"):
      placed = experiment.engine.place(params)
    assert experiment.engine.place(placed) is placed
    facts["rollout_bytes_per_device"] = bytes_per_device(placed)
    facts |= rollout_collectives(experiment, placed)
    for algorithm in ("tree", "chain"):
      of_kind = dataclasses.replace(
        experiment, config=dataclasses.replace(config, algorithm=algorithm)
      )
      buffer = EdgeBuffer(config.spo.edges_per_question, config.spo.max_edge_age)
      rows, _ = algorithms.collect(of_kind, params, experiment.questions(0, 8), 1, buffer)
      keep(algorithm, rows)
    facts["reshard_seconds"] = experiment.engine.take_counts()[1]["reshard"]

    rows = rows.replace(logprobs=of_an_older_policy(rows.logprobs))
    for name, pack_tokens in (("packed", 200), ("update", 0)):
      batch, used = next(
        iter(optimiser_batches(rows, 16, 8, 1, np.random.default_rng(0), pack_tokens))
      )
      arguments = (
        jax.tree.map(jnp.copy, state), reference, sharding.place(batch, "micro_batches", places),
        sharding.place(np.int32(used), "scalar", places),
        sharding.place(np.float32(1), "scalar", places),
      )  # fmt: skip
      update = policy_update.lower(
        experiment.model_config, config.train, KEEP_GRADIENT, *arguments
      ).compile()
      facts[name] = list(collectives(update.as_text()))
      new_state, metrics = update(*arguments)
      keep(name, (metrics, new_state.opt_state))
    facts["bytes_after"] = bytes_per_device(new_state)
  name = "x".join(map(str, mesh)) + "-resharded" * any(rollout_mesh) + "-tied" * tied
  np.savez(out / f"{name}.npz", **kept)
  (out / f"{name}.json").write_text(json.dumps(facts))


def of_an_older_policy(logprobs: np.ndarray) -> np.ndarray:
  """Each moved by at most 0.4 nats, always alike: ratios are not 1, and some are clipped."""
  return logprobs + 0.4 * np.sin(np.arange(logprobs.size, dtype=np.float32)).reshape(logprobs.shape)


def rollout_collectives(experiment, params) -> dict[str, object]:
  """Of the programs behind rollouts, by their name."""
  engine, prompts, each = experiment.engine, experiment.questions(0, 8), np.ones(32, np.int32)
  store = engine.prefill(params, prompts.tokens, prompts.lengths)
  requests = Requests(each[:, None], each[:, None], each, each, each, each, each)
  with jax.set_mesh(engine.mesh):
    prefill = sampler.prefill.lower(engine.config, params, prompts.tokens, prompts.lengths)
    grow = sampler.grow.lower(
      engine.config, params, (store,), requests, experiment.key(0), engine.sampling,
      slots=16, width=44, max_tokens=4, keep=True,
    )  # fmt: skip
    programs = {"prefill": prefill.compile(), "grow": grow.compile()}
  return {name: list(collectives(program.as_text())) for name, program in programs.items()}


def bytes_per_device(tree) -> list[int]:
  held = dict.fromkeys(jax.devices(), 0)
  for leaf in jax.tree.leaves(tree):
    for shard in leaf.addressable_shards:
      held[shard.device] += shard.data.nbytes
  return list(held.values())


if __name__ == "__main__":
  for mesh in MESHES:
    run(mesh, Path(sys.argv[1]))
  for mesh in TIED:
    run(mesh, Path(sys.argv[1]), tied=True)
  print("resharded", file=sys.stderr, flush=True)
  run(RESHARDED[0], Path(sys.argv[1]), RESHARDED[1])
