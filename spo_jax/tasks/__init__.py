"""Tasks by name. Adding one is one file with a `Task` in it and one line in `LOADERS`."""

import dataclasses
from collections.abc import Callable

from spo_jax.tasks.arithmetic import Arithmetic
from spo_jax.tasks.base import SPLITS, Grade, Problem, Task, question_order, unknown_name

__all__ = ["LOADERS", "SPLITS", "Grade", "Problem", "Task", "TaskOptions", "load_task",
           "question_order"]


@dataclasses.dataclass(frozen=True)
class TaskOptions:
  """What a loader may use: `path` of a dataset's files, `operations` of a generated problem,
  `unfinished_penalty` in reward units, taken off a response cut at its length limit, `seed`."""

  path: str | None
  operations: int
  unfinished_penalty: float
  seed: int


def _arithmetic(options: TaskOptions) -> Task:
  if options.path is not None:
    raise ValueError(f"task.path={options.path!r} is set, but the task 'arithmetic' is generated: "
                     "remove task.path or choose another task.name")
  return Arithmetic(options.operations, options.unfinished_penalty, options.seed)


LOADERS: dict[str, Callable[[TaskOptions], Task]] = {
    "arithmetic": _arithmetic,
}


def load_task(name: str, path: str | None, operations: int, unfinished_penalty: float,
              seed: int) -> Task:
  """The task called `name`.

  Raises: ValueError for an unknown name, or where an option does not fit the task.
  """
  if name not in LOADERS:
    raise unknown_name("task", name, LOADERS)
  return LOADERS[name](TaskOptions(path, operations, unfinished_penalty, seed))
