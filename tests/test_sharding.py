"""Results do not depend on the mesh, and parameters really are shared out."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from spo_jax import model, sharding
from spo_jax.config import ConfigError, MeshConfig, ModelConfig, RolloutMeshConfig

pytest_plugins = ["runs"]

TESTS = Path(__file__).parent
MESHES = ((8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2), (2, 1, 4))
RESHARDED = "1x8x1-resharded"  # trained on this mesh, sampled on 4x1x2
TIED = "1x4x2-tied"  # with a head that is the embedding
VOCABULARY = 264
EMBEDDING = [VOCABULARY, 32]
PROGRAMS = ("update", "packed", "prefill", "grow")


def name_of(mesh):
  return mesh if isinstance(mesh, str) else "x".join(map(str, mesh))


@pytest.fixture(scope="module")
def measured(shared):
  """measured(mesh) -> (arrays that must not depend on it, facts that do), see sharded.py."""
  out = shared / "meshes"
  with (shared / "meshes.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)  # once for all workers of the test session
    if not out.exists():
      environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu"}
      new = shared / "meshes.new"
      shutil.rmtree(new, ignore_errors=True)  # of a test that was out of time
      new.mkdir()
      done = subprocess.run(
        [sys.executable, TESTS / "sharded.py", new], env=environment, capture_output=True, text=True
      )
      assert done.returncode == 0, done.stderr[-3000:]
      (new / "stderr").write_text(done.stderr)
      new.rename(out)

  def read(mesh):
    facts = json.loads((out / f"{name_of(mesh)}.json").read_text())
    with np.load(out / f"{name_of(mesh)}.npz") as arrays:
      return dict(arrays), facts

  read.stderr = (out / "stderr").read_text
  return read


@pytest.mark.devices
@pytest.mark.parametrize("mesh", [*MESHES, RESHARDED, TIED], ids=name_of)
def test_sharded_equals_unsharded(measured, mesh):
  """Sampled tokens, masks and rewards exactly; losses and gradients to 1e-5 of their largest."""
  expected = measured("1x1x1-tied" if mesh == TIED else (1, 1, 1))[0]
  actual = measured(mesh)[0]
  assert actual.keys() == expected.keys()
  exact = [name for name, value in expected.items() if value.dtype.kind in "ib"]
  assert {"chain/tokens", "chain/mask", "tree/tokens"} <= set(exact)
  for name, value in expected.items():
    tolerance = 0 if name in exact else 1e-5 * min(1, abs(value).max())
    np.testing.assert_allclose(actual[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.devices
@pytest.mark.parametrize("mesh", [(1, 1, 1), "1x1x1-tied"], ids=name_of)
def test_what_is_compared_is_not_0(measured, mesh):
  """Ratios differ from 1, the clip silences some tokens, every parameter has a gradient."""
  arrays = measured(mesh)[0]
  for update in ("update", "packed"):
    of_loss = {name.rpartition("/")[2]: x for name, x in arrays.items() if f"{update}/0" in name}
    assert abs(of_loss["policy"]) > 1e-3 and of_loss["kl"] > 1e-3
    assert of_loss["approx_kl"] > 1e-3 and abs(of_loss["ratio_mean"] - 1) > 1e-3
    assert 0.05 < of_loss["clip_fraction"] < 0.5
    assert of_loss["skipped_ratio"] == of_loss["skipped_nonfinite"] == 0
    gradients = [x for name, x in arrays.items() if f"{update}/1" in name]
    assert len(gradients) > 10 and all(x.any() for x in gradients)


@pytest.mark.devices
@pytest.mark.parametrize("mesh", MESHES, ids=name_of)
def test_parameters_and_optimiser_state_are_shared_out(measured, mesh):
  """Of the gradient that is kept, before and after an update; and of AdamW."""
  one, facts = measured((1, 1, 1))[1], measured(mesh)[1]
  shards = mesh[1] * mesh[2]
  for name in ("bytes_per_device", "bytes_after", "optimizer_bytes_per_device"):
    whole, held = one[name][0], facts[name]
    assert len(set(held)) == 1
    # Norms and the tiny rest stay whole on every device.
    assert whole / shards <= held[0] <= whole / shards + 0.02 * whole


@pytest.mark.devices
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 1, 4)], ids=name_of)
def test_without_fsdp_no_weight_is_gathered(measured, mesh, program):
  gathered = [shape for kind, shape in measured(mesh)[1][program] if kind == "all-gather"]
  assert not [shape for shape in gathered if 32 in shape[-2:] and len(shape) == 2], gathered


@pytest.mark.devices
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("mesh", [(1, 4, 2), (2, 2, 2), (2, 1, 4), TIED], ids=name_of)
def test_where_the_vocabulary_is_shared_out_no_embedding_or_head_is_whole(measured, mesh, program):
  made = [shape for _, shape in measured(mesh)[1][program]]
  assert EMBEDDING not in made and EMBEDDING[::-1] not in made


@pytest.mark.devices
@pytest.mark.parametrize("program", PROGRAMS)
def test_tokens_are_looked_up_where_the_embedding_lies(measured, program):
  """Shared out by channels, it is never whole, and neither is its gradient."""
  assert EMBEDDING not in [shape for _, shape in measured((1, 8, 1))[1][program]]


@pytest.mark.devices
@pytest.mark.parametrize("mesh", [*MESHES, RESHARDED, TIED], ids=name_of)
def test_no_key_or_value_ever_leaves_its_device(measured, mesh):
  """Heads have 24 channels, a device's part of an embedding never."""
  facts = measured(mesh)[1]
  for program in ("grow", "prefill"):
    made = [shape for _, shape in facts[program]]
    assert not [shape for shape in made if len(shape) > 2 and shape[-1] == 24], made
    assert "collective-permute" not in {kind for kind, _ in facts[program]}


