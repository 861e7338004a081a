"""One iteration of each kind on several meshes of 8 virtual devices; run by test_sharding.py.

    python tests/sharded.py OUT

writes OUT/<mesh>.npz with everything that must not depend on the mesh, and OUT/<mesh>.json with
what does: bytes per device and the collectives of the compiled programs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import numpy as np
import optax

from spo_jax import algorithms, sharding
from spo_jax.config import load
from spo_jax.experiment import build
from spo_jax.packing import EdgeBuffer, optimiser_batches
from spo_jax.update import init_state, policy_update, supervised_update

MESHES = ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2), (2, 1, 4), (4, 2, 1))
SETTINGS = [
  "model.hidden_size=32", "model.intermediate_size=64", "model.num_layers=1", "model.num_heads=4",
  "model.num_kv_heads=4", "model.tie_embeddings=false", "model.qkv_bias=true", "task.operations=2",
  "task.unfinished_penalty=1", "spo.threshold=0.9", "spo.interval=2", "spo.continuations=2",
  "spo.branch_factors=[2,2]", "spo.segment_tokens=4", "spo.edges_per_iteration=16",
  "rollout.questions=8", "rollout.samples=2", "rollout.rows=16", "rollout.max_prompt_tokens=7",
  "rollout.max_response_tokens=20", "rollout.temperature=1", "train.batch_rows=16",
  "train.micro_batch_rows=8", "train.kl.coefficient=0.1",
]  # fmt: skip
# Leaves the gradient behind as its state, for everybody to see.
KEEP_GRADIENT = optax.GradientTransformation(
  lambda params: jax.tree.map(jax.numpy.zeros_like, params),
  lambda gradient, _, params: (jax.tree.map(jax.numpy.negative, gradient), gradient),
)


def run(mesh: tuple[int, int, int], out: Path) -> None:
  axes = [f"mesh.{axis}={size}" for axis, size in zip(sharding.AXES, mesh)]
  kept: dict[str, np.ndarray] = {}
  facts: dict[str, object] = {}

  def keep(name, tree):
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
      kept[f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}"] = np.asarray(leaf)

  for algorithm in ("chain", "tree"):
    experiment = build(load(None, [f"algorithm={algorithm}", *SETTINGS, *axes]))
    config = experiment.config
    with jax.set_mesh(experiment.mesh):
      state = init_state(experiment.init_params(), KEEP_GRADIENT)
      reference = jax.tree.map(lambda x: x * 0.9, state.params)
      buffer = EdgeBuffer(config.spo.edges_per_question, config.spo.max_edge_age)
      rows, _ = algorithms.collect(
        experiment, state.params, experiment.questions(0, 8), 1, buffer
      )
      keep(f"{algorithm}/rows", rows)
      bytes_of = [
        {shard.device.id: shard.data.nbytes for shard in leaf.addressable_shards}
        for leaf in jax.tree.leaves((state.params, state.opt_state))
      ]
      facts["bytes_per_device"] = [
        sum(held.get(device.id, 0) for held in bytes_of) for device in jax.devices()
      ]
      rng = np.random.default_rng(0)
      batch, used = next(iter(optimiser_batches(rows, 16, 8, 1, rng)))
      arguments = (
        experiment.model_config, config.train, KEEP_GRADIENT, state, reference, batch,
        np.int32(used), np.float32(1),
      )  # fmt: skip
      compiled = policy_update.lower(*arguments).compile()
      facts["update"] = collectives(compiled.as_text())
      state, metrics = policy_update(*arguments)
      keep(f"{algorithm}/metrics", metrics)
      keep(f"{algorithm}/gradient", state.opt_state)
  with jax.set_mesh(experiment.mesh):
    state = init_state(experiment.init_params(), KEEP_GRADIENT)
    demonstrations = experiment.demonstrations(0, 8)
    state, loss = supervised_update(
      experiment.model_config, KEEP_GRADIENT, state, *demonstrations, micro_rows=8
    )
    keep("supervised", (loss, state.opt_state))
    figures, _ = experiment.test_accuracies(state.params, 16)
    keep("evaluation", figures)
  name = "x".join(map(str, mesh))
  np.savez(out / f"{name}.npz", **kept)
  (out / f"{name}.json").write_text(json.dumps(facts))


def collectives(text: str) -> list[tuple[str, list[int]]]:
  """Every collective of a compiled program: its kind and the shape that it makes."""
  kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
  found = re.findall(rf"= \w+\[([\d,]*)\][^ ]* ({kinds})\(", text)
  return [(kind, [int(n) for n in shape.split(",") if n]) for shape, kind in found]


if __name__ == "__main__":
  for mesh in MESHES:
    run(mesh, Path(sys.argv[1]))
