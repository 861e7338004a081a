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

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name != "lib.sh")
TRAIN = ["--config", "configs/laptop_tree.yaml", "--set", "prompts.text=a b's"]
RUN_DIR = ["--run-dir", "runs/x"]

TPU = ["--name", "pod", "--zone", "z", "--type", "v5litepod-16", "--version", "v2"]
BUCKET = ["--bucket", "b", "--run", "tree"]
GKE = [
  "--name", "tree", "--image", "registry/spo:1", "--accelerator", "tpu-v5-lite-podslice",
  "--topology", "4x4", "--hosts", "4", "--chips", "4", "--claim", "runs",
]  # fmt: skip
SLURM = ["--nodes", "2", "--gpus", "8"]


def environment(**more):
  """Ours, without what an outer launcher or test run has set."""
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("SPO_", "SLURM_", "XLA_"))}
  return {**clean, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable, **more}


def launch(script, *arguments, **more):
  return subprocess.run(
    [LAUNCH / script, *map(str, arguments)], capture_output=True, text=True, timeout=60,
    env=environment(**more),
  )  # fmt: skip


def words_of(line):
  """The words of a printed command, as bash reads them ($'a\\nb' too, which shlex does not)."""
  script = f"words=({line}); printf '%s\\0' \"${{words[@]}}\""
  done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
  return done.stdout.split("\0")[:-1]


def dry_run(script, *arguments, **more):
  done = launch(script, *arguments, **more)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_header_and_names_every_option(script):
  done = launch(script, "--help")
  assert done.returncode == 0 and done.stderr == ""
  assert f"launch/{script}" in done.stdout or script == "slurm_job.sh"
  parsed = set(re.findall(r"^ +(?:-h \| )?(--[a-z-]+(?: \| --[a-z-]+)*)\)",
                          (LAUNCH / script).read_text(), re.M))  # fmt: skip
  options = {name for group in parsed for name in group.split(" | ")} - {"--help"}
  if script != "slurm_job.sh":
    options -= {"--run-dir"}
  assert [name for name in sorted(options) if name not in done.stdout] == []


@pytest.mark.parametrize(
  ("command", "missing"),
  [
    (["local.sh", *RUN_DIR], "--config FILE"),
    (["local.sh", *TRAIN], "--run-dir DIR"),
    (["local.sh", "--processes"], "--processes needs a value"),
    (["local.sh", "--processes", "0"], "--processes '0'"),
    (["local.sh", "--processes", "2", "--devices", "3", *TRAIN, *RUN_DIR], "no multiple"),
    (["slurm.sh", "--gpus", "8", *TRAIN, *RUN_DIR], "--nodes N"),
    (["slurm.sh", "--nodes", "2", *TRAIN, *RUN_DIR], "--gpus N"),
    (["slurm.sh", *SLURM, "--partition"], "--partition needs a value"),
    (["slurm.sh", *SLURM, *TRAIN], "--run-dir DIR"),
    (["slurm.sh", *SLURM, *TRAIN, *RUN_DIR, "--resume"], "leave it out"),
    (["slurm_job.sh", *TRAIN, *RUN_DIR], "not inside a Slurm job"),
    (["tpu_vm.sh"], "none of create"),
    (["tpu_vm.sh", "create", "--zone", "z"], "--name NAME"),
    (["tpu_vm.sh", "create", "--name", "pod"], "--zone ZONE"),
    (["tpu_vm.sh", "create", "--name", "pod", "--zone", "z"], "--type TYPE"),
    (["tpu_vm.sh", "setup", *TPU], "--bucket BUCKET"),
    (["tpu_vm.sh", "train", *TPU, "--bucket", "gs://b", "--run", "r"], "a name alone"),
    (["tpu_vm.sh", "train", *TPU, *BUCKET], "--config FILE"),
    (["tpu_vm.sh", "train", *TPU, *BUCKET, *TRAIN, *RUN_DIR], "leave it out"),
    (["gke.sh", "apply"], "--name NAME"),
    (["gke.sh", "apply", "--name", "A_b"], "--name 'A_b'"),
    (["gke.sh", "apply", *GKE[:-2], *TRAIN], "--claim is missing"),
    (["gke.sh", "apply", *GKE], "--config FILE"),
    (["gke.sh", "apply", *GKE, "--image", 'a"b', *TRAIN], "no plain word"),
  ],
)
def test_a_wrong_command_line_ends_with_one_line_and_code_2(command, missing):
  done = launch(*command)
  assert (done.returncode, done.stdout) == (2, "")
  assert missing in done.stderr and done.stderr.count("\n") == 1


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


