"""Tensors of safetensors files, one by one into arrays on the device.

Submodules are named as Hugging Face names them, so a tensor's name is a rewrite of its path and
a kernel is a transposed weight.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spo_jax import model, sharding
from spo_jax.config import ConfigError, ModelConfig
from spo_jax.hf.configs import parse_config
from spo_jax.hf.folders import find_folder, read_json

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors names them
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ROWS = 4096  # of two tables compared at a time


class Slot(NamedTuple):
  """Where a tensor of a folder belongs."""

  path: tuple[str, ...]  # in params
  shape: tuple[int, ...]  # in params
  transposed: bool  # the file holds it the other way round


class _Stored(NamedTuple):
  """Where a tensor is."""

  file: Path
  shape: tuple[int, ...]
  dtype: str


def load_pretrained(
  path_or_name: str | os.PathLike[str], dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[ModelConfig, model.Params]:
  """Model and parameters of a local folder or hub name.

  Tensors go one by one from the file to the device, largest first, so the host never holds
  much more than the parameters themselves.

  Args:
    dtype: of the parameters, whatever the files hold (float32, bfloat16 or float16).
    mesh: devices to place them on; None: the default device.
  Raises: ConfigError, one line naming file and tensor, where the folder is not such a model.
  """
  folder = find_folder(path_or_name, weights=True)
  config = parse_config(folder / "config.json")
  slots, stored = slots_of(config), _stored(folder)
  _check(config, folder, slots, stored)
  params: dict[str, Any] = {}
  for name in sorted(slots, key=lambda name: -math.prod(slots[name].shape)):
    *parents, leaf = slots[name].path
    inner = params
    for parent in parents:
      inner = inner.setdefault(parent, {})
    inner[leaf] = _load_tensor(name, slots[name], stored[name], np.dtype(dtype), mesh)
  return config, params


def _load_tensor(
  name: str, slot: Slot, stored: _Stored, dtype: np.dtype, mesh: Mesh | None
) -> jax.Array:
  def read(index: tuple[slice, ...] | None = None) -> np.ndarray:
    with open_weights(stored.file) as file:  # anew each time: mapped pages count as memory
      if index is None or all(part == slice(None) for part in index):
        values = file.get_tensor(name)
      else:
        values = file.get_slice(name)[index[::-1] if slot.transposed else index]
      return np.array(values.T if slot.transposed else values, dtype, order="C")

  if mesh is None:
    array = jax.device_put(read())
  else:
    place = sharding.placement("/".join(slot.path), slot.shape, mesh)
    array = jax.make_array_from_callback(slot.shape, place, read)
  return array.block_until_ready()  # a transfer under way would keep its source


def slots_of(config: ModelConfig) -> dict[str, Slot]:
  """Where every tensor of the model belongs, by its Hugging Face name."""
  shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
  slots = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
    path = tuple(key.key for key in keys)
    *parents, last = path
    if not parents:
      name = f"{last}.weight" if last == "lm_head" else f"model.{last}.weight"
    else:
      parts = [re.sub(r"^layers_", "layers.", parent) for parent in parents]
      name = ".".join(["model", *parts, "weight" if last == "kernel" else last])
    slots[name] = Slot(path, leaf.shape, last in ("kernel", "lm_head"))
  return slots


def _stored(folder: Path) -> dict[str, _Stored]:
  """Every tensor of a folder's safetensors files."""
  tensors: dict[str, _Stored] = {}
  for path in _weight_files(folder):
    with open_weights(path) as file:
      for name in file.keys():  # noqa: SIM118, it is no mapping
        if name in tensors:
          raise ConfigError(f"{path}: tensor {name} is in {tensors[name].file.name} as well.")
        tensor = file.get_slice(name)
        tensors[name] = _Stored(path, tuple(tensor.get_shape()), tensor.get_dtype())
  return tensors


def _weight_files(folder: Path) -> list[Path]:
  if (folder / SINGLE).is_file():
    return [folder / SINGLE]
  if not (folder / INDEX).is_file():
    raise ConfigError(
      f"{folder} has neither {SINGLE} nor {INDEX}; other formats of weights are not read. "
      "transformers' save_pretrained writes them."
    )
  weight_map = read_json(folder / INDEX).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise ConfigError(f"{folder / INDEX} has no weight_map of tensors to files.")
  files = {str(file): folder / str(file) for file in weight_map.values()}
  for name, file in weight_map.items():
    if not files[str(file)].is_file():
      raise ConfigError(f"{folder / INDEX}: tensor {name} is in {file}, which is missing.")
  return sorted(files.values())


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Any]:
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(path, "np") as file:
      yield file
  except (SafetensorError, OSError) as error:
    raise ConfigError(
      f"{path} is no complete safetensors file ({error}); download or copy it again."
    ) from error


def _check(
  config: ModelConfig, folder: Path, slots: dict[str, Slot], stored: dict[str, _Stored]
) -> None:
  """Raises ConfigError unless the tensors are exactly those of the model."""
  files = sorted({tensor.file.name for tensor in stored.values()})
  for name in slots:
    if name not in stored:
      where = files[0] if len(files) == 1 else f"all {len(files)} files"
      raise ConfigError(
        f"{folder}: tensor {name} of this {config.family} model is missing in {where}."
      )
  head = stored.pop("lm_head.weight", None) if config.tie_embeddings else None
  for name, tensor in stored.items():
    if name.endswith("rotary_emb.inv_freq"):  # a buffer that was saved once
      continue
    if name not in slots:
      raise ConfigError(f"{tensor.file}: tensor {name} is no part of this {config.family} model.")
    slot = slots[name]
    shape = slot.shape[::-1] if slot.transposed else slot.shape
    if tensor.shape != shape:
      raise ConfigError(
        f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}; config.json asks for "
        f"{list(shape)}."
      )
    if tensor.dtype not in DTYPES:
      raise ConfigError(
        f"{tensor.file}: tensor {name} is {tensor.dtype}; {', '.join(DTYPES)} are supported."
      )
  if head is not None and not _same(head, stored["model.embed_tokens.weight"]):
    # transformers unties such a model with a warning, whatever its config.json says.
    raise ConfigError(
      f"{head.file}: tensor lm_head.weight differs from model.embed_tokens.weight, but config.json "
      "ties them. Set tie_word_embeddings to false there to use it."
    )


def _same(head: _Stored, embedding: _Stored) -> bool:
  """Whether a tied model only stores its embedding a second time; some blocks in memory."""
  if head[1:] != embedding[1:]:
    return False
  rows = head.shape[0]
  with open_weights(head.file) as first, open_weights(embedding.file) as second:
    ours, theirs = first.get_slice("lm_head.weight"), second.get_slice("model.embed_tokens.weight")
    blocks = (slice(i, min(i + _ROWS, rows)) for i in range(0, rows, _ROWS))
    return all(np.array_equal(ours[block], theirs[block]) for block in blocks)
