"""Parameters to a folder that transformers loads."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spo_jax import __version__, model
from spo_jax.config import ConfigError, ModelConfig
from spo_jax.distributed import is_main, to_host
from spo_jax.hf.configs import config_json, export_family
from spo_jax.hf.folders import read_json, write_json
from spo_jax.hf.load import DTYPES, INDEX, SINGLE, slots_of

_WRITER = "spo_jax_version"  # in the config.json of every folder written here


def save_pretrained(
  path: str | os.PathLike[str],
  model_config: ModelConfig,
  params: model.Params,
  tokenizer: Any = None,
  end_ids: Sequence[int] = (),
  max_shard_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that `transformers.AutoModelForCausalLM` and `load_pretrained` load.

  It holds config.json, the weights in the dtype of params, the tokenizer and
  generation_config.json, and appears complete or not at all. A folder written by this function
  is replaced as a whole; any other that is not empty is left alone.

  Where several processes hold the parameters all of them call it, and the main one writes: no
  process holds more than one file's weights, and none but the main one more than one array.

  Args:
    end_ids: tokens that end a response; none: that of the tokenizer.
    max_shard_bytes: weights beyond it are split over files, with an index.
  Raises: ConfigError, one line, where the folder is taken or no architecture has these flags.
  """
  target = Path(path).absolute()
  family = export_family(model_config)
  tensors = _named(model_config, params)
  if not is_main():
    for leaf, _ in tensors.values():
      to_host(leaf)
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  _tidy(target)
  replaces = is_replaceable(target)
  unique = uuid.uuid4().hex[:8]
  new, old = (target.with_name(f".{target.name}.{part}-{unique}") for part in ("new", "old"))
  new.mkdir()
  try:
    dtype = next(iter(tensors.values()))[0].dtype
    write_json(new / "config.json", {
      **config_json(model_config, family, str(dtype)),
      _WRITER: __version__,
      # Absent, some families would take ids of their own.
      "bos_token_id": getattr(tokenizer, "bos_token_id", None),
      "eos_token_id": getattr(tokenizer, "eos_token_id", None),
    })  # fmt: skip
    _write_weights(new, tensors, max_shard_bytes)
    if tokenizer is not None:
      tokenizer.save_pretrained(str(new))
    _write_generation_config(new, tokenizer, end_ids)
    if replaces:
      target.rename(old)
    new.rename(target)
  except BaseException:
    shutil.rmtree(new, ignore_errors=True)
    if old.exists() and not target.exists():
      old.rename(target)
    raise
  shutil.rmtree(old, ignore_errors=True)


def _named(config: ModelConfig, params: model.Params) -> dict[str, tuple[jax.Array, bool]]:
  """Parameters by their Hugging Face names, and whether files hold them transposed."""
  leaves = {
    tuple(key.key for key in keys): leaf
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  named = {}
  for name, slot in slots_of(config).items():
    leaf = leaves.pop(slot.path, None)
    where = "/".join(slot.path)
    if leaf is None or leaf.shape != slot.shape:
      found = "missing" if leaf is None else f"of shape {list(leaf.shape)}"
      raise ConfigError(f"params: {where} is {found}; the model has it as {list(slot.shape)}.")
    if str(leaf.dtype) not in DTYPES.values():
      known = ", ".join(DTYPES.values())
      raise ConfigError(f"params: {where} is {leaf.dtype}; {known} can be saved.")
    named[name] = (leaf, slot.transposed)
  if leaves:
    raise ConfigError(f"params: {'/'.join(next(iter(leaves)))} is no part of the model.")
  return named


def _tidy(target: Path) -> None:
  """Removes what killed saves have left, and puts back the folder that one was replacing."""
  for old in target.parent.glob(f".{target.name}.old-*"):
    if not target.exists():
      old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
  for new in target.parent.glob(f".{target.name}.new-*"):
    shutil.rmtree(new, ignore_errors=True)


def is_replaceable(target: Path) -> bool:
  """Whether there is a folder to replace. Raises: ConfigError where it is not ours."""
  if not target.exists():
    return False
  if not target.is_dir():
    raise ConfigError(f"{target} is a file; name a folder to save the model to.")
  if not any(target.iterdir()):
    return True
  if (target / "config.json").is_file():
    raw = read_json(target / "config.json")
    # transformers passes unknown keys on where it saves a model, but adds its own version.
    if _WRITER in raw and "transformers_version" not in raw:
      return True
  raise ConfigError(f"{target} holds files that were not saved by spo_jax; name another folder.")


def _write_weights(
  folder: Path, tensors: dict[str, tuple[jax.Array, bool]], max_shard_bytes: int
) -> None:
  from safetensors.numpy import save_file

  shards: list[list[str]] = [[]]
  room = max_shard_bytes
  for name, (leaf, _) in tensors.items():
    if leaf.nbytes > room and shards[-1]:
      shards.append([])
      room = max_shard_bytes
    shards[-1].append(name)
    room -= leaf.nbytes
  weight_map = {}
  for i, names in enumerate(shards, 1):
    file = SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
    arrays = {}
    for name in names:
      leaf, transposed = tensors[name]
      array = to_host(leaf)
      # safetensors writes the memory of an array as it lies, also that of a transposed view.
      arrays[name] = np.ascontiguousarray(array.T if transposed else array)
      weight_map[name] = file
    save_file(arrays, str(folder / file), metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / file)  # it comes closed to other users
  if len(shards) > 1:
    total = sum(leaf.nbytes for leaf, _ in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def _write_generation_config(folder: Path, tokenizer: Any, end_ids: Sequence[int]) -> None:
  eos = getattr(tokenizer, "eos_token_id", None)
  ends = [int(i) for i in end_ids] or ([] if eos is None else [int(eos)])
  ids = {
    "bos_token_id": getattr(tokenizer, "bos_token_id", None),
    "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    "pad_token_id": getattr(tokenizer, "pad_token_id", None),
  }
  write_json(
    folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None}
  )
