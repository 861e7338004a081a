"""The real data, where it lies beside the repository: gold solutions are right, and fast."""

import time
from pathlib import Path

import pytest

from spo_jax.config import TaskConfig
from spo_jax.tasks import load_task

DATA = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the data sets do not lie there")


def load(name, folder):
  return load_task(TaskConfig(name=name, path=str(DATA / folder)), seed=0)


def grade_demonstrations(task, problems):
  start = time.monotonic()
  grades = task.grade_many(
    problems, [str(p.demonstration) for p in problems], [True] * len(problems)
  )
  return [grade.reward for grade in grades], time.monotonic() - start


def test_gsm8k_has_its_splits_and_a_thousand_gradings_take_under_a_second():
  task = load("gsm8k", "gsm8k")
  sizes = [len(task.split(name)) for name in ("train", "validation", "test")]
  assert sizes == [7473 - 500, 500, 1319] and not task.skipped
  rewards, seconds = grade_demonstrations(task, task.split("test")[:1000])
  assert rewards == [1.0] * 1000
  assert seconds < 1
  assert all(grade_demonstrations(task, task.split("train"))[0])


def test_math500_gold_solutions_are_right_within_a_minute():
  pytest.importorskip("math_verify")
  task = load("math", "math500")
  problems = task.split("test")
  rewards, seconds = grade_demonstrations(task, problems)
  assert len(rewards) == 500 and sum(rewards) >= 490
  assert seconds < 60
  # The same without the comparison of texts: everything is parsed and compared by math-verify.
  assert sum(r is True for r in task._pool.map([(p.answer, p.answer) for p in problems])) >= 490
  assert not any(task.counters().values())
  task.close()


def test_aime24_is_graded_as_mathematics():
  pytest.importorskip("math_verify")
  task = load("math", "aime24")
  problems = task.split("test")
  assert len(problems) == 30 and not task.skipped
  responses = [f"The final answer is: $\\boxed{{{int(p.answer)}}}$" for p in problems]
  assert [g.reward for g in task.grade_many(problems, responses, [True] * 30)] == [1.0] * 30
  wrong = [f"\\boxed{{{int(p.answer) + 1}}}" for p in problems]
  assert not any(g.reward for g in task.grade_many(problems, wrong, [True] * 30))
