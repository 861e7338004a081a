"""Where arrays live on a mesh of devices: one table for parameters, one for activations.

Axes: `data` and `fsdp` share out rows; `fsdp` shares out parameters and optimiser state too;
`tensor` shares out heads, feed-forward channels and the vocabulary. Without a mesh, or on one
device, everything here does nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spo_jax.config import ConfigError, MeshConfig, RolloutMeshConfig

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes over which rows are shared out

# The first pattern that is found in a parameter's path says where its dimensions go. Moments of
# the optimiser lie where their parameter does, because their paths end in its path.
PARAMETERS: tuple[tuple[str, P], ...] = (
  (r"embed_tokens$", P("tensor", "fsdp")),  # [V, E]
  (r"lm_head$", P("fsdp", "tensor")),  # [E, V]
  (r"(q|k|v|gate|up)_proj/kernel$", P("fsdp", "tensor")),  # [E, heads * H], [E, F]
  (r"(o|down)_proj/kernel$", P("tensor", "fsdp")),  # [heads * H, E], [F, E]
  (r"(q|k|v|gate|up)_proj/bias$", P("tensor")),
  (r"", P()),
)

ACTIVATIONS: dict[str, P] = {
  "scalar": P(),
  "rows": P(ROWS),  # [B, ...]
  "micro_batches": P(None, ROWS),  # [n, B, ...]
  "heads": P(ROWS, None, "tensor"),  # [B, T, heads, H]
  "channels": P(ROWS, None, "tensor"),  # [B, T, F]
  "cache": P(ROWS, "tensor"),  # [B, K, C, H]
  "logits": P(ROWS, "tensor"),  # [B, V]
  # A table stays where it is when tokens are looked up: every device finds its channels of all
  # rows, and they are handed to the rows' own devices.
  "table": P("tensor", "fsdp"),  # [V, E], the embedding
  "tokens": P("data"),  # [B, T]
  "looked_up": P("data", None, "fsdp"),  # [B, T, E]
  "head": P(None, "tensor"),  # [E, V], where logits are computed
  "tied_head": P("tensor"),  # [V, E], the same of a tied one
  "tied_gradient": P(ROWS, "tensor"),  # [parts of the rows, V, E], of a tied head
  "vocabulary": P(ROWS, None, "tensor"),  # [parts of the rows, ..., V], logits of the update
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """The mesh of a run; one axis may be -1, for all devices that the others leave.

  Raises: ConfigError where the devices do not make that mesh.
  """
  devices = jax.devices() if devices is None else devices
  sizes = _sizes("mesh", {axis: getattr(config, axis) for axis in AXES}, len(devices))
  # On a torus an axis may need a part of one of its sides, as 2 chips of 4x4 are.
  placed = mesh_utils.create_device_mesh(
    sizes, devices[: math.prod(sizes)], allow_split_physical_axes=True
  )
  if idle := {d.process_index for d in devices} - {d.process_index for d in placed.flat}:
    raise ConfigError(
      f"{_named('mesh', dict(zip(AXES, sizes)))} takes {placed.size} of {len(devices)} devices, "
      f"and leaves process {min(idle)} without any. Set one axis to -1, or start fewer processes."
    )
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_rollout_mesh(config: RolloutMeshConfig, training: Mesh) -> Mesh:
  """The mesh of rollouts: the devices of training in their order, shared out in another way.

  Raises: ConfigError where it does not take all of them.
  """
  asked = {axis: getattr(config, axis) or training.shape[axis] for axis in AXES}
  sizes = _sizes("rollout.mesh", asked, training.size)
  if math.prod(sizes) != training.size:
    raise ConfigError(
      f"{_named('rollout.mesh', asked)} makes {math.prod(sizes)} devices, training "
      f"has {training.size} and rollouts use the same. Set one of them to -1."
    )
  return Mesh(training.devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(section: str, asked: dict[str, int], devices: int) -> tuple[int, ...]:
  """The size of every axis, -1 filled up."""
  free = [axis for axis, size in asked.items() if size == -1]
  fixed = math.prod(abs(size) for size in asked.values())
  if len(free) > 1 or (free and devices % fixed):
    raise ConfigError(
      f"{_named(section, asked)} cannot share out {devices} devices: one axis may be -1, and the "
      "others must divide them."
    )
  if not free and fixed > devices:
    raise ConfigError(
      f"{_named(section, asked)} asks for {fixed} devices, there are {devices}. Lower one of them, "
      "or set one to -1."
    )
  return tuple(devices // fixed if size == -1 else size for size in asked.values())


def _named(section: str, sizes: dict[str, int]) -> str:
  return ", ".join(f"{section}.{axis}={size}" for axis, size in sizes.items())


def platform() -> str:
  """Of the mesh's devices, because programs are compiled for devices that are not here."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def row_shards(mesh: Mesh | AbstractMesh) -> int:
  """How many parts rows are shared out into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def row_parts(rows: int) -> int:
  """Into how many equal parts `rows` are shared out, inside a program."""
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else row_shards(mesh)
  return parts if rows % parts == 0 else 1


def on_one_device() -> bool:
  """Whether there is nothing to share out, inside a program."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def constrain(x: jax.Array, name: str) -> jax.Array:
  """`x` laid out as ACTIVATIONS says, inside a program that runs under `jax.set_mesh`."""
  if on_one_device():
    return x
  mesh = jax.sharding.get_abstract_mesh()
  return jax.lax.with_sharding_constraint(x, _fitting(ACTIVATIONS[name], x.shape, mesh.shape))


