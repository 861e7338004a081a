"""Grading processes that hang, die, lie or eat memory, and what is left of them."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from spo_jax.tasks.pool import WorkerPool

ROOT = Path(__file__).parents[1]


def obey(text, argument=""):
  """Runs in a worker, and does whatever a hostile text could make a grader do."""
  match text:
    case "sleep":
      time.sleep(600)
    case "compute":
      return len(str(pow(9, 9**9)))  # one operation, deaf to signals that Python would handle
    case "spin":
      while True:
        pass
    case "die":
      os.kill(os.getpid(), signal.SIGKILL)
    case "exit":
      os._exit(0)
    case "raise":
      raise ValueError("\ud800 no")
    case "recurse":
      return obey(text, argument)
    case "eat":
      return len(bytearray(int(argument)))
    case "allocate":  # past every handler of Exception, as a library may
      try:
        return len(bytearray(int(argument)))
      except MemoryError:
        return "survived"
    case "print":
      print('{"result": "forged"}', flush=True)
      os.write(1, b'{"result": "forged"}\n')
    case "flood":
      return "x" * 1_000_000
    case "unserialisable":
      return {1, 2}
    case "wait":
      time.sleep(float(argument))
    case "modules":
      return sorted({"jax", "numpy", "test_tasks_pool"} & set(sys.modules))
    case "pid":
      return os.getpid()
  return text + argument


def refuse_to_start(text):
  raise OSError("no library here")


def end_at_once(text):
  os._exit(3)


@pytest.fixture
def pool():
  pool = WorkerPool(obey, 2, warm_up=["warm", "up"], timeout_s=2.0, cpu_s=1)
  yield pool
  pool.close()


def alive(pid):
  """Whether the process runs; one that only waits to be buried does not."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


def wait_until(condition, seconds):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.05)
  return condition()


def test_results_come_in_the_order_of_the_calls(pool):
  calls = [(str(i), "!") for i in range(200)]
  assert pool.map(calls) == [f"{i}!" for i in range(200)]
  assert pool.map([]) == []
  assert len(pool.pids()) == 2
  assert pool.counters() == {"timeouts": 0, "crashes": 0, "errors": 0}


def test_any_text_passes_to_a_worker_and_back_unchanged(pool):
  texts = ["", "\0", "\n", "\ud800", "\udfff\ud800", "é٣\u2028", "\U0001f600" * 1000, '"}\n{"']
  assert pool.map([(text,) for text in texts]) == texts


@pytest.mark.parametrize(
  ("text", "count"),
  [
    ("sleep", "timeouts"),
    ("spin", "timeouts"),
    ("compute", "timeouts"),
    ("die", "crashes"),
    ("exit", "crashes"),
    ("flood", "crashes"),
    ("raise", "errors"),
    ("recurse", "errors"),
    ("unserialisable", "errors"),
  ],
)
def test_a_bad_call_costs_only_itself(pool, text, count):
  start = time.monotonic()
  assert pool.map([("before",), (text,), ("after",)]) == ["before", None, "after"]
  assert time.monotonic() - start < 30
  expected = {"timeouts": 0, "crashes": 0, "errors": 0} | {count: 1}
  assert pool.counters() == expected
  assert pool.map([("again",)] * 4) == ["again"] * 4
  assert all(map(alive, pool.pids()))
  assert not any(pool.counters().values())


@pytest.mark.parametrize("text", ["spin", "compute"])
def test_computing_is_limited_whatever_the_clock_says(text):
  pool = WorkerPool(obey, 1, warm_up=["warm"], timeout_s=200.0, cpu_s=1)
  start = time.monotonic()
  assert pool.map([(text,)]) == [None]
  assert time.monotonic() - start < 100
  assert pool.counters() == {"timeouts": 1, "crashes": 0, "errors": 0}
  pool.close()


def test_memory_is_limited(pool):
  assert pool.map([("eat", str(2**28))]) == [2**28]
  assert pool.map([("eat", str(2**32))]) == [None]
  assert pool.counters()["crashes"] == 1
  assert pool.map([("allocate", str(2**32))]) == ["survived"]


def test_what_a_library_prints_is_no_result(pool):
  assert pool.map([("print",), ("next",)]) == ["print", "next"]


