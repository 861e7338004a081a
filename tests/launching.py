"""What the tests of launch/ share: calls of its scripts, and stand-ins for programs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TRAIN = ["--config", "configs/laptop_tree.yaml", "--set", "prompts.text=a b's"]
RUN_DIR = ["--run-dir", "runs/x"]

TPU = ["--name", "pod", "--zone", "z", "--type", "v5litepod-16", "--version", "v2"]
BUCKET = ["--bucket", "b", "--run", "tree"]


def environment(**more):
  """Ours, without what an outer launcher or test run has set."""
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("SPO_", "SLURM_", "XLA_"))}
  return {**clean, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable, **more}


def launch(script, *arguments, **more):
  # From elsewhere, but for the one that sbatch copies: it is called in the repository root.
  cwd = ROOT if script == "slurm_job.sh" else "/"
  return subprocess.run(
    [LAUNCH / script, *map(str, arguments)], capture_output=True, text=True, timeout=60,
    env=environment(**more), cwd=cwd,
  )  # fmt: skip


def program(path, body):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/bash\n{body}\n")
  path.chmod(0o755)
  return str(path)


def words_of(line):
  """The words of a printed command, as bash reads them ($'a\\nb' too, which shlex does not)."""
  script = f"words=({line}); printf '%s\\0' \"${{words[@]}}\""
  done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
  return done.stdout.split("\0")[:-1]


def dry_run(script, *arguments, **more):
  done = launch(script, *arguments, **more)
  assert done.returncode == 0, done.stderr
  return done.stdout


def assert_refused(done, message):
  assert (done.returncode, done.stdout) == (2, "")
  assert message in done.stderr and done.stderr.count("\n") == 1


def fake_programs(folder, **programs):
  """The PATH on which these stand in for the real ones."""
  for name, body in programs.items():
    program(folder / name, body)
  return f"{folder}:{os.environ['PATH']}"