def row_major(x: jax.Array) -> jax.Array:
  """`x` with its last dimension next to each other in memory, whatever XLA would choose.

  On several devices it chooses: its partitioner would gather what a layout is asked of.
  """
  return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if on_one_device() else x


def on_shards(function: Callable[[Any, Any], Any], read: Any, write: Any) -> Any:
  """`function(read, write)` of every shard on its own rows, inside a program; nothing is sent.

  Rows are the first dimension of every array, and the shards share it out equally. Arrays of four
  dimensions are keys or values.

  Returns: what the function makes of `write`, of the same shapes.
  Raises: ValueError where rows have no equal share for every shard.
  """
  if on_one_device():
    return function(read, write)
  mesh = jax.sharding.get_abstract_mesh()

  def spec(x: jax.Array) -> P:
    if x.shape[0] % row_shards(mesh):
      raise ValueError(f"{x.shape[0]} rows cannot be shared out to {row_shards(mesh)} devices.")
    return _fitting(ACTIVATIONS["cache" if x.ndim == 4 else "rows"], x.shape, mesh.shape)

  specs = jax.tree.map(spec, (read, write))
  return jax.shard_map(function, in_specs=specs, out_specs=specs[1])(read, write)


def is_on(params: Any, mesh: Mesh) -> bool:
  """Whether parameters lie on this mesh, and no other one, as PARAMETERS says."""
  pairs = zip(jax.tree.leaves(params), jax.tree.leaves(placements(params, mesh)))
  return all(
    getattr(x.sharding, "mesh", mesh) == mesh and x.sharding.is_equivalent_to(place, x.ndim)
    for x, place in pairs
  )


def move(params: Any, mesh: Mesh) -> Any:
  """Parameters laid out for another mesh of the same devices, without a way over the host.

  `jax.device_put` would take that way within one process. One array moves at a time: XLA may put
  the whole of it on every device in between.
  """
  return jax.tree.map(
    lambda x, place: jax.jit(_identity, out_shardings=place)(x), params, placements(params, mesh)
  )


def _identity(x: Any) -> Any:
  return x


def place(tree: Any, name: str, mesh: Mesh) -> Any:
  """Host arrays on the devices of the mesh, laid out as ACTIVATIONS says."""
  return jax.tree.map(
    lambda x: jax.device_put(x, activation(name, jax.numpy.shape(x), mesh)), tree
  )


def own_rows(rows: int, mesh: Mesh) -> np.ndarray:
  """bool[rows]: which of them lie on devices of this process, shared out over the mesh."""
  own = np.zeros(rows, bool)
  places = activation("rows", own.shape, mesh).addressable_devices_indices_map(own.shape)
  for index in filter(None, places.values()):
    own[index] = True
  return own


def place_own(tree: Any, rows: int, mesh: Mesh) -> Any:
  """Micro-batches [n, rows, ...] on the devices, of which this process has its own rows alone.

  Args:
    tree: host arrays [n, own rows, ...], of `own_rows`.
  """

  def put(x: np.ndarray) -> jax.Array:
    shape = (len(x), rows, *x.shape[2:])
    place = activation("micro_batches", shape, mesh)
    return jax.make_array_from_process_local_data(place, x, shape)

  return jax.tree.map(put, tree)


def activation(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
  """The sharding of one activation, by its name in ACTIVATIONS."""
  return NamedSharding(mesh, _fitting(ACTIVATIONS[name], shape, mesh.shape))


def constrain_parameters(tree: Any) -> Any:
  """Parameters, gradients or optimiser state laid out as PARAMETERS says, inside a program."""
  if on_one_device():
    return tree
  mesh = jax.sharding.get_abstract_mesh()
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jax.lax.with_sharding_constraint(x, _spec(_name(path), x.shape, mesh.shape)),
    tree,
  )


def placements(tree: Any, mesh: Mesh) -> Any:
  """The sharding of every array of a tree of parameters or of a train state."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: placement(_name(path), x.shape, mesh), tree
  )


def placement(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """The sharding of one parameter, by its path with slashes."""
  return NamedSharding(mesh, _spec(name, shape, mesh.shape))


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(name: str, shape: tuple[int, ...], sizes: Any) -> P:
  spec = next(spec for pattern, spec in PARAMETERS if re.search(pattern, name))
  return _fitting(spec, shape, sizes)


def _fitting(spec: P, shape: tuple[int, ...], sizes: Any) -> P:
  """The spec for this mesh: dimensions that its axes do not divide are kept whole."""
  parts = []
  for part, dimension in zip(spec, shape):
    axes = part if isinstance(part, tuple) else (part,)
    here = tuple(axis for axis in axes if axis in sizes)
    shards = math.prod(sizes[axis] for axis in here)
    kept = here if isinstance(part, tuple) else part
    parts.append(kept if here and dimension % shards == 0 else None)
  return P(*parts)
