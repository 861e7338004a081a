"""Typed configuration. Whatever is wrong stops with one line before any compute."""

from spo_jax.config.checks import check_context, validate
from spo_jax.config.loading import changed_keys, config_at, known_keys, load, to_yaml
from spo_jax.config.schema import (
  Config,
  ConfigError,
  EvalConfig,
  KLConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RolloutConfig,
  RolloutMeshConfig,
  RopeScaling,
  SFTConfig,
  TaskConfig,
  TrainConfig,
  get,
)

__all__ = [
  "Config", "ConfigError", "EvalConfig", "KLConfig", "MeshConfig", "ModelConfig",
  "OptimizerConfig", "RolloutConfig", "RolloutMeshConfig", "RopeScaling", "SFTConfig", "TaskConfig",
  "TrainConfig", "changed_keys", "check_context", "config_at", "get", "known_keys", "load",
  "to_yaml", "validate",
]  # fmt: skip
