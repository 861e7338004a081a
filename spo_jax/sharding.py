"""Where arrays live on a mesh of devices: one table for parameters, one for activations.

Axes: `data` and `fsdp` share out rows; `fsdp` shares out parameters and optimiser state too;
`tensor` shares out heads, feed-forward channels and the vocabulary. Without a mesh, or on one
device, everything here does nothing.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spo_jax.config import ConfigError, MeshConfig

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
  "table": P("tensor"),  # [V, E], the embedding where tokens are looked up
  "head": P(None, "tensor"),  # [E, V], where logits are computed
  "vocabulary": P(ROWS, None, "tensor"),  # [parts of the rows, ..., V], logits of the update
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """The mesh of a run; one axis may be -1, for all devices that the others leave.

  Raises: ConfigError where the devices do not make that mesh.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {axis: getattr(config, axis) for axis in AXES}
  asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(abs(size) for size in sizes.values())
  if len(free) > 1 or (free and len(devices) % fixed):
    raise ConfigError(
      f"{asked} cannot share out {len(devices)} devices: one axis may be -1, and the others must "
      "divide them."
    )
  if free:
    sizes[free[0]], fixed = len(devices) // fixed, len(devices)
  if fixed > len(devices):
    raise ConfigError(
      f"{asked} asks for {fixed} devices, there are {len(devices)}. Lower one of them, or set one "
      "to -1."
    )
  return jax.make_mesh(
    tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:fixed]
  )


def row_shards(mesh: Mesh | AbstractMesh) -> int:
  """How many parts rows are shared out into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def row_parts(rows: int) -> int:
  """Into how many equal parts `rows` are shared out, inside a program."""
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else row_shards(mesh)
  return parts if rows % parts == 0 else 1


def constrain(x: jax.Array, name: str) -> jax.Array:
  """`x` laid out as ACTIVATIONS says, inside a program that runs under `jax.set_mesh`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  return jax.lax.with_sharding_constraint(x, _fitting(ACTIVATIONS[name], x.shape, mesh.shape))


def place(tree: Any, name: str, mesh: Mesh) -> Any:
  """Host arrays on the devices of the mesh, laid out as ACTIVATIONS says."""
  return jax.tree.map(
    lambda x: jax.device_put(x, activation(name, jax.numpy.shape(x), mesh)), tree
  )


def activation(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
  """The sharding of one activation, by its name in ACTIVATIONS."""
  return NamedSharding(mesh, _fitting(ACTIVATIONS[name], shape, mesh.shape))


def constrain_parameters(tree: Any) -> Any:
  """Parameters, gradients or optimiser state laid out as PARAMETERS says, inside a program."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return tree
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
