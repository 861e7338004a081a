"""launch/: dry runs print the right commands, and several local processes live and die together."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from launching import (
  BUCKET,
  LAUNCH,
  ROOT,
  RUN_DIR,
  TPU,
  TRAIN,
  assert_refused,
  dry_run,
  environment,
  fake_programs,
  launch,
  program,
  words_of,
)
from runs import heeding_ctrl_c

SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name != "lib.sh")
GKE = [
  "--name", "tree", "--image", "registry/spo:1", "--accelerator", "tpu-v5-lite-podslice",
  "--topology", "4x4", "--hosts", "4", "--chips", "4", "--claim", "runs",
]  # fmt: skip
SLURM = ["--nodes", "2", "--gpus", "8"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_header_and_names_every_option(script):
  done = launch(script, "--help")
  assert (done.returncode, done.stderr) == (0, "")
  assert f"launch/{script}" in done.stdout and "set -e" not in done.stdout
  read = re.search(r'^read_options "(.*?)" "?(.*?)"? "\$@"', (LAUNCH / script).read_text(), re.M)
  options = [f"--{name}" for name in " ".join(read.groups()).split()] if read else []
  assert [name for name in options if name not in done.stdout] == []
  assert "--dry-run" in done.stdout


@pytest.mark.parametrize(
  ("command", "missing"),
  [
    (["local.sh"], "--config FILE"),
    (["local.sh", "--devices", "4", "--verbose", *TRAIN], "--verbose is no option"),
    (["local.sh", "4", *TRAIN], "'4' is no option"),
    (["local.sh", *TRAIN], "--run-dir DIR"),
    (["local.sh", *TRAIN, "--run-dir", "--resume"], "--run-dir DIR"),
    (["local.sh", "--processes"], "--processes needs a value"),
    (["local.sh", "--processes", "0"], "--processes '0'"),
    (["local.sh", "--processes", "2", "--devices", "3", *TRAIN, *RUN_DIR], "no multiple"),
    (["slurm.sh", "--gpus", "8", *TRAIN, *RUN_DIR], "--nodes is missing"),
    (["slurm.sh", "--nodes", "2", *TRAIN, *RUN_DIR], "--gpus is missing"),
    (["slurm.sh", *SLURM], "--config FILE"),
    (["slurm.sh", *SLURM, "--partition"], "--partition needs a value"),
    (["slurm.sh", *SLURM, *TRAIN], "--run-dir DIR"),
    (["slurm_job.sh", *TRAIN, *RUN_DIR], "not inside a Slurm job"),
    (["tpu_vm.sh"], "none of create"),
    (["tpu_vm.sh", "create", "--zone", "z"], "--name is missing"),
    (["tpu_vm.sh", "create", "--name", "pod"], "--zone is missing"),
    (["tpu_vm.sh", "create", "--name", "pod", "--zone", "z"], "--type is missing"),
    (["tpu_vm.sh", "train", *TPU], "--bucket is missing"),
    (["tpu_vm.sh", "train", *TPU, "--bucket", "gs://b", "--run", "r"], "without gs://"),
    (["tpu_vm.sh", "train", *TPU, *BUCKET], "--config FILE"),
    (["tpu_vm.sh", "run", *TPU, *BUCKET, *TRAIN, *RUN_DIR], "leave it out"),
    (["tpu_vm.sh", "stop", "--zone", "z"], "--name is missing"),
    (["tpu_worker.sh"], "BUCKET and RUN are missing"),
    (["tpu_worker.sh", "--dry-run", "b"], "BUCKET and RUN are missing"),
    (["tpu_worker.sh", "--start", "b", "tree", *TRAIN], "BUCKET and RUN are missing"),
    (["gke.sh", "apply"], "--name is missing"),
    (["gke.sh", "apply", "--name", "A_b"], "--name 'A_b'"),
    (["gke.sh", "apply", *GKE[:-2], *TRAIN], "--claim is missing"),
    (["gke.sh", "apply", *GKE], "--config FILE"),
    (["gke.sh", "apply", *GKE, *TRAIN, *RUN_DIR], "leave it out"),
    (["gke.sh", "apply", *GKE, "--image", 'a"b', *TRAIN], "no plain word"),
    (["gke.sh", "apply", "--dry-run", *GKE, "--config", *RUN_DIR], "--config FILE"),
    (["gke.sh", "apply", "--dry-run", *GKE, "--topology", "banana", *TRAIN], "--topology 'banana'"),
    (["gke.sh", "apply", "--dry-run", *GKE, "--topology", "16", *TRAIN], "--topology '16'"),
    (["gke.sh", "apply", "--dry-run", *GKE, "--chips", "3", *TRAIN], "16 chips; --hosts 4 times"),
    (["gke.sh", "apply", "--dry-run", *GKE, "--topology", "4x4x4", *TRAIN], "4x4x4 has 64 chips"),
  ],
)
def test_a_wrong_command_line_ends_with_one_line_and_code_2(command, missing):
  assert_refused(launch(*command), missing)


@pytest.mark.parametrize(
  ("rest", "message"),
  [
    (["--config", *RUN_DIR], "--config FILE is missing"),
    (["--config", "nope.yaml", *RUN_DIR], "--config 'nope.yaml' is no file in"),
    (["--config=configs", *RUN_DIR], "--config 'configs' is no file in"),
  ],
)
@pytest.mark.parametrize(
  "command",
  [["local.sh"], ["slurm.sh", *SLURM], ["slurm_job.sh"], ["tpu_vm.sh", "run", *TPU, *BUCKET]],
)
def test_a_configuration_that_is_not_there_is_refused(slurm, command, rest, message):
  assert_refused(launch(*command, "--dry-run", *rest, **slurm), message)


def test_local_is_for_cpus_and_gpus():
  done = launch("local.sh", "--dry-run", *TRAIN, *RUN_DIR, JAX_PLATFORMS="tpu")
  assert_refused(done, "JAX_PLATFORMS 'tpu' must be cpu or cuda")


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES"])
def test_slurm_job_says_what_the_job_lacks(slurm, name):
  done = launch("slurm_job.sh", "--dry-run", *TRAIN, *RUN_DIR, **{**slurm, name: ""})
  assert_refused(done, f"{name} is not set")


@pytest.mark.parametrize("command", [["local.sh"], ["slurm.sh", *SLURM], ["slurm_job.sh"]])
def test_a_python_that_is_not_there_is_named_with_the_set_up(slurm, command):
  done = launch(*command, *TRAIN, *RUN_DIR, **{**slurm, "PYTHON": "nowhere/python"})
  assert_refused(done, "Python 'nowhere/python' is not here: run 'make train' once")


@pytest.mark.parametrize(
  ("command", "name"),
  [
    (["slurm.sh", *SLURM, *TRAIN, *RUN_DIR], "sbatch"),
    (["slurm_job.sh", *TRAIN, *RUN_DIR], "scontrol"),
    (["tpu_vm.sh", "run", *TPU, *BUCKET, *TRAIN], "gcloud"),
    (["gke.sh", "logs", "--name", "tree"], "kubectl"),
  ],
)
def test_a_program_that_is_not_installed_is_named(slurm, tmp_path, command, name):
  (tmp_path / "few").mkdir()
  for needed in ("bash", "dirname"):
    (tmp_path / "few" / needed).symlink_to(shutil.which(needed))
  done = launch(*command, **{**slurm, "PATH": str(tmp_path / "few")})
  assert_refused(done, f"{name} is not on the PATH")


def test_local_dry_run_gives_each_process_its_share_of_the_devices():
  lines = dry_run(
    "local.sh", "--dry-run", "--processes", 2, "--devices", 8, *TRAIN, *RUN_DIR, XLA_FLAGS="--x"
  ).splitlines()
  assert lines[2:] == ["wait"]
  for index, line in enumerate(lines[:2]):
    words = shlex.split(line)
    assert words[-1] == "&" and words[-len(TRAIN) - 3 : -3] == TRAIN
    assert {f"SPO_PROCESS_ID={index}", "SPO_PROCESSES=2"} < set(words)
    assert "XLA_FLAGS=--x --xla_force_host_platform_device_count=4" in words
    assert any(re.fullmatch(r"SPO_COORDINATOR=localhost:\d+", word) for word in words)


def test_local_dry_run_divides_gpus():
  out = dry_run(
    "local.sh", "--dry-run", "--devices", 4, *TRAIN, *RUN_DIR, JAX_PLATFORMS="cuda"
  ).splitlines()
  assert [re.search(r"CUDA_VISIBLE_DEVICES=(\S+)", shlex.join(shlex.split(line)))[1]
          for line in out[:2]] == ["0,1", "2,3"]  # fmt: skip


def test_local_keeps_to_the_gpus_that_it_was_given():
  command = ["local.sh", "--dry-run", *TRAIN, *RUN_DIR]
  given = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "6,GPU-a"}
  lines = dry_run(*command, **given).splitlines()[:2]
  assert [re.search(r"CUDA_VISIBLE_DEVICES=(\S+)", line)[1] for line in lines] == ["6", "GPU-a"]
  said = "--devices 2: CUDA_VISIBLE_DEVICES=6 names 1"
  assert_refused(launch(*command, **given | {"CUDA_VISIBLE_DEVICES": "6"}), said)


ODD = "{question} $$x$$ $(RUN) it's #1"


def test_laptop_passes_words_through_make_as_they_are(tmp_path):
  path = fake_programs(tmp_path, python='printf "%s\\0" "$@" >words')
  shutil.copytree(LAUNCH, tmp_path / "launch")
  (tmp_path / "Makefile").write_text("train:\n\t@python $(ARGS)\n")
  done = subprocess.run(
    ["./laptop.sh", "tree", "--set", ODD], capture_output=True, text=True, timeout=60,
    env=environment(PATH=path), cwd=tmp_path / "launch",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "words").read_text().split("\0")[:-1] == ["--set", ODD]
  assert_refused(launch("laptop.sh", "--set", "a\nb"), "a control character")


def test_slurm_dry_run_asks_for_requeue_and_an_early_sigterm():
  words = shlex.split(dry_run("slurm.sh", "--dry-run", *SLURM, *TRAIN, *RUN_DIR))
  assert words[0] == "sbatch" and words[words.index("launch/slurm_job.sh") + 1 :] == TRAIN + RUN_DIR
  assert {"--requeue", "--signal=TERM@120", "--nodes=2", "--gpus-per-node=8",
          "--ntasks-per-node=1", "--open-mode=append"} < set(words)  # fmt: skip


@pytest.fixture
def slurm(tmp_path):
  """Environment of a job in $STATE whose processes fail with $CODE; its scontrol logs requeues."""
  return dict(
    PATH=fake_programs(
      tmp_path / "bin",
      srun='shift; SLURM_PROCID=1 exec "$@"',
      scontrol='''case "$1 $2" in
        "show hostnames") printf "n1\\nn2\\n" ;;
        "show job") echo "JobId=$3 JobState=${STATE-RUNNING} Reason=None" ;;
        *) echo "scontrol $*" ;;
      esac''',
    ),
    PYTHON=program(
      tmp_path / "python",
      'echo "$SPO_COORDINATOR $SPO_PROCESSES $SPO_PROCESS_ID $JAX_PLATFORMS"\n'
      'printf "%s\\n" "$@"; exit ${CODE:-0}',
    ),
    SLURM_JOB_ID="10007", SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_NUM_NODES="2",
  )  # fmt: skip


def test_slurm_job_takes_the_first_host_and_resumes_only_a_run_that_exists(slurm, tmp_path):
  arguments = [*TRAIN, "--run-dir", str(tmp_path / "run")]
  expected = ["n1:20007 2 1 cpu", "-m", "spo_jax.train", *arguments]
  assert launch("slurm_job.sh", *arguments, **slurm).stdout.splitlines() == expected
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.yaml").touch()
  expected.append("--resume")
  assert launch("slurm_job.sh", *arguments, **slurm).stdout.splitlines() == expected
  printed = words_of(dry_run("slurm_job.sh", "--dry-run", *arguments, **slurm))
  assert printed[:2] == ["srun", "--kill-on-bad-exit=0"] and printed[-len(expected) + 1:] == (
    expected[1:])


@pytest.mark.parametrize(
  ("code", "state"), [(0, "RUNNING"), (1, "RUNNING"), (143, "RUNNING"), (143, "CANCELLED")]
)
def test_slurm_job_requeues_itself_after_143_alone(slurm, code, state):
  done = launch("slurm_job.sh", *TRAIN, *RUN_DIR, CODE=str(code), STATE=state, **slurm)
  assert done.returncode == code
  assert ("scontrol requeue 10007" in done.stdout) == (code == 143 and state == "RUNNING")


def test_slurm_job_that_is_told_to_stop_waits_for_its_processes(slurm, tmp_path):
  slurm["PYTHON"] = program(tmp_path / "python", "echo up; sleep 2; echo saved; exit 143")
  job = subprocess.Popen(
    [LAUNCH / "slurm_job.sh", *TRAIN, *RUN_DIR], stdout=subprocess.PIPE, text=True, cwd=ROOT,
    env=environment(**slurm),
  )  # fmt: skip
  assert job.stdout.readline() == "up\n"
  job.send_signal(signal.SIGTERM)
  out, _ = job.communicate(timeout=30)
  assert out.splitlines() == ["saved", "scontrol requeue 10007"]
  assert job.returncode == 143


def test_jobset_runs_one_pod_per_host_and_does_not_count_preemptions():
  out = dry_run("gke.sh", "apply", "--dry-run", *GKE, *TRAIN, "--set", 'a="&\\', ODD)
  command, text = out.split("\n", 1)
  assert command == "kubectl apply -f - <<'EOF_JOBSET'"
  (job_set,) = yaml.safe_load_all(text.rsplit("\nEOF_JOBSET", 1)[0])
  assert "__" not in text
  assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert job_set["metadata"]["name"] == "tree"
  (replicated,) = job_set["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  assert (replicated["replicas"], job["completions"], job["parallelism"]) == (1, 4, 4)
  assert job["backoffLimit"] == 0
  (rule,) = job_set["spec"]["failurePolicy"]["rules"]
  assert rule == {
    "action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]
  }  # fmt: skip
  disruption, exit_code = job["podFailurePolicy"]["rules"]
  assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
  assert exit_code["onExitCodes"]["values"] == [143]
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
  (container,) = pod["containers"]
  assert container["args"] == [*TRAIN, "--set", 'a="&\\', ODD.replace("$", "$$")]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert {"name": "SPO_DISTRIBUTED", "value": "auto"} in container["env"]
  assert {"name": "JAX_COMPILATION_CACHE_DIR", "value": "/runs/.jax_cache"} in container["env"]
  assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "runs"


def test_the_jobset_template_itself_is_yaml():
  (template,) = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
  assert template["kind"] == "JobSet"


def test_gke_logs_and_delete_name_the_job_set():
  assert "jobset.sigs.k8s.io/jobset-name=tree" in dry_run(
    "gke.sh", "logs", "--name", "tree", "--dry-run"
  )
  assert dry_run("gke.sh", "delete", "--name", "tree", "--dry-run") == (
    "kubectl delete jobset tree\n"
  )


@pytest.fixture
def local(tmp_path):
  """local(BODY, *options) starts launch/local.sh with this in place of python."""
  started = []

  def start(body, *options):
    command = [LAUNCH / "local.sh", *options, *TRAIN, *RUN_DIR]
    command = ["env", "--default-signal=HUP", *command]  # nohup may have started the tests
    env = environment(PYTHON=program(tmp_path / "python", body))
    with heeding_ctrl_c():
      started.append(subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        start_new_session=True,
      ))  # fmt: skip
    return started[-1]

  yield start
  for process in started:
    process.kill()


def test_local_processes_get_their_number_and_their_lines_a_prefix(local):
  stub = 'echo "$SPO_PROCESS_ID of $SPO_PROCESSES at $SPO_COORDINATOR, $4"; echo bad >&2'
  script = local(stub, "--processes", "3")
  out, err = script.communicate(timeout=30)
  assert script.returncode == 0, err
  lines = sorted(out.splitlines())
  port = re.search(r"localhost:(\d+)", lines[0])[1]
  assert lines == sorted(
    line
    for i in range(3)
    for line in (f"[{i}] {i} of 3 at localhost:{port}, {TRAIN[1]}", f"[{i}] bad")
  )


def test_local_kills_what_is_left_when_a_process_dies_and_returns_its_code(local):
  # Process 0 ends by itself, 2 has to be killed, and with it a child that holds its output.
  stub = (
    "case $SPO_PROCESS_ID in\n0) sleep 3; echo also gone; exit 9 ;;\n1) sleep 1; exit 7 ;;\nesac\n"
    "trap '' TERM; sleep 60 & wait"
  )
  start = time.monotonic()
  script = local(stub, "--processes", "3")
  out, err = script.communicate(timeout=30)
  assert script.returncode == 7
  assert "process 1 ended with exit code 7" in err and "process 0" not in err
  assert out == "[0] also gone\n"
  assert 9 < time.monotonic() - start < 25


# A terminal that closes is told on as SIGTERM, which the trainer knows.
@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)]
)
def test_local_passes_a_signal_on_once_and_waits(local, number, code):
  name = "INT" if number == signal.SIGINT else "TERM"
  # Process 1 needs longer to save than process 0, and must be left alone meanwhile.
  script = local(
    f"trap 'asked=1$asked' {name}; trap 'asked=twice' {'INT' if name == 'TERM' else 'TERM'}; "
    "echo up; until [[ -n $asked ]]; do sleep 0.1; done; sleep $SPO_PROCESS_ID; "
    f"echo saved $asked; exit {code}"
  )
  assert {script.stdout.readline() for _ in range(2)} == {"[0] up\n", "[1] up\n"}
  if number == signal.SIGHUP:
    for _ in range(2):  # to all in front of the terminal, from the shell and from the kernel
      os.killpg(script.pid, number)
      time.sleep(0.3)
  else:
    script.send_signal(number)
  out, err = script.communicate(timeout=30)
  assert sorted(out.splitlines()) == ["[0] saved 1", "[1] saved 1"]
  assert "the others have" not in err
  assert script.returncode == code


def test_local_does_not_wait_for_long_where_one_process_alone_was_asked_to_stop(local):
  script = local("((SPO_PROCESS_ID)) && exit 143; echo up; exec sleep 60")
  assert "process 1 ended with exit code 143; the others have 60 sec" in script.stderr.readline()
  script.send_signal(signal.SIGTERM)
  script.communicate(timeout=30)
  assert script.returncode == 143


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv of util-linux ties them to it")
def test_local_processes_end_when_the_script_is_killed(local):
  script = local("echo up; exec sleep 60")
  assert {script.stdout.readline() for _ in range(2)} == {"[0] up\n", "[1] up\n"}
  script.kill()
  script.communicate(timeout=10)  # the pipe ends with the last of them


def shellcheck():
  beside = Path(sys.executable).with_name("shellcheck")
  return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(not shellcheck(), reason="shellcheck is in the extra lint")
def test_scripts_are_shellcheck_clean():
  files = sorted(path.relative_to(ROOT) for path in LAUNCH.glob("*.sh"))
  done = subprocess.run([shellcheck(), "-x", *files], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
