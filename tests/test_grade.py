"""python -m spo_jax.grade: what it writes, what it skips, and what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import heeding_ctrl_c

from spo_jax.grade import BATCH_LINES, NAMED_LINES, main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path, capsys):
  """Grades lines in this process; returns the exit code, OUT's objects or None, out, err."""
  source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

  def run(lines, task="gsm8k", *options):
    source.write_bytes(b"\n".join(
      line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
    ))  # fmt: skip
    code = main(["--task", task, *options, str(source), str(target)])
    said = capsys.readouterr()
    assert {path.name for path in tmp_path.iterdir()} <= {"in.jsonl", "out.jsonl"}
    written = target.read_text().splitlines() if target.exists() else None
    return code, written and [json.loads(line) for line in written], said.out, said.err

  return run


def test_each_object_gets_its_reward_and_what_was_extracted(run):
  lines = [
    {"response": "#### 18", "answer": "so\n#### 18", "id": 7, "note": "é\ud800"},
    {"answer": 18, "response": "The answer is 17."},
    {"answer": "18", "response": "none", "finished": True},
    {"answer": "18", "response": "#### 18", "finished": False},
  ]
  code, graded, out, err = run(lines)
  assert code == 0 and not err
  assert graded == [
    {**lines[0], "reward": 1.0, "extracted": "18"},
    {**lines[1], "reward": 0.0, "extracted": "17"},
    {**lines[2], "reward": 0.0, "extracted": None},
    {**lines[3], "reward": 0.0, "extracted": None},
  ]
  assert "4 graded, 0 skipped" in out and "grading gsm8k 4/4 correct 0.250" in out


@pytest.mark.parametrize(
  ("task", "line", "extracted"),
  [
    ("arithmetic", {"answer": "75", "response": "1+1=2;#75"}, "75"),
    ("game24", {"numbers": [3, 3, 8, 8], "response": r"\boxed{8/(3-8/3)}"}, "8/(3-8/3)"),
    ("countdown", {"nums": [3, 7, 25], "target": 46, "response": "Answer: 25+3*7"}, "25+3*7"),
  ],
)
def test_every_task_grades_by_its_own_fields(run, task, line, extracted):
  code, graded, _, _ = run([line], task)
  assert (code, graded) == (0, [{**line, "reward": 1.0, "extracted": extracted}])


def test_mathematics_is_graded_in_workers(run):
  pytest.importorskip("math_verify")
  code, graded, _, _ = run([
    {"answer": r"\frac{1}{2}", "response": r"\boxed{0.5}"},
    {"solution": r"\boxed{3}", "response": r"\boxed{1+1}"},
  ], "math")  # fmt: skip
  assert code == 0 and [line["reward"] for line in graded] == [1.0, 0.0]


def test_penalties_are_options(run):
  lines = [
    {"answer": "1", "response": "#### 1", "finished": False},
    {"answer": "1", "response": "#### 2 #### 1"},
  ]
  options = ("--unfinished-penalty", "0.5", "--repeat-penalty", "2")
  assert [line["reward"] for line in run(lines, "gsm8k", *options)[1]] == [-0.5, -1.0]


def test_bad_lines_are_skipped_counted_and_named(run):
  good = {"answer": "1", "response": "#### 1"}
  lines = [
    good, b"", b"   ", b"{broken", b"[]", {"response": "#### 1"}, {"answer": "1"},
    {"answer": "1", "response": None}, {**good, "finished": "yes"}, b"\xff", b"[" * 100_000, good,
  ]  # fmt: skip
  code, graded, out, err = run(lines)
  assert code == 0 and len(graded) == 2
  assert "2 graded, 8 skipped" in out
  named = err.splitlines()
  assert [line.split(":")[1] for line in named] == ["4", "5", "6", "7", "8", "9", "10", "11"]
  assert named[2] == "in.jsonl:6: skipped: field 'answer' is missing"
  assert named[3] == "in.jsonl:7: skipped: field 'response' is missing or no text"
  assert "field 'finished'" in named[5]


def test_very_many_bad_lines_do_not_flood_the_terminal(run):
  code, graded, out, err = run([b"x"] * 500 + [{"answer": "1", "response": "#### 1"}])
  assert code == 0 and len(graded) == 1 and "500 skipped" in out
  assert len(err.splitlines()) == NAMED_LINES


def test_the_order_is_kept_over_batches(run):
  lines = [{"answer": str(i), "response": f"#### {i}", "i": i} for i in range(2 * BATCH_LINES + 1)]
  _, graded, _, _ = run(lines)
  assert [line["i"] for line in graded] == list(range(2 * BATCH_LINES + 1))
  assert all(line["reward"] == 1 for line in graded)