@pytest.mark.devices
@pytest.mark.parametrize("mesh", [*MESHES, RESHARDED, TIED], ids=name_of)
def test_no_row_of_logits_is_gathered(measured, mesh):
  """Of 264 words; the head is [32, 264], rows are 16."""
  made = [shape for kind, shape in measured(mesh)[1]["grow"] if kind == "all-gather"]
  assert not [shape for shape in made if shape[0] <= 16 and math.prod(shape[1:]) >= 132], made


@pytest.mark.devices
def test_xla_never_gives_up_on_a_layout(measured):
  """It says so where it puts a whole array on every device, which only a move may do."""
  assert "rematerialization" not in measured.stderr().partition("resharded")[0]


@pytest.mark.devices
def test_rollouts_in_another_layout_hold_the_parameters_in_it(measured):
  """The move itself is made under a guard that forbids every copy by way of the host."""
  whole = measured((1, 1, 1))[1]["rollout_bytes_per_device"][0]
  facts, same = measured(RESHARDED)[1], measured((1, 8, 1))[1]
  (held,) = set(facts["rollout_bytes_per_device"])
  assert whole / 2 <= held <= whole / 2 + 0.02 * whole  # tensor=2
  assert max(same["rollout_bytes_per_device"]) <= whole / 8 + 0.02 * whole
  assert facts["reshard_seconds"] > 0 == same["reshard_seconds"]


@pytest.mark.devices
@pytest.mark.parametrize("mesh", [(1, 4, 2), (2, 2, 2), (2, 1, 4), TIED], ids=name_of)
def test_where_the_vocabulary_is_shared_out_no_logits_travel(measured, mesh):
  """The update adds up maxima and sums over the vocabulary; nothing as wide as it moves."""
  for name in ("update", "packed"):
    moved = [shape for _, shape in measured(mesh)[1][name]]
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


def test_a_mesh_that_leaves_a_process_without_devices_is_refused(monkeypatch):
  devices = [SimpleNamespace(process_index=i // 2) for i in range(4)]
  monkeypatch.setattr(sharding, "Mesh", lambda devices, *_, **__: devices)
  monkeypatch.setattr(
    sharding.mesh_utils, "create_device_mesh",
    lambda sizes, devices, **_: np.array(devices).reshape(sizes),
  )  # fmt: skip
  assert sharding.make_mesh(MeshConfig(3, 1, 1), devices).size == 3
  with pytest.raises(ConfigError, match=r"mesh.data=2.* 2 of 4 devices.*process 1 without any"):
    sharding.make_mesh(MeshConfig(2, 1, 1), devices)


@pytest.mark.parametrize(
  ("sizes", "expected"),
  [
    ((), (8, 1, 1)),  # parameters whole
    ((0, 0, 0), (2, 4, 1)),
    ((0, 1, -1), (2, 1, 4)),
    ((4, 1, 2), (4, 1, 2)),
  ],
)
def test_the_mesh_of_rollouts_takes_the_devices_of_training_in_their_order(sizes, expected):
  devices = np.arange(8).reshape(2, 4, 1)  # numbers will do
  made = []
  training = SimpleNamespace(shape=dict(zip(sharding.AXES, (2, 4, 1))), size=8, devices=devices)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "Mesh", lambda devices, *_, **__: made.append(devices))
    sharding.make_rollout_mesh(RolloutMeshConfig(*sizes), training)
  np.testing.assert_array_equal(made[0], np.arange(8).reshape(expected))


@pytest.mark.parametrize(
  ("sizes", "said"),
  [
    ((2, 2, 0), "rollout.mesh.data=2, rollout.mesh.fsdp=2, .* 4 devices, training has 8"),
    ((0, 8, 0), "rollout.mesh.fsdp=8.* asks for 16 devices, there are 8"),
    ((3, -1, 0), "rollout.mesh.data=3.* cannot share out 8 devices"),
  ],
)
def test_a_mesh_of_rollouts_on_other_devices_than_training_is_refused(sizes, said):
  with pytest.raises(ConfigError, match=said):
    sharding.make_rollout_mesh(
      RolloutMeshConfig(*sizes), jax.sharding.AbstractMesh((2, 4, 1), sharding.AXES)
    )


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
