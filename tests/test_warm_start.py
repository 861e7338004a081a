"""When the warm start looks, and where it ends."""

from __future__ import annotations

import contextlib
import types

import jax
import numpy as np
import pytest
from runs import CONFIG

from spo_jax import runlog, warm_start
from spo_jax.checkpoint import Checkpoints
from spo_jax.config import load
from spo_jax.experiment import Experiment, build


def test_near_its_target_it_looks_more_often(monkeypatch, tmp_path):
  accuracies, steps = iter([0.1, 0.3, 0.4, 0.6]), []

  def step(config, optimizer, state, tokens, is_token, mask, **static):
    steps.append(1)
    return state, np.float32(0)

  monkeypatch.setattr(warm_start, "supervised_update", step)
  monkeypatch.setattr(Experiment, "dev_accuracy", lambda *_, temperature: next(accuracies))
  (tmp_path / "config.yaml").write_text(CONFIG)
  config = load(
    tmp_path / "config.yaml",
    ["sft.max_steps=99", "sft.check_every=10", "sft.target_accuracy=0.6"],
  )
  never = types.SimpleNamespace(is_asked=lambda: False)
  compiles = contextlib.nullcontext()
  compiles.programs = set()
  warm_start.warm_start(build(config), tmp_path, compiles, never)
  assert len(steps) == 24
  records = runlog.read_metrics(tmp_path / "warm_start")
  assert [r["iteration"] for r in records] == [10, 20, 22, 24]
  assert [r["dev/greedy_accuracy"] for r in records] == [0.1, 0.3, 0.4, 0.6]


def test_a_killed_warm_start_is_restored_without_a_second_state(monkeypatch, tmp_path):
  (tmp_path / "config.yaml").write_text(CONFIG)
  compiles = types.SimpleNamespace(programs=set())
  asked = types.SimpleNamespace(is_asked=lambda: True, reason=KeyboardInterrupt)
  experiment = build(load(tmp_path / "config.yaml", ["sft.max_steps=4", "sft.check_every=1"]))
  with pytest.raises(KeyboardInterrupt):
    warm_start.warm_start(experiment, tmp_path, compiles, asked)
  templates, restore = [], Checkpoints.restore
  monkeypatch.setattr(
    Checkpoints, "restore", lambda self, step, like: templates.append(like) or restore(
      self, step, like)
  )  # fmt: skip
  monkeypatch.delattr(Experiment, "init_params")
  asked.is_asked = lambda: False
  warm_start.warm_start(experiment, tmp_path, compiles, asked)
  assert {type(x) for x in jax.tree.leaves(templates)} == {jax.ShapeDtypeStruct}
  records = runlog.read_metrics(tmp_path / "warm_start")
  assert [r["iteration"] for r in records] == [1, 2, 3, 4]
