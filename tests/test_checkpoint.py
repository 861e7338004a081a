"""What restores is exactly what was saved, whatever moment a kill chose."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax import checkpoint
from spo_jax.checkpoint import CheckpointError, Checkpoints
from spo_jax.config import OptimizerConfig
from spo_jax.structs import Edges
from spo_jax.update import init_state, make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=3))


@jax.jit
def trained(seed):
  """A state behind its first update, different for every seed."""
  params = {
    "embed": jax.random.normal(jax.random.key(seed), (17, 8)),
    "layer": {"scale": jnp.full(8, 1.5, jnp.bfloat16)},
  }
  state = init_state(params, OPTIMIZER)
  gradients = jax.tree.map(lambda x: x * 0.1 + 0.1, params)
  _, opt_state = OPTIMIZER.update(gradients, state.opt_state, params)
  return state.replace(opt_state=opt_state, step=jnp.int32(seed) + 1)


def edges(count, width=5):
  rng = np.random.default_rng(count)
  return Edges(
    tokens=rng.integers(0, 17, (count, width), np.int32),
    logprobs=-rng.random((count, width), np.float32),
    start=rng.integers(0, 2, count, np.int32),
    end=rng.integers(2, width, count, np.int32),
    advantage=rng.normal(size=count).astype(np.float32),
    question=rng.integers(2**31, 2**62, count),  # question ids do not fit 32 bits
    born=rng.integers(0, 9, count, np.int32),
  )


def assert_bitwise(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


def test_a_train_state_is_restored_bitwise(tmp_path):
  counters = {"programs": ["a(f32[2])", "b"], "totals": {"seconds": 0.1 + 0.2, "tokens": 2**40}}
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(7, trained(1), counters)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    assert checkpoints.latest() == 7
    state, restored, none = checkpoints.restore(7, trained(9))
  assert_bitwise(state, trained(1))  # the structure too: optax finds its NamedTuples again
  assert restored == counters
  assert none is None


@pytest.mark.parametrize("seen", [9, -1])
def test_processes_that_see_different_checkpoints_do_not_go_on(tmp_path, monkeypatch, seen):
  """`seen` is the newest step of the main process; none is -1."""
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (3, 7):
      checkpoints.save(step, trained(step), {})
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.restore_newest(trained(9), at_most=6)[0] == 3
    monkeypatch.setattr(checkpoint, "from_main", lambda own: seen)
    for ask in (checkpoints.latest, lambda: checkpoints.restore_newest(trained(9))):
      with pytest.raises(CheckpointError, match=f"different checkpoints .* main one {seen}"):
        ask()


def test_edges_of_any_number_are_restored_bitwise(tmp_path):
  sizes = (3, 0, 1, None, 40)
  with Checkpoints(tmp_path, keep=len(sizes)) as checkpoints:
    for step, size in enumerate(sizes):
      checkpoints.save(step, trained(0), {}, None if size is None else edges(size))
  with Checkpoints(tmp_path, keep=len(sizes)) as checkpoints:
    for step, size in enumerate(sizes):
      _, _, restored = checkpoints.restore(step, trained(0))
      if size:
        assert_bitwise(restored, edges(size))
        assert isinstance(restored.tokens, np.ndarray)
      else:  # none and no edges are the same buffer
        assert restored is None


def test_what_happens_after_save_returns_does_not_change_the_checkpoint(tmp_path):
  # Enough steps that a writer in the background falls behind.
  spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
  with Checkpoints(tmp_path, keep=12) as checkpoints:
    for step in range(12):
      state, counters, own = trained(step), {"totals": {"tokens": step}}, edges(step + 1)
      checkpoints.save(step, state, counters, own)
      spoil(state)
      counters["totals"]["tokens"] = -1
      own.tokens[:] = -1
  with Checkpoints(tmp_path, keep=12) as checkpoints:
    for step in range(12):
      state, counters, own = checkpoints.restore(step, trained(0))
      assert_bitwise(state, trained(step))
      assert counters == {"totals": {"tokens": step}}
      assert_bitwise(own, edges(step + 1))


def test_the_newest_checkpoints_are_kept(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 5, 9):
      checkpoints.save(step, trained(step), {})
  assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert_bitwise(checkpoints.restore(5, trained(0))[0], trained(5))


def test_a_directory_without_checkpoints_has_no_latest(tmp_path):
  with Checkpoints(tmp_path / "a b" / "new", keep=1) as checkpoints:
    assert checkpoints.latest() is None


# Each child is killed in front of the n-th rename of its second save: counters, edges, state,
# and then the checkpoint as a whole, twice. JAX has started no thread when they are forked.
KILLED = """
import os, sys
ATOMICITY = "orbax.checkpoint.path.atomicity"
from pathlib import Path
from runs import Stop
from spo_jax.checkpoint import Checkpoints
from test_checkpoint import edges, trained

