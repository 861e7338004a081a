"""Every grader meets every hostile response: no reward, no crash, and soon done."""

import time

import hostile
import pytest

from spo_jax.config import TaskConfig
from spo_jax.tasks import LOADERS, Grade, load_task

GOLD = {
  "arithmetic": {"answer": "42"},
  "gsm8k": {"answer": "#### 424242"},
  "math": {"answer": r"\frac{424242}{5} + \pi"},
  "game24": {"numbers": [4, 6, 1, 1]},
  "countdown": {"nums": [4242, 77, 5], "target": 4170},
}
RIGHT = {
  "arithmetic": "#42",
  "gsm8k": "#### 424242",
  "math": r"\boxed{\pi + 84848.4}",
  "game24": r"\boxed{4*6*1*1}",
  "countdown": "Answer: 4242-77+5",
}


def test_every_task_is_attacked():
  assert set(GOLD) == set(RIGHT) == set(LOADERS)


@pytest.mark.parametrize("name", sorted(set(LOADERS) - {"math"}))
def test_hostile_responses_earn_nothing_within_milliseconds(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  task = load_task(TaskConfig(name=name), seed=0)
  problem = task.from_record(GOLD[name], 0)
  for response in hostile.RESPONSES:
    start = time.process_time()
    reward, extracted = task.grade(problem, response, finished=True)
    assert reward == 0.0, ascii(response[:60])
    assert extracted is None or len(extracted) <= 4000
    assert time.process_time() - start < 0.5, ascii(response[:60])
  assert not list(tmp_path.iterdir())
  assert task.grade(problem, RIGHT[name], finished=True).reward == 1.0


@pytest.mark.slow
def test_hostile_mathematics_earns_nothing_and_workers_are_there_afterwards(tmp_path, monkeypatch):
  pytest.importorskip("math_verify")
  monkeypatch.chdir(tmp_path)
  task = load_task(TaskConfig(name="math"), seed=0)
  problem = task.from_record(GOLD["math"], 0)
  start = time.monotonic()
  grades = task.grade_many(
    [problem] * len(hostile.RESPONSES), hostile.RESPONSES, [True] * len(hostile.RESPONSES)
  )
  assert time.monotonic() - start < 200
  for response, (reward, extracted) in zip(hostile.RESPONSES, grades):
    assert reward == 0.0, ascii(response[:60])
    assert extracted is None or len(extracted) <= 300
  counts = task.counters()
  assert counts["timeouts"] > 0  # or these bombs are none, and the test tests nothing
  assert sum(counts.values()) < len(hostile.RESPONSES) / 3
  assert not any(task.counters().values())
  assert task.grade(problem, RIGHT["math"], finished=True) == Grade(1.0, r"\pi+84848.4")
  assert not list(tmp_path.iterdir())
  task.close()