def test_slurm_dry_run_asks_for_requeue_and_an_early_sigterm():
  words = shlex.split(dry_run("slurm.sh", "--dry-run", *SLURM, *TRAIN, *RUN_DIR))
  assert words[0] == "sbatch" and words[words.index("launch/slurm_job.sh") + 1 :] == TRAIN + RUN_DIR
  assert {"--requeue", "--signal=TERM@120", "--nodes=2", "--gpus-per-node=8",
          "--ntasks-per-node=1", "--open-mode=append"} < set(words)  # fmt: skip


def fake_programs(folder, **programs):
  folder.mkdir()
  for name, body in programs.items():
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
  return f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def slurm(tmp_path):
  """Environment of a job whose srun fails with $CODE and whose scontrol logs requeues."""
  return dict(
    PATH=fake_programs(
      tmp_path / "bin",
      srun='echo "$SPO_COORDINATOR $SPO_PROCESSES $*"; exit ${CODE:-0}',
      scontrol='[[ $1 == show ]] && printf "n1\\nn2\\n" || echo "scontrol $*"',
    ),
    SLURM_JOB_ID="10007", SLURM_JOB_NODELIST="n[1-2]", SLURM_JOB_NUM_NODES="2",
  )  # fmt: skip


def test_slurm_job_takes_the_first_host_and_resumes_only_a_run_that_exists(slurm, tmp_path):
  arguments = [*TRAIN, "--run-dir", tmp_path / "run"]
  first = dry_run("slurm_job.sh", "--dry-run", *arguments, **slurm)
  assert "SPO_COORDINATOR=n1:20007 SPO_PROCESSES=2" in first and "--resume" not in first
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.yaml").touch()
  assert "--resume" in dry_run("slurm_job.sh", "--dry-run", *arguments, **slurm)
  assert dry_run("slurm_job.sh", *arguments, **slurm).startswith("n1:20007 2 ")


@pytest.mark.parametrize("code", [0, 1, 143])
def test_slurm_job_requeues_itself_after_143_alone(slurm, code):
  done = launch("slurm_job.sh", *TRAIN, *RUN_DIR, CODE=str(code), **slurm)
  assert done.returncode == code
  assert ("scontrol requeue 10007" in done.stdout) == (code == 143)


def test_tpu_dry_run_creates_copies_installs_trains_and_deletes():
  out = dry_run("tpu_vm.sh", "run", "--dry-run", "--spot", *TPU, *BUCKET, *TRAIN)
  verbs = re.findall(r"^gcloud compute tpus tpu-vm (\w+)", out, re.M)
  assert verbs == ["create", "scp", "ssh", "ssh", "describe", "delete"]
  lines = [words_of(line) for line in out.splitlines() if line.startswith("gcloud")]
  assert {"--spot", "--accelerator-type", "v5litepod-16", "--version", "v2"} < set(lines[0])
  assert all({"pod", "z"} < set(line) for line in lines if line[4] != "scp")
  assert all("--worker=all" in line for line in lines[1:4])
  assert "git archive" in out and "[tpu]" in lines[2][-1]


