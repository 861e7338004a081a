"""Checkpoints that a kill at any moment cannot spoil: what restores is exactly what was saved.

Randomness and data order are functions of (seed, iteration), so a checkpoint is the train
state, the edge buffer and a few counters.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from spo_jax.distributed import any_process, from_main, is_alone
from spo_jax.errors import said
from spo_jax.runlog import writing
from spo_jax.structs import Edges

State = TypeVar("State")  # any tree of arrays


class CheckpointError(RuntimeError):
  """No checkpoint of a run can be read; the message is one line."""


class Checkpoints:
  """The checkpoints of one directory, by step. A half-written one is never listed.

  Args:
    directory: made where missing; keep: newest ones to keep.
    is_reader: whether another process may be saving there; if not, what kills left is removed.
  """

  def __init__(self, directory: Path, keep: int, is_reader: bool = False):
    # Orbax raises what it logs, and warns about the remains of every kill.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=not is_reader
      ),
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def latest(self) -> int | None:
    """Step of the newest complete checkpoint; of several processes all must ask.

    Raises: CheckpointError where they do not see the same.
    """
    latest = self._manager.latest_step()
    self.assert_all_see(latest)
    return latest

  def assert_all_see(self, step: int | None) -> None:
    """Raises: CheckpointError where processes have found different steps; None is no step."""
    own = -1 if step is None else step
    main = from_main(own)
    if any_process(own != main):
      raise CheckpointError(
        f"processes see different checkpoints in {self._manager.directory}, the main one {main}. "
        "Start again when its file system shows them to all."
      )

  def steps(self) -> list[int]:
    """Steps of all complete checkpoints."""
    return list(self._manager.all_steps())

  def save(
    self, step: int, state: State, counters: dict[str, Any], edges: Edges | None = None
  ) -> None:
    """Saves in the background; all of it may be donated or changed as soon as this returns.

    Args:
      counters: plain JSON values.
    Raises: OSError where this or an earlier save found no space; `close` does so too.
    """
    # Orbax copies arrays before it returns, but would read the counters later.
    count = 0 if edges is None else len(edges.start)
    items = {
      "state": ocp.args.StandardSave(state),
      "counters": ocp.args.JsonSave(copy.deepcopy(counters) | {"edges": count}),
    }
    if edges is not None and count:
      items["edges"] = ocp.args.StandardSave(dataclasses.asdict(edges))
    with writing(self._manager.directory):  # a save before this one may have failed
      is_saving = self._manager.save(step, args=ocp.args.Composite(**items))
    assert is_saving, f"step {step} is not behind {self.steps()}: see forget_after"

  def restore(
    self, step: int, template: State
  ) -> tuple[State, dict[str, Any], Edges | None]:
    """What `save` was given.

    Args:
      template: a state of the same shapes, dtypes and shardings; its values are not read.
    Raises: what the file system or a format inside does; ValueError where edges are missing.
    """
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    items = {"state": ocp.args.StandardRestore(like), "counters": ocp.args.JsonRestore()}
    if (self._manager.directory / str(step) / "edges").exists():
      items["edges"] = ocp.args.StandardRestore()
    restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    edges, counters = restored.get("edges"), restored["counters"]
    if counters.pop("edges", 0) and edges is None:
      raise ValueError("its edges are missing")
    return (
      restored["state"],
      counters,
      Edges(**jax.tree.map(np.asarray, edges)) if edges is not None else None,
    )

  def counters(self, step: int) -> dict[str, Any]:
    """Those that `save` was given. Raises: CheckpointError where they cannot be read."""
    items = {"counters": ocp.args.JsonRestore()}
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**items))["counters"]
    except Exception as error:  # as in restore_newest
      raise CheckpointError(
        f"{self._manager.directory / str(step)} cannot be read ({said(error)}). Move it away, and "
        "--resume."
      ) from error

  def restore_newest(
    self, template: State, at_most: int | None = None
  ) -> tuple[int, State, dict[str, Any], Edges | None] | None:
    """Step and content of the newest checkpoint that can be read; None where there is none.

    What cannot be read (a truncated or missing file) is named and passed over; not by several
    processes, of which those that can read theirs wait inside orbax.

    Args:
      at_most: steps behind this one are passed over.
    Raises: CheckpointError where there are checkpoints, and none can be read, or one process of
      several cannot read the newest or does not see it.
    """
    steps = sorted(self.steps(), reverse=True)
    within = [step for step in steps if at_most is None or step <= at_most]
    self.assert_all_see(within[0] if within else None)
    for step in within:
      try:
        return step, *self.restore(step, template)
      except Exception as error:  # of the file system, of every format inside: many kinds
        broken = self._manager.directory / str(step)
        if not is_alone():
          raise CheckpointError(
            f"a process cannot read {broken} ({said(error)}). Move it away, and --resume goes on "
            "from the one before it."
          ) from error
        print(f"warning: {broken} cannot be read and is passed over ({said(error)})",
              file=sys.stderr)  # fmt: skip
    if steps:
      limit = "" if at_most is None else f" and is within what metrics.jsonl holds, {at_most}"
      raise CheckpointError(
        f"none of the checkpoints {steps} in {self._manager.directory} can be read{limit}. Copy "
        "the run directory from where it is whole, or start a new run."
      )
    return None

  def forget_after(self, step: int) -> None:
    """Deletes newer checkpoints: a run that goes on from here makes them again."""
    for newer in [other for other in self.steps() if other > step]:
      self._manager.delete(newer)

  def close(self) -> None:
    """Waits for saves in the background."""
    with writing(self._manager.directory):
      self._manager.close()
