"""Folders of models, here or on the hub, and the JSON in them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from spo_jax.config import ConfigError


def find_folder(path_or_name: str | os.PathLike[str], weights: bool) -> Path:
  """The folder itself, or what the hub has under that name, from its cache where it can."""
  name = os.fspath(path_or_name)
  if os.path.isdir(name):
    return Path(name)
  if os.path.exists(name) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
    raise ConfigError(f"{name} is no folder with a model; name one, or a model of the hub.")
  from huggingface_hub import snapshot_download

  patterns = ["*.json", "model*.safetensors"] if weights else ["*.json"]
  try:
    return Path(snapshot_download(name, allow_patterns=patterns))
  except Exception as error:  # of the network, the hub, its cache: many kinds
    raise ConfigError(
      f"{name} is no folder here, and the hub did not give it ({type(error).__name__}). Check the "
      "name, the network and HF_HUB_OFFLINE, or name a folder."
    ) from error


def read_json(file: Path) -> dict[str, Any]:
  try:
    content = json.loads(file.read_text(encoding="utf-8"))
  except OSError as error:
    raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
  except ValueError as error:
    raise ConfigError(f"{file} is not valid JSON: {error}.") from error
  if not isinstance(content, dict):
    raise ConfigError(f"{file} is not a JSON object.")
  return content


def write_json(file: Path, content: dict[str, Any]) -> None:
  file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