@pytest.mark.parametrize("lines", [[], [b"x", b"{}"]])
def test_nothing_to_grade_is_a_failure_that_writes_nothing(run, lines):
  code, graded, _, err = run(lines)
  assert code == 1 and graded is None
  assert "has no line that can be graded" in err.splitlines()[-1]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--task", "gsm8", "IN", "OUT"], "did you mean 'gsm8k'"),
    (["--task", "gsm8k", "missing.jsonl", "OUT"], "missing.jsonl is not a file"),
    (["--task", "gsm8k", "folder", "OUT"], "folder is not a file"),
    (["--task", "gsm8k", "IN", "folder"], "folder cannot be written"),
    (["--task", "gsm8k", "IN", "missing/OUT"], "missing/OUT cannot be written"),
    (["--task", "gsm8k", "IN", "IN"], "never overwritten"),
    (["--task", "gsm8k", "IN", "./folder/../IN"], "never overwritten"),
    (["--task", "gsm8k", "IN", "LINK"], "never overwritten"),
    (["--task", "gsm8k", "IN", "PIPE"], "PIPE is no regular file"),
    (["--task", "gsm8k", "IN", "LOOP"], "LOOP cannot be written"),
    (["--task", "gsm8k", "IN", "GONE"], "GONE cannot be written"),
    (["--task", "gsm8k", "IN", "/dev/null"], "/dev/null is no regular file"),
    (["--task", "gsm8k", "--repeat-penalty", "-1", "IN", "OUT"], "task.repeat_penalty=-1.0"),
  ],
)
def test_wrong_usage_is_one_line_and_code_two(tmp_path, monkeypatch, capsys, arguments, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "folder").mkdir()
  content = json.dumps({"answer": "1", "response": "#### 1"})
  (tmp_path / "IN").write_text(content)
  os.link(tmp_path / "IN", tmp_path / "LINK")
  os.mkfifo(tmp_path / "PIPE")
  (tmp_path / "LOOP").symlink_to("LOOP")
  (tmp_path / "GONE").symlink_to("missing/OUT")
  assert main(arguments) == 2
  error = capsys.readouterr().err
  assert message in error and error.startswith("error: ") and error.count("\n") == 1
  assert (tmp_path / "IN").read_text() == content
  assert not (tmp_path / "OUT").exists()


def test_a_link_stays_one_and_its_file_is_written(tmp_path):
  (tmp_path / "IN").write_text(json.dumps({"answer": "1", "response": "#### 1"}))
  (tmp_path / "folder").mkdir()
  (tmp_path / "OUT").symlink_to(tmp_path / "folder" / "there")
  assert main(["--task", "gsm8k", str(tmp_path / "IN"), str(tmp_path / "OUT")]) == 0
  assert (tmp_path / "OUT").is_symlink()
  assert json.loads((tmp_path / "folder" / "there").read_text())["reward"] == 1


@pytest.mark.parametrize("arguments", [[], ["--task", "gsm8k"], ["--task", "gsm8k", "IN"]])
def test_missing_arguments_have_code_two(arguments, capsys):
  with pytest.raises(SystemExit) as stopped:
    main(arguments)
  assert stopped.value.code == 2
  assert capsys.readouterr().err.startswith("usage:")


def children(pid):
  task = Path(f"/proc/{pid}/task/{pid}/children")
  return [int(child) for child in task.read_text().split()] if task.exists() else []


def gone(pid):
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
  except OSError:
    return True


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopping_leaves_no_worker_and_no_half_file(tmp_path, ending):
  pytest.importorskip("math_verify")
  old = '{"old": true}\n'
  (tmp_path / "out.jsonl").write_text(old)
  bombs = [{"answer": r"\pi", "response": rf"\boxed{{{99_999_900 + i}!}}"} for i in range(40)]
  (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, bombs)))
  command = [sys.executable, "-m", "spo_jax.grade", "--task", "math", "in.jsonl", "out.jsonl"]
  paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  with heeding_ctrl_c():
    process = subprocess.Popen(
      command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
  end = time.monotonic() + 60
  while not (workers := children(process.pid)) and time.monotonic() < end:
    time.sleep(0.05)
  assert workers
  time.sleep(2.5)  # the first bombs are being worked on
  workers = children(process.pid)
  process.send_signal(ending)
  _, error = process.communicate(timeout=20)
  assert process.returncode in (128 + ending, -ending)
  assert "Traceback" not in error
  while not all(map(gone, workers)) and time.monotonic() < end:
    time.sleep(0.05)
  assert all(map(gone, workers))
  assert (tmp_path / "out.jsonl").read_text() == old
  if ending != signal.SIGKILL:
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