def test_many_bad_calls_do_not_stall(pool):
  calls = [("die",), ("ok",), ("raise",), ("exit",)] * 3
  assert pool.map(calls) == [None, "ok", None, None] * 3
  assert pool.counters() == {"timeouts": 0, "crashes": 6, "errors": 3}


def test_a_worker_killed_from_outside_in_the_middle_is_replaced(pool):
  pool.map([("warm",)] * 2)
  first, second = pool.pids()
  threading.Timer(0.5, os.kill, (first, signal.SIGKILL)).start()
  results = pool.map([("wait", "1.0"), ("wait", "1.1"), ("after",)])
  assert sorted(map(str, results)) == ["None", "after", "wait1.0" if results[0] else "wait1.1"]
  assert pool.counters()["crashes"] == 1
  assert first not in pool.pids() and second in pool.pids()


def test_a_worker_killed_while_idle_costs_no_result(pool):
  pool.map([("warm",)] * 2)
  for pid in pool.pids():
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # until its last thread has let go of pipes
  assert pool.map([("a",), ("b",), ("c",)]) == ["a", "b", "c"]


def test_no_more_workers_than_calls_and_they_stay(pool):
  (first,) = pool.map([("pid",)])
  assert pool.pids() == [first]
  assert pool.map([("pid",)]) == [first]


def test_workers_load_neither_jax_nor_the_callers_main_module(pool):
  assert pool.map([("modules",)]) == [["numpy", "test_tasks_pool"]]


def test_an_interrupted_map_leaves_no_stale_result(pool):
  pool.map([("warm",)] * 2)
  busy = pool.pids()

  def interrupt(*_):
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGALRM, interrupt)
  signal.setitimer(signal.ITIMER_REAL, 0.3)
  try:
    with pytest.raises(KeyboardInterrupt):
      pool.map([("wait", "1"), ("wait", "1")])
  finally:
    signal.signal(signal.SIGALRM, before)
  assert not any(map(alive, busy))
  assert pool.map([("x",), ("y",)]) == ["x", "y"]


def test_closing_ends_all_workers_and_the_pool_can_be_used_again(pool):
  pool.map([("warm",)] * 2)
  pids = pool.pids()
  pool.close()
  assert not pool.pids() and not any(map(alive, pids))
  assert pool.map([("again",)]) == ["again"]


def test_workers_that_cannot_start_are_an_error_that_says_why():
  with pytest.raises(RuntimeError, match="cannot start: OSError: no library here"):
    WorkerPool(refuse_to_start, 2, warm_up=["x"]).map([("y",)])
  with pytest.raises(RuntimeError, match="3 times in a row"):
    WorkerPool(end_at_once, 2, warm_up=["x"]).map([("y",)])


@pytest.mark.parametrize(
  ("state", "ending"),
  [
    ("idle", signal.SIGKILL),
    ("sleep", signal.SIGTERM),
    ("spin", signal.SIGKILL),
    ("compute", signal.SIGKILL),
  ],
)
def test_workers_die_with_their_parent(state, ending):
  program = textwrap.dedent(f"""
    import sys, time
    sys.path += [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
    from test_tasks_pool import obey
    from spo_jax.tasks.pool import WorkerPool
    pool = WorkerPool(obey, 1, ["warm"], timeout_s=60, cpu_s=1)
    pool.map([("x",)])
    print(*pool.pids(), flush=True)
    pool.map([({state!r},)]) if {state!r} != "idle" else time.sleep(60)
  """)
  parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
  pids = [int(pid) for pid in re.findall(r"\d+", parent.stdout.readline())]
  assert len(pids) == 1 and alive(pids[0])
  time.sleep(0.3)  # it has begun
  parent.send_signal(ending)
  parent.communicate(timeout=10)
  assert wait_until(lambda: not alive(pids[0]), 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_calls_are_answered_though_the_machine_tells_all_processes_to_end(pool, number):
  pool.map([("pid",)] * 2)  # both have started
  told = threading.Timer(0.3, lambda: [os.kill(pid, number) for pid in pool.pids()])
  told.start()
  assert pool.map([("wait", "0.8"), ("wait", "1.0")]) == ["wait0.8", "wait1.0"]
  told.join()
  assert pool.counters()["crashes"] == 0
