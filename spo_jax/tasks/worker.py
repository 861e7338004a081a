"""A process that calls one function on request: `python -m spo_jax.tasks.worker`, see pool.py.

It reads a JSON line per call from its standard input and answers each with one. It ends when its
input does, which is when the process that started it ends, for whatever reason.
"""

import importlib
import json
import math
import os
import queue
import resource
import signal
import sys
import threading
from typing import Any


def main() -> None:
  """Serves calls until the input ends."""
  # A machine that shuts down tells all processes: the trainer finishes its iteration, with answers.
  for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  replies = os.dup(1)
  os.dup2(2, 1)  # what a library prints is no reply
  requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
  threading.Thread(target=_read, args=(requests,), daemon=True).start()
  setup = requests.get()
  try:
    sys.path += [entry for entry in setup["path"] if entry not in sys.path]
    module, _, name = setup["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    function(*setup["warm_up"])
  except Exception as error:
    _reply(replies, json.dumps({"failed": f"{type(error).__name__}: {error}"[:500]}))
    return
  _limit_memory(setup["memory_bytes"])
  _reply(replies, json.dumps({"ready": True}))
  while True:
    arguments = requests.get()
    _limit_cpu(setup["cpu_s"])
    try:
      reply = json.dumps({"result": function(*arguments)})
    except MemoryError:
      os._exit(1)  # who knows what is left of its state
    except Exception as error:
      reply = json.dumps({"error": type(error).__name__})
    _reply(replies, reply)


def _read(requests: "queue.SimpleQueue[Any]") -> None:
  """Passes requests on; a thread of its own, so that the input's end stops a call too."""
  for line in sys.stdin.buffer:
    requests.put(json.loads(line))
  os._exit(0)


def _reply(file: int, reply: str) -> None:
  os.write(file, reply.encode() + b"\n")


def _limit_memory(allowed: int) -> None:
  """Lets the process grow by `allowed` bytes, and leave no core file."""
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  try:
    with open("/proc/self/statm") as statm:
      used = int(statm.read().split()[0]) * resource.getpagesize()
  except OSError:
    return  # not Linux, where address space cannot be limited usefully
  resource.setrlimit(resource.RLIMIT_AS, (used + allowed, used + allowed))


def _limit_cpu(seconds: int) -> None:
  """The kernel ends the process after that much more computing, whatever it is doing."""
  usage = resource.getrusage(resource.RUSAGE_SELF)
  limit = math.ceil(usage.ru_utime + usage.ru_stime) + seconds
  resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
  main()
