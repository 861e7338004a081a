"""Where an evaluation takes its model from: a Hugging Face folder, the hub, or a training run."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_jax.checkpoint import Checkpoints
from spo_jax.config import Config, load
from spo_jax.errors import said
from spo_jax.experiment import Experiment
from spo_jax.model import Params
from spo_jax.update import make_optimizer, state_template


def digest(*parts: bytes) -> str:
  """A short name for these bytes."""
  return hashlib.blake2b(b"".join(parts), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Source:
  """Where parameters come from: a Hugging Face model, or step `step` of a training run.

  Attributes:
    model: resolved path, or a hub name; run: the configuration of a training run.
    kind: "policy" or "best", which checkpoints of the run.
  """

  model: str
  run: Config | None = None
  kind: str = "policy"
  step: int | None = None

  @property
  def checkpoints(self) -> Path:
    return Path(self.model) / "checkpoints" / self.kind

  def weights(self) -> str | None:
    """A digest that changes when the weights are written anew; None for a hub name."""
    if self.run is None:
      files = sorted(Path(self.model).glob("*.safetensors"))
    else:
      files = sorted((self.checkpoints / str(self.step)).rglob("*"))
    stats = [(path.name, path.stat()) for path in files if path.is_file()]
    written = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return digest(repr(written).encode()) if written else None


def find_source(model: str, checkpoint: str | None) -> Source:
  """What `--model` and `--checkpoint` name.

  Raises: ValueError, one line, where there is no such thing.
  """
  folder = Path(model)
  if not (folder / "config.yaml").is_file():
    if checkpoint is not None:
      raise ValueError(f"--checkpoint {checkpoint} picks one of a training run, and {model} is "
                       "none. Leave it out.")  # fmt: skip
    if folder.is_dir() and not (folder / "config.json").is_file():
      raise ValueError(f"--model {model} holds neither config.json, as a Hugging Face folder does, "
                       "nor config.yaml, as a training run does.")  # fmt: skip
    return Source(str(folder.resolve()) if folder.exists() else model)
  kind = "best" if checkpoint == "best" else "policy"
  source = Source(str(folder.resolve()), load(folder / "config.yaml"), kind)
  # Complete checkpoints only: a half-written one has another name.
  paths = source.checkpoints.glob("*") if source.checkpoints.is_dir() else []
  steps = sorted(int(path.name) for path in paths if path.name.isdecimal())
  if not steps:
    hint = " A run keeps its best where eval.validation_problems is set." * (kind == "best")
    raise ValueError(f"{source.checkpoints} holds no checkpoint.{hint}")
  if checkpoint in (None, "latest", "best"):
    return dataclasses.replace(source, step=steps[-1])
  if checkpoint not in map(str, steps):
    raise ValueError(f"--checkpoint {checkpoint} is none of latest, best, "
                     f"{', '.join(map(str, steps))}.")  # fmt: skip
  return dataclasses.replace(source, step=int(checkpoint))


def load_params(source: Source, experiment: Experiment) -> Params:
  """Parameters on the device.

  Raises: ValueError, one line, where a Hugging Face folder does not hold the model it describes,
    or a checkpoint cannot be read; CheckpointError where processes see different ones.
  """
  if source.step is None:
    return experiment.init_params()
  optimizer = make_optimizer(experiment.config.optimizer)
  template: Any = state_template(experiment.model_config, optimizer, experiment.mesh)
  is_best = source.kind == "best"  # of which the parameters alone are kept
  keep = experiment.config.checkpoint.keep
  with Checkpoints(source.checkpoints, keep, is_reader=True) as checkpoints:
    checkpoints.assert_all_see(source.step)
    try:
      restored, _, _ = checkpoints.restore(source.step, template.params if is_best else template)
    except Exception as error:  # of the file system, of every format inside: many kinds
      raise ValueError(
        f"{source.checkpoints / str(source.step)} cannot be read ({said(error)}). Name another "
        "--checkpoint."
      ) from error
  return restored if is_best else restored.params