def test_tpu_worker_command_survives_its_quoting_and_resumes(tmp_path):
  out = dry_run("tpu_vm.sh", "train", "--dry-run", *TPU, *BUCKET, *TRAIN)
  command = words_of(out)[-1]
  python = tmp_path / "spo_jax" / ".venv" / "bin"
  path = fake_programs(tmp_path / "bin", gcsfuse="exit 0", mountpoint="exit 0")
  python.mkdir(parents=True)
  (python / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$SPO_DISTRIBUTED" "$@"\n')
  (python / "python").chmod(0o755)

  def worker():
    return subprocess.run(
      ["bash", "-c", command], cwd=tmp_path, env={"HOME": str(tmp_path), "PATH": path},
      capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip

  run_dir = tmp_path / "spo_runs" / "tree"
  expected = ["auto", "-m", "spo_jax.train", *TRAIN, "--run-dir", str(run_dir)]
  assert worker() == expected
  run_dir.mkdir(parents=True)
  (run_dir / "config.yaml").touch()
  assert worker() == [*expected, "--resume"]


@pytest.mark.parametrize(
  ("codes", "states", "verbs", "code"),
  [
    ("0", "READY", "ssh", 0),
    ("143 0", "READY READY READY", "ssh ssh", 0),
    ("1 0 0", "READY PREEMPTED PREEMPTED", "ssh delete create scp ssh ssh", 0),
    ("2", "READY READY", "ssh", 2),
  ],
)
def test_tpu_run_recreates_a_preempted_slice_and_stops_at_a_failure(
  tmp_path, codes, states, verbs, code
):
  (tmp_path / "codes").write_text(codes.replace(" ", "\n") + "\n")
  (tmp_path / "states").write_text(states.replace(" ", "\n") + "\n")
  pop = 'pop() { head -n1 "$T/$1"; sed -i 1d "$T/$1"; }\n'
  gcloud = pop + (
    '[[ $4 != describe ]] || { pop states; exit; }\necho "did $4"\n'
    '[[ $4 != ssh ]] || exit "$(pop codes)"'
  )
  path = fake_programs(tmp_path / "bin", gcloud=gcloud, sleep="", git="", mkdir="")
  done = launch("tpu_vm.sh", "run", *TPU, *BUCKET, *TRAIN, PATH=path, T=str(tmp_path))
  assert re.findall(r"did (\w+)", done.stdout) == verbs.split()
  assert done.returncode == code, done.stderr


def test_jobset_runs_one_pod_per_host_and_does_not_count_preemptions():
  out = dry_run("gke.sh", "apply", "--dry-run", *GKE, *TRAIN, "--set", 'a="&\\')
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
  assert container["args"] == [*TRAIN, "--set", 'a="&\\']
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert {"name": "SPO_DISTRIBUTED", "value": "auto"} in container["env"]
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


def test_local_processes_get_their_number_and_their_lines_a_prefix():
  stub = 'echo "$SPO_PROCESS_ID of $SPO_PROCESSES at $SPO_COORDINATOR, $1"; echo bad >&2'
  done = launch("local.sh", "--processes", 3, "--command", stub, "argument")
  assert done.returncode == 0, done.stderr
  lines = sorted(done.stdout.splitlines())
  port = re.search(r"localhost:(\d+)", lines[0])[1]
  assert lines == sorted(
    line
    for i in range(3)
    for line in (f"[{i}] {i} of 3 at localhost:{port}, argument", f"[{i}] bad")
  )


def test_local_stops_the_others_when_one_dies_and_returns_its_code():
  stub = (
    "((SPO_PROCESS_ID == 1)) && sleep 1 && exit 7; "
    "trap 'echo told; exit 0' TERM; sleep 30 & wait"
  )
  start = time.monotonic()
  done = launch("local.sh", "--processes", 3, "--command", stub)
  assert done.returncode == 7
  assert "process 1 ended with exit code 7" in done.stderr
  assert sorted(done.stdout.splitlines()) == ["[0] told", "[2] told"]
  assert time.monotonic() - start < 15


def test_local_kills_a_process_that_does_not_end_in_the_grace_period():
  stub = "((SPO_PROCESS_ID)) && sleep 1 && exit 7; trap '' TERM; sleep 30; sleep 30"
  start = time.monotonic()
  assert launch("local.sh", "--grace", 1, "--command", stub).returncode == 7
  assert time.monotonic() - start < 15


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_local_passes_a_signal_on_once_and_waits(number, code):
  name = number.name.removeprefix("SIG")
  # Process 1 needs longer to save than process 0, and must be left alone meanwhile.
  stub = (
    f"trap 'asked=1$asked' {name}; trap 'asked=twice' {'INT' if name == 'TERM' else 'TERM'}; "
    "echo up; until [[ -n $asked ]]; do sleep 0.1; done; sleep $SPO_PROCESS_ID; "
    f"echo saved $asked; exit {code}"
  )
  script = subprocess.Popen(
    [LAUNCH / "local.sh", "--command", stub], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True, env=environment(),
  )  # fmt: skip
  try:
    lines = {script.stdout.readline() for _ in range(2)}
    assert lines == {"[0] up\n", "[1] up\n"}
    script.send_signal(number)
    out, _ = script.communicate(timeout=20)
  finally:
    script.kill()
  assert sorted(out.splitlines()) == ["[0] saved 1", "[1] saved 1"]
  assert script.returncode == code


def shellcheck():
  beside = Path(sys.executable).with_name("shellcheck")
  return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(not shellcheck(), reason="shellcheck is in the extra lint")
def test_scripts_are_shellcheck_clean():
  files = sorted(path.relative_to(ROOT) for path in LAUNCH.glob("*.sh"))
  done = subprocess.run([shellcheck(), "-x", *files], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
