"""Results do not depend on the mesh, and parameters really are shared out."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spo_jax import model, sharding
from spo_jax.config import ConfigError, MeshConfig, ModelConfig

pytest_plugins = ["runs"]

TESTS = Path(__file__).parent
MESHES = ((8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2), (2, 1, 4))
VOCABULARY = 264
EMBEDDING = [VOCABULARY, 32]


def name_of(mesh):
  return "x".join(map(str, mesh))


@pytest.fixture(scope="module")
def measured(shared):
  """measured(mesh) -> (arrays that must not depend on it, facts that do), see sharded.py."""
  out = shared / "meshes"
  with (shared / "meshes.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # once for all workers of the test session
    if not out.exists():
      environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu"}
      new = shared / "meshes.new"
      new.mkdir()
      done = subprocess.run(
        [sys.executable, TESTS / "sharded.py", new], env=environment, capture_output=True, text=True
      )
      assert done.returncode == 0, done.stderr[-3000:]
      new.rename(out)

  def read(mesh):
    facts = json.loads((out / f"{name_of(mesh)}.json").read_text())
    with np.load(out / f"{name_of(mesh)}.npz") as arrays:
      return dict(arrays), facts

  return read


@pytest.mark.devices
@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
def test_sharded_equals_unsharded(measured, mesh):
  """Sampled tokens, masks and rewards exactly; losses and gradients to 1e-5."""
  expected, actual = measured((1, 1, 1))[0], measured(mesh)[0]
  assert actual.keys() == expected.keys()
  exact = [name for name, value in expected.items() if value.dtype.kind in "ib"]
  assert {"chain/tokens", "chain/mask", "tree/tokens"} <= set(exact)
  for name, value in expected.items():
    tolerance = 0 if name in exact else 1e-5
    np.testing.assert_allclose(actual[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.devices
@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
def test_parameters_and_optimiser_state_are_shared_out(measured, mesh):
  whole = measured((1, 1, 1))[1]["bytes_per_device"][0]
  facts = measured(mesh)[1]
  shards = mesh[1] * mesh[2]
  for when in ("bytes_per_device", "bytes_after"):
    held = facts[when]
    assert len(set(held)) == 1
    # Norms and the tiny rest stay whole on every device.
    assert whole / shards <= held[0] <= whole / shards + 0.02 * whole


@pytest.mark.devices
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 1, 4)], ids=name_of)
def test_without_fsdp_no_weight_is_gathered(measured, mesh):
  gathered = [shape for kind, shape in measured(mesh)[1]["update"] if kind == "all-gather"]
  assert not [shape for shape in gathered if 32 in shape[-2:] and len(shape) == 2], gathered


@pytest.mark.devices
@pytest.mark.parametrize("mesh", [(1, 4, 2), (2, 2, 2), (2, 1, 4)], ids=name_of)
def test_where_the_vocabulary_is_shared_out_no_embedding_or_head_is_whole(measured, mesh):
  gathered = [shape for kind, shape in measured(mesh)[1]["update"] if kind == "all-gather"]
  assert EMBEDDING not in gathered and EMBEDDING[::-1] not in gathered


@pytest.mark.devices
@pytest.mark.parametrize("mesh", [(1, 4, 2), (2, 2, 2), (2, 1, 4)], ids=name_of)
def test_where_the_vocabulary_is_shared_out_no_logits_travel(measured, mesh):
  """The update adds up maxima and sums over the vocabulary; nothing as wide as it moves."""
  moved = [shape for _, shape in measured(mesh)[1]["update"]]
  assert moved
  assert not [shape for shape in moved if VOCABULARY in shape]


@pytest.mark.parametrize(
  ("sizes", "expected"),
  [((-1, 1, 1), (1, 1, 1)), ((1, 1, 1), (1, 1, 1)), ((1, -1, 1), (1, 1, 1))],
)
def test_an_axis_of_minus_1_takes_the_devices_that_are_left(sizes, expected):
  assert tuple(sharding.make_mesh(MeshConfig(*sizes)).shape.values()) == expected


@pytest.mark.parametrize(
  ("sizes", "said"),
  [
    ((-1, -1, 1), "mesh.data=-1, mesh.fsdp=-1"),
    ((2, 1, 1), "mesh.data=2.*2 devices.*there are 1"),
    ((-1, 3, 1), "mesh.fsdp=3.*share out 1 devices"),
  ],
)
def test_a_mesh_that_the_devices_do_not_make_is_refused(sizes, said):
  with pytest.raises(ConfigError, match=said):
    sharding.make_mesh(MeshConfig(*sizes))


def test_every_parameter_of_every_family_has_its_place():
  """By hand for each kind of parameter; what does not divide is kept whole."""
  config = ModelConfig(
    vocab_size=10, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1,
    qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True, tie_embeddings=False,
  )  # fmt: skip
  shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
  mesh = jax.sharding.AbstractMesh((1, 2, 4), sharding.AXES)
  places = jax.tree.map(lambda place: place.spec, sharding.placements(shapes, mesh))
  attention, mlp = places["layers_0"]["self_attn"], places["layers_0"]["mlp"]
  assert places["embed_tokens"] == P(None, "fsdp")  # 10 words on 4 devices
  assert places["lm_head"] == P("fsdp", None)
  assert attention["q_proj"]["kernel"] == attention["k_proj"]["kernel"] == P("fsdp", "tensor")
  assert attention["o_proj"]["kernel"] == mlp["down_proj"]["kernel"] == P("tensor", "fsdp")
  assert mlp["gate_proj"]["kernel"] == mlp["up_proj"]["kernel"] == P("fsdp", "tensor")
  assert attention["q_proj"]["bias"] == mlp["up_proj"]["bias"] == P("tensor")
  whole = (places["norm"]["weight"], attention["q_norm"]["weight"], attention["o_proj"]["bias"])
  assert all(not any(place) for place in whole)