for call in range(1, 6):
  child = os.fork()
  if not child:
    with Checkpoints(Path(sys.argv[1]) / str(call), keep=1) as checkpoints:
      checkpoints.save(1, trained(1), {"n": 1}, edges(3))
    Stop(f"{ATOMICITY}.AtomicRenameTemporaryPath.finalize", min(call, 4)).install()
    with Checkpoints(Path(sys.argv[1]) / str(call), keep=1) as checkpoints:
      checkpoints.save(2, trained(2), {"n": 2}, edges(4))
    os._exit(0)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
  """Directories 1..4 of saves that were killed before their n-th rename, and 5 like 4."""
  directory = tmp_path_factory.mktemp("killed")
  tests = Path(__file__).parent
  done = subprocess.run(
    [sys.executable, "-c", KILLED, directory], capture_output=True, text=True,
    env=os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
  )  # fmt: skip
  assert done.stdout.split() == [str(-signal.SIGKILL)] * 5, done.stderr
  return directory


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_save_that_was_killed_is_never_listed_and_can_be_repeated(killed, call):
  remains = [path.name for path in (killed / str(call)).iterdir()]
  assert len(remains) == 2 and "1" in remains and "2" not in remains
  with Checkpoints(killed / str(call), keep=1) as checkpoints:
    assert checkpoints.latest() == 1
    state, counters, own = checkpoints.restore(1, trained(0))
    assert_bitwise(state, trained(1))
    assert counters == {"n": 1}
    assert_bitwise(own, edges(3))
    checkpoints.save(2, trained(2), {"n": 2}, edges(4))
  assert [path.name for path in (killed / str(call)).iterdir()] == ["2"]
  with Checkpoints(killed / str(call), keep=1) as checkpoints:
    state, counters, own = checkpoints.restore(2, trained(0))
  assert_bitwise(state, trained(2))
  assert counters == {"n": 2}
  assert_bitwise(own, edges(4))


def test_what_a_killed_save_left_is_removed_but_not_by_who_only_reads(killed, tmp_path):
  folder = shutil.copytree(killed / "5", tmp_path / "run")
  remains = {path.name for path in folder.iterdir()}
  with Checkpoints(folder, keep=1, is_reader=True) as checkpoints:
    checkpoints.restore(1, trained(0))
  assert len(remains) == 2 and {path.name for path in folder.iterdir()} == remains
  with Checkpoints(folder, keep=1) as checkpoints:
    checkpoints.save(3, trained(3), {})  # another step than that of the kill
  assert [path.name for path in folder.iterdir()] == ["3"]


def test_a_step_in_front_of_the_newest_is_not_passed_over_in_silence(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(5, trained(0), {})
    with pytest.raises(AssertionError, match="step 4 is not behind"):
      checkpoints.save(4, trained(0), {})
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.forget_after(3)
    checkpoints.save(4, trained(1), {})
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.steps() == [4]
    assert_bitwise(checkpoints.restore(4, trained(9))[0], trained(1))
