"""The run directory survives kills, and says what happened to people and programs."""

import contextlib
import errno
import io
import json
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax import runlog
from spo_jax.config import ConfigError
from spo_jax.runlog import RunLog, final_table, plain, progress, read_metrics


def strict_lines(path):
  """Parses JSON lines, refusing the NaN and Infinity that json would write and nobody reads."""

  def refuse(name):
    raise AssertionError(f"{name} is not JSON")

  return [
    json.loads(line, parse_constant=refuse)
    for line in path.read_text().removesuffix("\n").split("\n")
  ]


def test_a_run_directory_has_the_files_of_the_contract(tmp_path):
  with RunLog(tmp_path / "a" / "run") as log:
    log.write_config("seed: 3\n")
    log.log(0, {"eval/greedy_accuracy": 0.25})
    log.log(1, {"rollout/reward_mean": 0.5, "compile/count": 7})
    log.log_samples(1, [{"prompt": "1+1=", "response": "#2", "reward": 1.0, "finished": True}])
    log.write_summary({"iterations": 1, "initial": {"greedy_accuracy": np.float32(0.25)}})
  run = tmp_path / "a" / "run"
  assert (run / "config.yaml").read_text() == "seed: 3\n"
  assert strict_lines(run / "metrics.jsonl") == [
    {"eval/greedy_accuracy": 0.25, "iteration": 0},
    {"rollout/reward_mean": 0.5, "compile/count": 7, "iteration": 1},
  ]
  assert strict_lines(run / "samples" / "iteration_000001.jsonl") == [
    {"prompt": "1+1=", "response": "#2", "reward": 1.0, "finished": True}
  ]
  assert json.loads((run / "summary.json").read_text()) == {
    "iterations": 1,
    "initial": {"greedy_accuracy": 0.25},
  }
  assert list((run / "tensorboard").glob("events.out.tfevents.*"))


def test_values_become_valid_json_whatever_they_are(tmp_path):
  with RunLog(tmp_path) as log:
    log.log(
      2,
      {
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "jax": jnp.float32(0.5),
        "bf16": jnp.bfloat16(1.5),
        "one": np.array([1.0]),
        "list": jnp.array([1.0, jnp.nan]),
        "int": np.int64(3),
        "bool": np.bool_(True),
        "text": "a\u2028\nb",
        "none": None,
        "deep": {"pair": (np.float64("-inf"), 2)},
        "iteration": 99,
      },
    )
  assert strict_lines(tmp_path / "metrics.jsonl") == [
    {
      "nan": None,
      "inf": None,
      "jax": 0.5,
      "bf16": 1.5,
      "one": 1.0,
      "list": [1.0, None],
      "int": 3,
      "bool": True,
      "text": "a\u2028\nb",
      "none": None,
      "deep": {"pair": [None, 2]},
      "iteration": 2,
    }
  ]
  assert read_metrics(tmp_path)[0]["text"] == "a\u2028\nb"


def test_a_value_that_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path):
  with RunLog(tmp_path) as log, pytest.raises(TypeError, match=r"cannot log .*set"):
    log.log(0, {"a": {1, 2}})
  assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("torn", [b'{"iteration": 3, "x": 0.', b'{"iteration": 3}', b"\xff\x00"])
def test_a_torn_last_line_is_dropped_when_the_directory_is_opened_again(tmp_path, torn):
  metrics = tmp_path / "metrics.jsonl"
  metrics.write_bytes(b'{"iteration": 1}\n{"iteration": 2}\n' + torn)
  assert [record["iteration"] for record in read_metrics(tmp_path)] == [1, 2]
  with RunLog(tmp_path) as log:
    log.log(3, {"x": 1})
  assert strict_lines(metrics) == [{"iteration": 1}, {"iteration": 2}, {"x": 1, "iteration": 3}]


def test_a_record_is_on_the_disk_when_log_returns_even_after_sigkill(tmp_path):
  code = (
    "import sys; from spo_jax.runlog import RunLog\nlog = RunLog(sys.argv[1])\n"
    "for i in range(10**9):\n  log.log(i, {'x': 'y' * 500}); print(i, flush=True)"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
  )
  for _ in range(30):
    process.stdout.readline()
  process.send_signal(signal.SIGKILL)
  printed = 29 + len(process.communicate()[0].split())
  RunLog(tmp_path).close()
  logged = [record["iteration"] for record in strict_lines(tmp_path / "metrics.jsonl")]
  assert logged == list(range(len(logged)))
  assert len(logged) > printed


