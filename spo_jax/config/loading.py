"""YAML files and `--set a.b=c` to a validated Config, and the stages of its schedule.

Files may name a `base:` file (relative to themselves) that they change.
"""

from __future__ import annotations

import dataclasses
import difflib
import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, read_write

from spo_jax.config.checks import validate
from spo_jax.config.schema import Config, ConfigError, get


def load(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
  """Reads a YAML file (None: only defaults) and `key=value` overrides into a validated Config.

  Raises:
    ConfigError: one line, naming the value and the fix.
  """
  resolved = OmegaConf.structured(Config)
  for settings in _read_files(Path(path)) if path is not None else []:
    _assign(resolved, settings)
  config = _assigned(resolved, overrides)
  if (folder := config.model.path or "").startswith("~"):
    own = dataclasses.replace(config.model, path=os.path.expanduser(folder))
    config = dataclasses.replace(config, model=own)
  validate(config)
  for first, _ in map(_stage, config.schedule):
    validate(config_at(config, first))
  _validate_schedule(config)
  return config


def _assigned(settings: Any, overrides: Sequence[str]) -> Config:
  """The Config that `settings` and, on top, `key=value` overrides make; not validated."""
  resolved = OmegaConf.structured(settings)
  for override in overrides:
    key, sep, _ = override.partition("=")
    if not sep or not key:
      raise ConfigError(f"--set {override}: expected key=value, such as --set seed=1.")
    try:
      settings = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except Exception as error:  # YAML raises many kinds, none of them ours
      raise ConfigError(f"--set {override} is not valid: {error}") from error
    _assign(resolved, settings)
  config = OmegaConf.to_object(resolved)
  assert isinstance(config, Config)
  return config


def to_yaml(config: Config) -> str:
  """The resolved configuration; `load` reads it back to an equal Config."""
  return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_files(path: Path, seen: tuple[Path, ...] = ()) -> list[Any]:
  """The file and its chain of bases, furthest base first, as plain dicts."""
  if not os.path.isfile(path):  # unlike Path.is_file, never raises
    wrong = "is a directory, not a file" if os.path.isdir(path) else "does not exist"
    raise ConfigError(f"config file {path} {wrong}; configs/ holds the ones that ship.")
  if path.resolve() in seen:
    raise ConfigError(f"{path}: its `base:` files form a circle; remove one of them.")
  try:
    loaded = OmegaConf.to_container(OmegaConf.load(path))
  except Exception as error:  # YAML raises many kinds, none of them ours
    raise ConfigError(f"{path} is not valid YAML: {error}") from error
  if not isinstance(loaded, dict):
    raise ConfigError(f"{path}: expected `key: value` lines at the top level.")
  base = loaded.pop("base", None)
  if base is None:
    return [loaded]
  if not isinstance(base, str):
    raise ConfigError(f"{path}: base={base} is not a file name; write base: other.yaml.")
  return [*_read_files(path.parent / base, (*seen, path.resolve())), loaded]


def _assign(resolved: DictConfig, settings: Any, prefix: str = "") -> None:
  """Sets one key at a time, so that whatever is wrong is said with its key."""
  for name, value in settings.items():
    key = f"{prefix}{name}"
    if key not in known_keys():
      near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.4)
      hint = f" did you mean {near[0]}?" if near else " --dry-run prints the known ones."
      raise ConfigError(f"unknown configuration key {key!r};{hint}")
    is_section = OmegaConf.is_dict(OmegaConf.select(resolved, key))
    if is_section and isinstance(value, dict):
      _assign(resolved, value, key + ".")
      continue
    if is_section:
      raise ConfigError(f"{key} is a section; set one of its keys instead of {key}={value}.")
    if any(mark in str(value) for mark in ("${", "???")):
      raise ConfigError(f"{key}={value} is a reference, not a value; write the value itself.")
    parent, _, leaf = key.rpartition(".")
    section = OmegaConf.select(resolved, parent) if parent else resolved
    try:
      with read_write(section):  # frozen dataclasses make read-only nodes
        OmegaConf.update(section, leaf, value)
    except Exception as error:  # OmegaConf converts, and passes on what int() or float() raise
      raise ConfigError(f"{key}={value} has the wrong type: expected {_type_of(key)}.") from error


def known_keys(kind: Any = Config, prefix: str = "") -> list[str]:
  """Every key that a file or `--set` may name, sections included."""
  keys = []
  for entry in dataclasses.fields(kind):
    keys.append(prefix + entry.name)
    if isinstance(entry.default_factory, type):
      keys += known_keys(entry.default_factory, f"{prefix}{entry.name}.")
  return keys


def _type_of(key: str) -> str:
  kind: Any = Config
  *sections, name = key.split(".")
  for section in sections:
    kind = next(f.default_factory for f in dataclasses.fields(kind) if f.name == section)
  return str(next(f.type for f in dataclasses.fields(kind) if f.name == name))


def changed_keys(old: Config, new: Config) -> list[str]:
  """Keys of single values that differ between two configurations."""
  sections = {key.rpartition(".")[0] for key in known_keys()}
  leaves = [key for key in known_keys() if key not in sections]
  return [key for key in leaves if get(old, key) != get(new, key)]


def config_at(config: Config, iteration: int) -> Config:
  """The configuration of one iteration: what `schedule` has set by then."""
  stages = sorted(map(_stage, config.schedule), key=lambda stage: stage[0])
  due = [setting for first, setting in stages if iteration >= first]
  return _assigned(config, due) if due else config


_SCHEDULED = (
  "rollout.max_response_tokens", "spo.continuations", "spo.interval", "spo.segment_tokens",
)  # fmt: skip


def _stage(entry: str) -> tuple[int, str]:
  """`400: spo.interval=5` as (400, "spo.interval=5")."""
  first, _, setting = entry.partition(":")
  key = setting.partition("=")[0].strip()
  if not first.strip().isdecimal() or key not in _SCHEDULED:
    raise ConfigError(
      f"schedule: {entry!r} is not `iteration: key=value` with one of {', '.join(_SCHEDULED)}."
    )
  return int(first), setting.strip()


def _validate_schedule(config: Config) -> None:
  """Rows only grow: edges wait in the buffer from one iteration to later ones."""
  widest = config.rollout.max_response_tokens
  for first in sorted(first for first, _ in map(_stage, config.schedule)):
    tokens = config_at(config, first).rollout.max_response_tokens
    if tokens < widest:
      raise ConfigError(
        f"schedule: rollout.max_response_tokens falls from {widest} to {tokens} at iteration "
        f"{first}; it may only grow. Swap the values or drop the entry."
      )
    widest = tokens
