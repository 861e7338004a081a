"""Tasks by name. Adding one is one file with a `Task` in it and one line in `LOADERS`."""

from collections.abc import Callable

from spo_jax.config import TaskConfig
from spo_jax.tasks.arithmetic import Arithmetic
from spo_jax.tasks.base import SPLITS, Grade, Problem, Task, question_order, unknown_name
from spo_jax.tasks.countdown import Countdown
from spo_jax.tasks.game24 import Game24
from spo_jax.tasks.gsm8k import GSM8K
from spo_jax.tasks.math import Math

__all__ = ["LOADERS", "SPLITS", "Grade", "Problem", "Task", "load_task", "question_order"]

LOADERS: dict[str, Callable[[TaskConfig, int], Task]] = {
  "arithmetic": Arithmetic,
  "gsm8k": GSM8K,
  "math": Math,
  "game24": Game24,
  "countdown": Countdown,
}


def load_task(task: TaskConfig, seed: int) -> Task:
  """The task called `task.name`. Its data is read when a split is asked for.

  Raises: ValueError for an unknown name, or where an option does not fit the task.
  """
  if task.name not in LOADERS:
    raise unknown_name("task", task.name, LOADERS)
  return LOADERS[task.name](task, seed)
