"""launch/tpu_vm.sh and tpu_worker.sh, with stand-ins for gcloud, gcsfuse, git and the trainer."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from launching import (
  BUCKET,
  LAUNCH,
  TPU,
  TRAIN,
  assert_refused,
  dry_run,
  fake_programs,
  launch,
  program,
  words_of,
)


def on_worker(command, *arguments):
  """What tpu_vm.sh has a worker run last."""
  return words_of(dry_run("tpu_vm.sh", command, "--dry-run", *TPU, *arguments))[-1]


@pytest.mark.parametrize("command", [["setup"], ["run", *BUCKET, *TRAIN]])
def test_tpu_refuses_what_is_not_committed_and_ships_a_commit(tmp_path, command):
  git = (
    'echo "git $*" >>"$T/git"\n'
    'case $1 in\nstatus) cat "$T/changed" ;;\nrev-parse) echo c0de ;;\nesac'
  )
  path = fake_programs(tmp_path / "bin", gcloud="echo READY", git=git, mkdir="")
  command, more = [command[0], *TPU, *command[1:]], dict(PATH=path, T=str(tmp_path))
  (tmp_path / "changed").write_text(" M configs/a.yaml\n?? spo_jax/b.py\n")
  assert_refused(launch("tpu_vm.sh", *command, **more), " M configs/a.yaml, ?? spo_jax/b.py")
  if command[0] == "run":
    unknown = 'case $1 in\nls-files) exit 1 ;;\nesac'
    elsewhere = fake_programs(tmp_path / "other", gcloud="echo READY", git=unknown)
    refused = launch("tpu_vm.sh", *command, PATH=elsewhere)
    assert_refused(refused, f"--config '{TRAIN[1]}' is not in git")
  assert dry_run("tpu_vm.sh", command[0], "--dry-run", *command[1:], **more)
  (tmp_path / "changed").write_text("")
  assert launch("tpu_vm.sh", *command, **more).returncode == 0
  *_, asked, _, archive = (tmp_path / "git").read_text().splitlines()
  assert asked.startswith("git status --porcelain -- spo_jax configs launch ")
  assert asked.endswith(TRAIN[1] if command[0] == "run" else "requirements.txt")
  assert archive.startswith("git archive") and archive.endswith(" c0de")


@pytest.mark.parametrize("apt", ["knows gcsfuse", "does not"])
def test_tpu_setup_installs_gcsfuse_and_the_pinned_requirements(tmp_path, apt):
  command = on_worker("setup")
  logged = 'echo "${0##*/} $*" >>"$HOME/log"'
  path = tmp_path / "bin"
  fake_programs(path, tar="", python3="", sudo=f"{logged}; [[ '{apt}' == knows* ]]")
  program(tmp_path / ".local" / "bin" / "uv", logged)
  for name in ("bash", "mkdir"):
    (path / name).symlink_to(shutil.which(name))
  done = subprocess.run(
    ["bash", "-c", command], cwd=tmp_path, env={"HOME": str(tmp_path), "PATH": str(path)},
    capture_output=True, text=True,
  )  # fmt: skip
  log = (tmp_path / "log").read_text().splitlines()
  apt_get = "sudo apt-get -o DPkg::Lock::Timeout=600 -qy"
  assert log[0] == f"{apt_get} update"
  if apt == "does not":
    assert (done.returncode, log[1:]) == (1, [])
    assert "docs/launch.md" in done.stderr and done.stderr.count("\n") == 1
  else:
    assert done.returncode == 0, done.stderr
    assert log[1] == f"{apt_get} install gcsfuse"
    assert log[-1].endswith(" --python .venv/bin/python -c requirements.txt -e .[tpu,math]")


def test_tpu_dry_run_creates_copies_installs_trains_and_deletes():
  out = dry_run("tpu_vm.sh", "run", "--dry-run", "--spot", *TPU, *BUCKET, *TRAIN)
  verbs = re.findall(r"^gcloud compute tpus tpu-vm (\w+)", out, re.M)
  assert verbs == ["create", "scp", "ssh", "ssh", "describe", "delete"]
  lines = [words_of(line) for line in out.splitlines() if line.startswith("gcloud")]
  assert {"--spot", "--accelerator-type", "v5litepod-16", "--version", "v2"} < set(lines[0])
  assert all({"pod", "z"} < set(line) for line in lines if line[4] != "scp")
  assert all("--worker=all" in line for line in lines[1:4])
  assert "git archive --format=tar.gz -o build/spo_jax.tar.gz HEAD\n" in out


class Worker:
  """A home in which launch/tpu_worker.sh runs as on a slice."""

  def __init__(self, home):
    self.home, self.connections = home, []
    for name in ("tpu_worker.sh", "lib.sh"):
      (home / "spo_jax" / "launch").mkdir(parents=True, exist_ok=True)
      shutil.copy(LAUNCH / name, home / "spo_jax" / "launch")
    path = fake_programs(
      home / "bin", mountpoint="[[ -e $HOME/mounted ]]",
      gcsfuse='printf "%s\\n" "$@" >>"$HOME/mounted"; sleep 60 <&- &>/dev/null &',  # stays
    )  # fmt: skip
    self.env = {"HOME": str(home), "PATH": path}

  def trainer(self, body):
    program(self.home / "spo_jax" / ".venv" / "bin" / "python", body)

  def connect(self, command):
    """A command that comes over a connection; killing its group breaks that."""
    self.connections.append(subprocess.Popen(
      ["bash", "-c", command], cwd=self.home, env=self.env, text=True, start_new_session=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ))  # fmt: skip
    return self.connections[-1]

  def train(self, *arguments):
    return self.connect(on_worker("train", *BUCKET, *TRAIN, *arguments))

  def call(self, command):
    connection = self.connect(command)
    out, err = connection.communicate(timeout=30)
    return subprocess.CompletedProcess(command, connection.returncode, out, err)

  def close(self):
    groups = [connection.pid for connection in self.connections]
    with contextlib.suppress(OSError, ValueError):
      groups.append(os.getpgid(int((self.home / ".spo_jax" / "pid").read_text())))
    for group in groups:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for connection in self.connections:
      connection.communicate(timeout=10)


@pytest.fixture
def worker(tmp_path):
  worker = Worker(tmp_path)
  yield worker
  worker.close()


WAIT = "until [[ -e $HOME/go ]]; do sleep 0.05; done"


def test_tpu_worker_mounts_the_bucket_and_resumes_a_run_that_exists(worker):
  names = ("PWD", "SPO_DISTRIBUTED", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
  shown = " ".join(f'"${name}"' for name in names)
  worker.trainer(f'printf "%s\\n" {shown} "$@"; echo bad >&2; cat')  # cat: there is no input
  runs = worker.home / "spo_runs"
  arguments = ["-m", "spo_jax.train", *TRAIN, "--run-dir", f"{runs}/tree"]
  environment = [f"{worker.home}/spo_jax", "auto", "tpu,cpu", f"{runs}/.jax_cache"]
  command = on_worker("train", *BUCKET, *TRAIN)
  printed = worker.call(command.replace("tpu_worker.sh", "tpu_worker.sh --dry-run")).stdout
  assert words_of(printed.splitlines()[1])[-len(arguments) :] == arguments
  assert not (worker.home / ".spo_jax").exists()
  done = worker.call(command)
  assert done.stdout.splitlines() == [*environment, *arguments, "bad"], done.stderr
  (runs / "tree").mkdir()
  (runs / "tree" / "config.yaml").touch()
  done = worker.call(command)
  assert done.stdout.splitlines() == [*environment, *arguments, "--resume", "bad"], done.stderr
  mount = ["--implicit-dirs", "--rename-dir-limit=200000", "b", str(runs)]
  assert (worker.home / "mounted").read_text().splitlines() == mount  # once
  assert words_of(printed.splitlines()[0]) == ["gcsfuse", *mount]


@pytest.mark.parametrize(
  ("body", "code"), [("exit 0", 0), ("exit 7", 7), ("exit 143", 143), ("kill -9 $$", 137)]
)
def test_tpu_worker_ends_with_the_exit_code_of_the_trainer(worker, body, code):
  worker.trainer(f"echo up; {body}")
  connection = worker.train()
  out, err = connection.communicate(timeout=30)
  assert (connection.returncode, err) == (code, "")
  assert out.startswith("up\n")


def test_tpu_worker_is_not_held_up_by_what_outlives_a_trainer(worker):
  worker.trainer("sleep 60 & echo $!; exit 7")
  for _ in range(2):
    done = worker.call(on_worker("train", *BUCKET, *TRAIN))
    os.kill(int(done.stdout), signal.SIGKILL)
    assert (done.returncode, done.stderr) == (7, "")


def test_tpu_worker_joins_the_trainer_of_a_broken_connection(worker):
  worker.trainer(f'echo start >>"$HOME/starts"; seq 30; echo up; {WAIT}; echo down; exit 7')
  first = worker.train()
  while first.stdout.readline() != "up\n":
    assert first.poll() is None
  os.killpg(first.pid, signal.SIGKILL)
  second = worker.train()
  assert "joins the trainer that is running" in second.stderr.readline()
  assert second.stdout.readline() == "12\n"
  (worker.home / "go").touch()
  assert second.stdout.read().splitlines() == [*map(str, range(13, 31)), "up", "down"]
  assert (second.wait(timeout=30), second.stderr.read()) == (7, "")
  assert (worker.home / "starts").read_text() == "start\n"


def test_tpu_worker_starts_one_trainer_for_two_calls_at_once(worker):
  worker.trainer(f'echo start >>"$HOME/starts"; echo up; {WAIT}; exit 7')
  calls = [worker.train(), worker.train()]
  assert [call.stdout.readline() for call in calls] == ["up\n", "up\n"]
  (worker.home / "go").touch()
  errors = [call.communicate(timeout=30)[1] for call in calls]
  assert [call.returncode for call in calls] == [7, 7]
  assert sorted("joins the trainer" in error for error in errors) == [False, True]
  assert (worker.home / "starts").read_text() == "start\n"


def test_tpu_worker_refuses_another_call_while_a_trainer_runs(worker):
  worker.trainer(f"echo up; {WAIT}")
  first = worker.train()
  assert first.stdout.readline() == "up\n"
  for command in (
    on_worker("train", "--bucket", "b", "--run", "chain", *TRAIN),
    on_worker("train", *BUCKET, *TRAIN, "--set", "seed=1"),
  ):
    done = worker.call(command)
    assert_refused(done, f"another call (b tree {' '.join(TRAIN[:2])} ")
    assert "launch/tpu_vm.sh stop ends it" in done.stderr
  (worker.home / "go").touch()
  assert first.communicate(timeout=30) == ("", "") and first.returncode == 0


def test_tpu_stop_reaches_the_trainer_alone(worker):
  worker.trainer(
    'while :; do sleep 0.05; done & grading=$!\n'
    'trap \'kill -0 $grading && echo "saved, grading lives"; kill -9 $grading; exit 143\' TERM\n'
    "echo up; while :; do sleep 0.05; done"
  )
  connection = worker.train()
  assert connection.stdout.readline() == "up\n"
  done = worker.call(on_worker("stop"))
  assert (done.returncode, done.stderr) == (0, "")
  assert "saves at the end of the iteration" in done.stdout
  assert connection.communicate(timeout=30) == ("saved, grading lives\n", "")
  assert connection.returncode == 143


def test_tpu_stop_is_harmless_where_nothing_runs(worker):
  stop = on_worker("stop")
  assert "no trainer is running" in worker.call(stop).stdout  # none ever was
  worker.trainer("exit 0")
  assert worker.train().wait(timeout=30) == 0
  other = worker.connect("sleep 60")  # has its number by now
  (worker.home / ".spo_jax" / "pid").write_text(f"{other.pid}\n")
  done = worker.call(stop)
  assert done.returncode == 0 and "no trainer is running" in done.stdout
  assert other.poll() is None
  shutil.rmtree(worker.home / "spo_jax")  # a slice without setup
  done = worker.call(stop)
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# A worker that shuts down sends SIGTERM to all processes.
@pytest.mark.parametrize(
  ("kill", "number", "code"), [(os.kill, signal.SIGKILL, 1), (os.killpg, signal.SIGTERM, 143)]
)
def test_tpu_worker_counts_a_lost_exit_code_as_1(worker, kill, number, code):
  worker.trainer("exit 0")  # its code must not be taken for the next one's
  assert worker.train().wait(timeout=30) == 0
  worker.trainer('trap "exit 143" TERM; echo $PPID; while :; do sleep 0.05; done')
  connection = worker.train()
  kill(int(connection.stdout.readline()), number)
  assert connection.wait(timeout=30) == code
  # Without its keeper it would go on and nobody knew: it ends too.
  trainer = (worker.home / ".spo_jax" / "pid").read_text().strip()
  assert not Path("/proc", trainer).exists() or " Z " in Path("/proc", trainer, "stat").read_text()


def test_tpu_worker_does_not_take_another_bucket_for_the_one_asked_for(worker):
  worker.trainer("exit 0")
  assert worker.train().wait(timeout=30) == 0
  other = worker.call(on_worker("train", "--bucket", "other", *BUCKET[2:], *TRAIN))
  assert other.returncode == 2 and "is bucket 'b', not 'other'" in other.stderr


def test_tpu_setup_leaves_the_code_of_a_running_trainer_alone(worker):
  worker.trainer('trap "exit 143" TERM; echo up; while :; do sleep 0.05; done')
  connection = worker.train()
  assert connection.stdout.readline() == "up\n"
  done = worker.call(on_worker("setup"))  # there is nothing to unpack, so it would fail
  assert done.returncode == 0 and "its code stays" in done.stdout
  assert worker.call(on_worker("stop")).returncode == 0
  assert connection.wait(timeout=30) == 143


# codes: of the ssh commands, the first of which installs; states: what `describe` answers.
@pytest.mark.parametrize(
  ("codes", "states", "verbs", "code"),
  [
    ("0 0", "READY", "scp ssh ssh", 0),
    ("0 0", "MISSING", "create scp ssh ssh", 0),
    ("0 143 0", "READY READY READY", "scp ssh ssh ssh", 0),
    ("255 0 0", "MISSING READY READY", "create scp ssh scp ssh ssh", 0),
    ("0 1 0 0", "READY PREEMPTED PREEMPTED", "scp ssh ssh delete create scp ssh ssh", 0),
    ("0 2", "READY READY", "scp ssh ssh", 2),
  ],
)
def test_tpu_run_recreates_a_preempted_slice_and_stops_at_a_failure(
  tmp_path, codes, states, verbs, code
):
  for name, text in (("codes", codes), ("states", states)):
    (tmp_path / name).write_text(text.replace(" ", "\n") + "\n")
  gcloud = (
    'pop() { head -n1 "$T/$1"; sed -i 1d "$T/$1"; }\n'
    '[[ $4 != describe ]] || { pop states; exit; }\necho "did $4"\n'
    '[[ $4 != ssh ]] || exit "$(pop codes)"'
  )
  path = fake_programs(tmp_path / "bin", gcloud=gcloud, sleep="", git="", mkdir="")
  done = launch("tpu_vm.sh", "run", *TPU, *BUCKET, *TRAIN, PATH=path, T=str(tmp_path))
  assert re.findall(r"did (\w+)", done.stdout) == verbs.split()
  assert done.returncode == code, done.stderr


@pytest.mark.parametrize("answer", ["NOT_FOUND: no such node", "no project is set"])
def test_tpu_run_ends_when_no_slice_can_be_created(tmp_path, answer):
  gcloud = f'[[ $4 == describe ]] && echo "{answer}" >&2 || echo "did $4"; exit 1'
  path = fake_programs(tmp_path / "bin", gcloud=gcloud, sleep='echo "did sleep"', git="")
  done = launch("tpu_vm.sh", "run", *TPU, *BUCKET, *TRAIN, PATH=path)
  assert done.returncode == 2
  assert re.findall(r"did (create|sleep)", done.stdout) == ["create", "sleep"] * 4 + ["create"]
  assert done.stderr.count("NOT_FOUND") == 0
  assert done.stderr.count("no project is set") == (5 if answer == "no project is set" else 0)
  assert "creating 'pod' failed 5 times in a row" in done.stderr.splitlines()[-1]


def test_tpu_run_waits_for_room_when_its_slice_was_preempted(tmp_path):
  gcloud = (
    'left() { [[ -s $T/$1 ]] && sed -i 1d "$T/$1"; }\necho "did $4" >&2\ncase $4 in\n'
    'describe) left ready && echo READY || echo NOT_FOUND >&2 ;;\n'
    'create) left full && exit 1; printf "1\\n1\\n1\\n" > "$T/ready" ;;\n'
    'ssh) left broken && exit 255; exit 0 ;;\nesac'
  )
  for name, times in (("ready", 1), ("broken", 1), ("full", 8)):
    (tmp_path / name).write_text("1\n" * times)
  path = fake_programs(tmp_path / "bin", gcloud=gcloud, sleep="", git="", mkdir="")
  done = launch("tpu_vm.sh", "run", *TPU, *BUCKET, *TRAIN, PATH=path, T=str(tmp_path))
  assert done.returncode == 0, done.stderr
  assert done.stderr.count("did create") == 9 and "failure 8 in a row" in done.stderr


def test_tpu_run_takes_a_slice_that_it_did_not_see_for_a_moment(tmp_path):
  gcloud = (
    'case $4 in\ndescribe) [[ -e $T/tried ]] && echo READY ;;\n'
    'create) touch "$T/tried"; echo ALREADY_EXISTS >&2; exit 1 ;;\n*) echo "did $4" ;;\nesac'
  )
  path = fake_programs(tmp_path / "bin", gcloud=gcloud, sleep="", git="", mkdir="")
  done = launch("tpu_vm.sh", "run", *TPU, *BUCKET, *TRAIN, PATH=path, T=str(tmp_path))
  assert (done.returncode, done.stdout) == (0, "did scp\ndid ssh\ndid ssh\n"), done.stderr
  assert "ALREADY_EXISTS" in done.stderr and "failure 1 in a row" in done.stderr