def test_every_record_is_forced_to_the_disk_before_the_next_step(tmp_path, monkeypatch):
  forced = []
  with RunLog(tmp_path) as log, monkeypatch.context() as patch:
    patch.setattr(runlog.os, "fsync", lambda _: forced.append(len(read_metrics(tmp_path))))
    log.log(0, {})
    log.log(1, {})
  assert forced == [1, 2]


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path):
  with RunLog(tmp_path) as log:
    for i in range(6):
      log.log(i, {"x": i / 3})
      log.log_samples(i, [{"prompt": str(i)}])
  before = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
  (tmp_path / "samples" / "notes.txt").write_text("mine")
  with RunLog(tmp_path) as log:
    log.resume_at(3)
    assert (tmp_path / "metrics.jsonl").read_bytes().split(b"\n") == [*before[:4], b""]
    log.log(4, {"x": -1})
  assert [record["x"] for record in read_metrics(tmp_path)][3:] == [1.0, -1]
  assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
    *(f"iteration_{i:06d}.jsonl" for i in range(4)),
    "notes.txt",
  ]


def test_resume_before_the_start_leaves_an_empty_run(tmp_path):
  with RunLog(tmp_path) as log:
    log.log(0, {"x": 1})
    log.log_samples(0, [])
  with RunLog(tmp_path) as log:
    log.resume_at(-1)
  assert (tmp_path / "metrics.jsonl").read_bytes() == b""
  assert not list((tmp_path / "samples").iterdir())


def tensorboard_events(path):
  """The events of one file, as tensorboardX understands them; checksums must fit."""
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.record_writer import masked_crc32c

  data, events = path.read_bytes(), []
  while data:
    length, length_sum = struct.unpack_from("<QI", data)
    message = data[12 : 12 + length]
    assert length_sum == masked_crc32c(data[:8])
    assert struct.unpack_from("<I", data, 12 + length) == (masked_crc32c(message),)
    events.append(Event.FromString(message))
    data = data[16 + length :]
  return events


def test_tensorboard_gets_finite_numbers_and_is_told_what_a_resume_took_back(tmp_path):
  with RunLog(tmp_path) as log:
    log.resume_at(3)
    log.log(4, {"loss/policy": 0.5, "nan": float("nan"), "text": "a"})
    log.log(300, {"count": -3, "µ": 1e10})
  [path] = (tmp_path / "tensorboard").iterdir()
  events = tensorboard_events(path)
  scalars = [
    (event.step, value.tag, value.simple_value) for event in events for value in event.summary.value
  ]
  assert scalars == [(4, "loss/policy", 0.5), (300, "count", -3), (300, "µ", 1e10)]
  assert all(abs(event.wall_time - time.time()) < 60 for event in events)
  starts = [event.step for event in events if event.HasField("session_log")]
  assert starts == [4]


def test_without_tensorboardx_one_warning_is_printed(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with RunLog(tmp_path) as log:
    log.log(0, {"x": 1})
    log.log(1, {"x": 2})
  assert capsys.readouterr().err.count("\n") == 1
  assert len(read_metrics(tmp_path)) == 2


def test_wandb_is_imported_only_when_asked_for(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  RunLog(tmp_path).close()
  with pytest.raises(ValueError, match="wandb is not installed"):
    RunLog(tmp_path, wandb_project="spo")
  calls = []
  run = types.SimpleNamespace(
    log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finish")
  )
  pages = []

  def init(project, **options):
    calls.append(project)
    pages.append((options["id"], options["resume"]))
    return run

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  for _ in range(2):  # a resumed run goes on in its own page
    with RunLog(tmp_path, wandb_project="spo") as log:
      log.log(3, {"x": 1, "y": float("inf")})
  assert calls == ["spo", ({"x": 1}, 3), "finish"] * 2
  RunLog(tmp_path / "other", wandb_project="spo").close()
  assert pages[0] == pages[1] != pages[2] and pages[0][1] == "allow"


def test_a_mount_that_renames_no_folders_is_named_before_a_run_begins(tmp_path, monkeypatch):
  runlog.assert_renames(tmp_path)

  def refuse(*_):
    raise OSError(errno.EMFILE, "Too many open files")

  with monkeypatch.context() as patch, pytest.raises(ConfigError, match="no folder can be renamed"):
    patch.setattr(Path, "rename", refuse)
    runlog.assert_renames(tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_a_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "summary.json"
  runlog.write_atomic(path, "old")

  def killed(_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(runlog.os, "fsync", killed)
    runlog.write_atomic(path, "new")
  assert path.read_text() == "old"
  runlog.write_atomic(path, "new")
  assert path.read_text() == "new"


def test_samples_hold_any_model_text(tmp_path):
  hostile = '\ud800</script>\u2028\n\0"\\' + "9" * 100_000
  with RunLog(tmp_path) as log:
    log.log_samples(12, [{"response": hostile}])
  assert strict_lines(tmp_path / "samples" / "iteration_000012.jsonl") == [{"response": hostile}]


def test_final_table_shows_accuracies_cost_and_the_whole_path(capsys):
  summary = {
    "initial": {"greedy_accuracy": 0.371, "sampled_accuracy": np.float32(0.25)},
    "final": {"greedy_accuracy": 0.912, "sampled_accuracy": None},
    "iterations": 60,
    "seconds": 312.4,
    "tokens": 1_923_456,
  }
  directory = "/runs/[bold]/" + "long" * 20
  final_table(summary, directory)
  text = capsys.readouterr().out
  assert all(part in text for part in ("0.371", "0.912", "0.250", "–", "5 min 12 s", "1.92 M"))
  assert f"Run directory: {directory}\n" in text


def test_progress_off_a_terminal_is_one_plain_line_per_step(capsys):
  with progress("SPO-chain", total=60, start=10) as bar:
    bar.advance(reward=np.float32(0.41), greedy=0.8)
    bar.advance(steps=2, reward=None, rows=128)
  lines = re.sub(r"\(\d\.\d s\)", "(TIME)", capsys.readouterr().out).splitlines()
  assert lines == [
    "SPO-chain 11/60 reward 0.410 greedy 0.800 (TIME)",
    "SPO-chain 13/60 reward – rows 128 (TIME)",
  ]


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_on_a_terminal_is_a_live_bar_with_the_latest_figures(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stdout", terminal)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "200")
  with progress("SPO [tree]", total=60, start=10) as bar:
    bar.advance(reward=0.41, greedy=0.8)
    bar.advance(reward=0.5)
    time.sleep(0.15)
  text = terminal.getvalue()
  assert "\x1b[" in text and "SPO [tree]" in text and "12/60" in text
  assert "reward 0.500 greedy 0.800" in text


def test_progress_stops_when_the_work_fails(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stdout", terminal)
  monkeypatch.setenv("TERM", "xterm")
  with pytest.raises(RuntimeError), progress("run", total=3):
    raise RuntimeError
  assert terminal.getvalue().endswith("\x1b[?25h")  # The cursor is shown again.


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0.04, "0.0 s"),
    (7.26, "7.3 s"),
    (59.96, "1 min 00 s"),
    (312.4, "5 min 12 s"),
    (3599.7, "1 h 00 min"),
    (7500, "2 h 05 min"),
  ],
)
def test_durations_read_well(value, text):
  assert runlog.format_seconds(value) == text


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0, "0"),
    (950, "950"),
    (0.25, "0.25"),
    (81_300, "81.3 k"),
    (1_923_456, "1.92 M"),
    (3e9, "3 G"),
    (-2000, "-2 k"),
    (999_499, "999 k"),
    (999_712, "1 M"),
  ],
)
def test_counts_read_well(value, text):
  assert runlog.format_count(value) == text


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0.0, "0.000"),
    (0.41, "0.410"),
    (2e-4, "2.0e-04"),
    (3, "3"),
    (None, "–"),
    (float("nan"), "–"),
    (jnp.float32(0.5), "0.500"),
    ("step", "step"),
  ],
)
def test_figures_read_well(value, text):
  assert runlog.format_figure(value) == text


def test_plain_leaves_python_values_alone():
  assert plain({"a": [1, 2.5, "x", None, True]}) == {"a": [1, 2.5, "x", None, True]}


@contextlib.contextmanager
def full_disk(size):
  """Files that have reached this many bytes cannot grow in here."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("tensorboard", [True, False])  # its file is the larger, and fills first
def test_a_full_disk_is_heard_of_and_halves_no_record_for_good(tmp_path, tensorboard):
  logged = 0
  with RunLog(tmp_path, tensorboard=tensorboard) as log, full_disk(2000):
    with pytest.raises(OSError, match="File too large"):
      for i in range(200):
        log.log(i, {f"a/{x}": x / 3 for x in range(5)})
        logged += 1
  with RunLog(tmp_path, tensorboard=tensorboard) as log:
    log.resume_at(logged - 1)
    log.log(logged, {})
  assert [r["iteration"] for r in strict_lines(tmp_path / "metrics.jsonl")] == [*range(logged + 1)]
  assert logged > 5


def test_a_file_that_finds_no_space_keeps_its_old_content(tmp_path):
  runlog.write_atomic(tmp_path / "a", "old")
  with full_disk(100), pytest.raises(OSError):
    runlog.write_atomic(tmp_path / "a", "new" * 100)
  assert (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("error", [
  ValueError("RESOURCE_EXHAUSTED: Error writing\nFailed to write 11602 bytes to file 8: "
             "No space left on device [os_error_code='28']"),
  OSError(28, "No space left on device", "file"),
])  # fmt: skip
def test_what_libraries_say_of_a_full_disk_becomes_one_line(tmp_path, error):
  with pytest.raises(OSError, match="No space left") as raised, runlog.writing(tmp_path / "x"):
    raise error
  assert str(tmp_path / "x") in str(raised.value) and "\n" not in str(raised.value)


def test_other_errors_of_libraries_are_left_alone(tmp_path):
  error = ValueError("shapes differ")
  with pytest.raises(ValueError) as raised, runlog.writing(tmp_path):
    raise error
  assert raised.value is error


def test_no_event_files_are_written_where_tensorboard_is_off(tmp_path):
  for wanted in (True, False):
    with RunLog(tmp_path / str(wanted), tensorboard=wanted) as log:
      log.log(0, {"loss/policy": 1.0})
    assert (tmp_path / str(wanted) / "tensorboard").exists() == wanted
    assert read_metrics(tmp_path / str(wanted)) == [{"loss/policy": 1.0, "iteration": 0}]
