"""The command line on folders and runs: its figures, what it continues and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from spo_jax import checkpoint, evaluate, hf, model, tasks
from spo_jax.config import ModelConfig, load
from spo_jax.metrics import summarise
from spo_jax.tasks import Grade, Problem, Task
from spo_jax.tokenizer import bpe_tokenizer, character_tokenizer

pytest.register_assert_rewrite("runs")
pytest_plugins = ["runs"]

from runs import locked_by_another  # noqa: E402

CHARSET = "0123="
QUESTIONS = 7
SHAPE = ModelConfig(
  hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, max_position=64
)
ROOM = ["--rows", "6", "--max-prompt-tokens", "4", "--max-response-tokens", "5"]
SAMPLED = [*ROOM, "--samples", "3", "--temperature", "1", "--top-p", "0.9"]  # 2 questions at once


class Guess(Task):
  """A task that a model of random weights solves now and then: name the question's digit."""

  name, prompt, charset, conclusion = "guess", "plain", CHARSET, "="
  closed = 0

  def __init__(self, config, seed):
    super().__init__(config)

  def split(self, name):
    if name not in ("train", "test"):
      raise ValueError(f"unknown split {name!r}")
    first = 0 if name == "train" else 100
    return [Problem(first + i, f"{i // 4}{i % 4}=", str(i % 4), None) for i in range(QUESTIONS)]

  def judge(self, problem, response):
    return Grade(float(response[:1] == problem.answer), response[:1] or None)

  def from_record(self, record, uid):
    raise NotImplementedError

  def counters(self):
    return {"timeouts": 2}

  def close(self):
    Guess.closed += 1


@pytest.fixture(autouse=True)
def guess_is_a_task(monkeypatch):
  monkeypatch.setitem(tasks.LOADERS, "guess", Guess)


def save(folder, tokenizer, seed=2):
  """A folder with random weights; large ones, so that the model has opinions."""
  config = dataclasses.replace(SHAPE, vocab_size=len(tokenizer))
  params = jax.tree.map(lambda x: 3 * x, model.init_params(config, jax.random.key(seed)))
  hf.save_pretrained(folder, config, params, tokenizer)
  return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return save(tmp_path_factory.mktemp("model") / "hf", character_tokenizer(CHARSET))


@pytest.fixture
def run(capsys):
  """run(...) -> (exit code, standard output, standard error) of the command line."""

  def call(*arguments):
    code = evaluate.main([str(a) for a in arguments])
    return (code, *capsys.readouterr())

  return call


@pytest.fixture
def refuse(run, capsys):
  """refuse(...) -> the one line with which the command line refuses these arguments."""

  def call(*arguments):
    try:
      code, out, err = run(*arguments)
    except SystemExit as stopped:  # argparse
      code, (out, err) = stopped.code, capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err

  return call


@pytest.fixture
def sampled(run, folder, tmp_path):
  """The output of an uninterrupted evaluation of 7 questions x 3 samples."""
  output = tmp_path / "reference"
  code, _, err = run("--model", folder, "--task", "guess", *SAMPLED, "--output", output)
  assert (code, err) == (0, "")
  return output


def records(output):
  return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def summary(output):
  return json.loads((output / "summary.json").read_text())


def assert_same(output, reference):
  """Bitwise, but for what tells of the interruption."""
  assert (output / "samples.jsonl").read_bytes() == (reference / "samples.jsonl").read_bytes()
  told = {"seconds": 0, "continued_from": 0}
  assert summary(output) | told == summary(reference) | told


def content(directory):
  return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_every_sample_is_written_with_what_the_task_says_of_it(sampled):
  rows, problems = records(sampled), Guess.split(None, "test")
  assert [row["question"] for row in rows] == [p.uid for p in problems for _ in range(3)]
  for row, problem in zip(rows, [p for p in problems for _ in range(3)]):
    assert (row["prompt"], row["answer"]) == (problem.prompt, problem.answer)
    assert set(row["response"]) <= {*CHARSET, *"<pad>"}
    grade = Guess.judge(None, problem, row["response"]) if row["finished"] else Grade(0.0, None)
    assert (row["reward"], row["extracted"]) == grade
    assert 1 <= row["tokens"] <= 5
  assert {row["finished"] for row in rows} == {True, False} == {row["reward"] == 1 for row in rows}
  assert len({row["response"] for row in rows}) > 6


def test_the_summary_holds_figures_counts_and_settings(sampled, folder):
  got = summary(sampled)
  expected = summarise(records(sampled), samples=3, seed=0)
  assert {name: got[name] for name in expected} == expected
  assert 0 < got["accuracy"] < got["pass@3"] < 1
  assert (got["questions"], got["samples"]) == (7, 3)
  assert got["seconds"] > 0 and got["continued_from"] == 0
  assert got["grading"] == {"timeouts": 2}
  settings = got["settings"]
  assert settings == json.loads((sampled / "settings.json").read_text())
  assert settings["model"] == str(folder) and settings["checkpoint"] is None
  assert (settings["temperature"], settings["top_p"], settings["split"]) == (1.0, 0.9, "test")


def test_a_table_ends_the_output_and_says_where_the_files_are(run, folder, tmp_path):
  closed = Guess.closed
  code, out, err = run("--model", folder, "--task", "guess", *SAMPLED, "--output", tmp_path / "a")
  assert (code, err, Guess.closed) == (0, "", closed + 1)
  got = summary(tmp_path / "a")
  low, high = got["intervals"]["accuracy"]
  lines = [re.split(r"[\s│┃]{2,}", line.strip(" │┃")) for line in out.splitlines()]
  assert ["accuracy", f"{got['accuracy']:.3f}", f"{low:.3f} to {high:.3f}"] in lines
  assert {"pass@2", "pass@3", "maj@3", "unfinished"} <= {line[0] for line in lines}
  assert "pass@1" not in out  # the accuracy again
  assert "7 questions x 3 samples, temperature 1, top-p 0.9" in out
  assert "timeouts: 2" in out
  assert out.endswith(f"Samples: {tmp_path}/a/samples.jsonl\nSummary: {tmp_path}/a/summary.json\n")
  progress = re.findall(r"^evaluate (\d)/7 accuracy ([\d.]+)", out, re.M)
  assert [int(done) for done, _ in progress] == [2, 4, 6, 7]
  assert float(progress[-1][1]) == pytest.approx(got["accuracy"], abs=6e-4)


def test_one_sample_is_greedy_by_default_and_of_the_weights_in_the_folder(run, folder, tmp_path):
  assert run("--model", folder, "--task", "guess", *ROOM, "--output", tmp_path / "a")[0] == 0
  config, params = hf.load_pretrained(folder)
  logits = jax.jit(model.logits, static_argnums=0)
  tokenizer = character_tokenizer(CHARSET)
  assert len(records(tmp_path / "a")) == QUESTIONS
  for row in records(tmp_path / "a"):
    prompt = tokenizer(row["prompt"])["input_ids"]
    tokens = list(prompt)
    while len(tokens) - len(prompt) < 5 and (tokens == prompt or tokens[-1] != 1):
      padded = np.array([tokens + [0] * (9 - len(tokens))])
      scores = logits(config, params, padded, np.arange(9)[None] < len(tokens))
      tokens.append(int(scores[0, len(tokens) - 1].argmax()))
    assert row["tokens"] == len(tokens) - len(prompt)
    assert row["finished"] == (tokens[-1] == 1)
    assert row["response"] == tokenizer.decode([t for t in tokens[len(prompt):] if t != 1])
  assert summary(tmp_path / "a")["settings"]["temperature"] == 0


def test_the_seed_decides_the_samples(run, folder, sampled, tmp_path):
  same, other = tmp_path / "same", tmp_path / "other"
  command = ["--model", folder, "--task", "guess", *SAMPLED, "--output"]
  assert run(*command, same, "--seed", 0)[0] == 0
  assert run(*command, other, "--seed", 1)[0] == 0
  assert_same(same, sampled)
  assert [r["response"] for r in records(other)] != [r["response"] for r in records(sampled)]
  assert [r["prompt"] for r in records(other)] == [r["prompt"] for r in records(sampled)]


def test_equal_questions_get_samples_of_their_own(run, folder, tmp_path, monkeypatch):
  problems = [Problem(i, "00=", "0", None) for i in range(6)]
  monkeypatch.setattr(Guess, "split", lambda *_: problems)
  assert run("--model", folder, "--task", "guess", *SAMPLED, "--output", tmp_path / "a")[0] == 0
  texts = [row["response"] for row in records(tmp_path / "a")]
  assert len({tuple(texts[i : i + 3]) for i in range(0, 18, 3)}) == 6


def test_a_limit_takes_the_first_questions_and_a_split_is_taken_whole(run, folder, tmp_path):
  command = ["--model", folder, "--task", "guess", *ROOM]
  assert run(*command, "--limit", 3, "--output", tmp_path / "a")[0] == 0
  assert run(*command, "--set", "eval.problems=2", "--split", "train",
             "--output", tmp_path / "b")[0] == 0  # fmt: skip
  assert [row["question"] for row in records(tmp_path / "a")] == [100, 101, 102]
  # eval.problems is for the evaluations within a training run, and for endless splits.
  assert [row["question"] for row in records(tmp_path / "b")] == list(range(QUESTIONS))


def cut_at(kind, text):
  """The part of a samples file that a kill left."""
  line = text.index(b"\n") + 1
  ends = [match.end() for match in re.finditer(b"\n", text)]
  return {
    "nothing": b"",
    "half of the first line": text[: line // 2],
    "within the first chunk": text[: ends[3]],
    "a chunk": text[: ends[5]],
    "a chunk and half a line": text[: ends[5] + 20],
    "a chunk and a line of the next": text[: ends[6]],
    "all chunks but the short last one": text[: ends[17]],
    "a line too few": text[: ends[19]],
    "everything but the last end of line": text[:-1],
    "everything": text,
    "a broken line in the second chunk": text[: ends[7]] + b"{\0\0" + text[ends[7] + 3 :],
    "lines too many": text + text[:line],
  }[kind]


@pytest.mark.parametrize(("kind", "kept"), [
  ("nothing", 0), ("half of the first line", 0), ("within the first chunk", 0), ("a chunk", 2),
  ("a chunk and half a line", 2), ("a chunk and a line of the next", 2),
  ("all chunks but the short last one", 6), ("a line too few", 6),
  ("everything but the last end of line", 6), ("everything", 7),
  ("a broken line in the second chunk", 2), ("lines too many", 7),
])  # fmt: skip
def test_what_a_kill_left_is_continued_to_the_same_files(
  run, folder, sampled, tmp_path, monkeypatch, kind, kept
):
  output, asked = tmp_path / "cut", []
  output.mkdir()
  (output / "settings.json").write_bytes((sampled / "settings.json").read_bytes())
  (output / "samples.jsonl").write_bytes(cut_at(kind, (sampled / "samples.jsonl").read_bytes()))
  judge = evaluate.judge
  monkeypatch.setattr(
    evaluate, "judge", lambda *args: asked.extend(args[1].problems) or judge(*args)
  )
  code, _, err = run("--model", folder, "--task", "guess", *SAMPLED, "--output", output)
  assert (code, err) == (0, "")
  assert_same(output, sampled)
  assert [problem.uid for problem in asked] == list(range(100 + kept, 107))
  assert summary(output)["continued_from"] == kept


def test_ctrl_c_says_how_to_go_on(run, folder, sampled, tmp_path, monkeypatch):
  output, judge, calls = tmp_path / "stopped", evaluate.judge, []

  def stop(*args):
    calls.append(args)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return judge(*args)

  monkeypatch.setattr(evaluate, "judge", stop)
  command = ["--model", folder, "--task", "guess", *SAMPLED, "--output", output]
  code, _, err = run(*command)
  assert code == 130 and str(output) in err and err.count("\n") == 1
  assert len(records(output)) == 12 and not (output / "summary.json").exists()
  code, out, _ = run(*command)
  assert code == 0
  assert_same(output, sampled)
  live = re.findall(r"^evaluate (\d)/7 accuracy ([\d.]+)", out, re.M)
  assert live == [("6", live[0][1]), ("7", f"{summary(sampled)['accuracy']:.3f}")]


KILLED = """
import sys, runs
from spo_jax import evaluate
if sys.argv[1] == "kill":
  runs.Stop("spo_jax.evaluate.judge", 2).install()
sys.exit(evaluate.main(sys.argv[2:]))
"""


def test_a_killed_process_is_continued_by_another(run, tmp_path):
  folder = save(tmp_path / "hf", character_tokenizer(tasks.LOADERS["arithmetic"].charset))
  options = ["--model", folder, "--task", "arithmetic", "--set", "task.operations=2", "--limit", 5,
             "--rows", 4, "--samples", 2, "--temperature", 1, "--max-prompt-tokens", 7,
             "--max-response-tokens", 5]  # fmt: skip
  paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

  def process(how, output):
    command = [sys.executable, "-c", KILLED, how, *map(str, options), "--output", str(output)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)

  assert process("kill", tmp_path / "a").returncode == -signal.SIGKILL
  assert len(records(tmp_path / "a")) == 4
  assert run(*options, "--output", tmp_path / "a")[0] == 0
  assert run(*options, "--output", tmp_path / "b")[0] == 0
  assert_same(tmp_path / "a", tmp_path / "b")
  assert len(records(tmp_path / "b")) == 10  # of the endless split


OTHERS = {
  "seed": ["--seed", "1"],
  "split": ["--split", "train"],
  "temperature": ["--temperature", "0.5"],
  "top_p": ["--top-p", "1"],
  "samples": ["--samples", "2"],
  "questions": ["--limit", "6"],
  "rows": ["--rows", "9"],
  "max_response_tokens": ["--max-response-tokens", "4"],
  "stop": ["--stop", "33"],
  "dtype": ["--dtype", "bfloat16"],
  "task": ["--set", "task.unfinished_penalty=0.5"],
}


@pytest.mark.parametrize("key", OTHERS)
def test_an_output_of_other_settings_is_left_alone(refuse, folder, sampled, key):
  before = content(sampled)
  options = ["--model", folder, "--task", "guess", *SAMPLED, "--output", sampled]
  said = refuse(*options, *OTHERS[key])
  assert f"{key}=" in said and str(sampled) in said
  assert content(sampled) == before


def test_other_questions_or_weights_of_the_same_name_are_not_mixed(
  refuse, run, tmp_path, monkeypatch
):
  folder = save(tmp_path / "hf", character_tokenizer(CHARSET))
  options = ["--model", folder, "--task", "guess", *ROOM, "--output", tmp_path / "a"]
  assert run(*options)[0] == 0
  split = Guess.split
  with monkeypatch.context() as patch:
    patch.setattr(Guess, "split", lambda self, name: split(self, name)[::-1])
    assert "prompts=" in refuse(*options)
  assert run(*options)[0] == 0
  save(folder, character_tokenizer(CHARSET), seed=1)
  assert "weights=" in refuse(*options)


def test_a_finished_evaluation_is_shown_again_without_a_model(run, folder, sampled, monkeypatch):
  before = content(sampled)
  monkeypatch.setattr(evaluate, "load_params", None)
  command = ["--model", folder, "--task", "guess", *SAMPLED, "--output", sampled]
  code, out, err = run(*command)
  assert (code, err) == (0, "")
  assert "maj@3" in out and f"Summary: {sampled}/summary.json" in out
  assert content(sampled) == before


def test_a_disk_that_is_full_is_one_line_and_the_same_command_continues(
  run, folder, sampled, tmp_path, monkeypatch
):
  command = ["--model", folder, "--task", "guess", *SAMPLED, "--output", tmp_path / "a"]

  def full(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as change:
    change.setattr(evaluate, "judge", lambda *args: change.setattr(os, "fsync", full) or [])
    code, _, err = run(*command)
  assert code == 1 and "No space left" in err and f"--output {tmp_path / 'a'} continues" in err
  assert err.splitlines()[-1].startswith("error: ")
  assert run(*command)[0] == 0
  assert_same(tmp_path / "a", sampled)


def test_a_checkpoint_that_cannot_be_read_is_named(refuse, finished, tmp_path):
  run_dir = shutil.copytree(finished("chain")[0], tmp_path / "run")
  broken = run_dir / "checkpoints" / "policy" / "6"
  largest = max((p for p in broken.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  os.truncate(largest, largest.stat().st_size // 2)
  said = refuse("--model", run_dir, "--limit", 8, "--output", tmp_path / "a")
  assert f"{broken} cannot be read" in said and "--checkpoint" in said
  assert not (tmp_path / "a").exists()


def test_processes_that_see_different_checkpoints_evaluate_none(refuse, finished, monkeypatch):
  monkeypatch.setattr(checkpoint, "from_main", lambda own: 9)
  said = refuse("--model", finished("chain")[0], "--limit", 8)
  assert "different checkpoints" in said and "the main one 9" in said


def test_an_output_folder_has_one_writer(refuse, folder, tmp_path):
  with locked_by_another(tmp_path):
    said = refuse("--model", folder, "--task", "guess", *ROOM, "--output", tmp_path)
  assert str(tmp_path) in said and "another process" in said


def test_results_of_something_else_are_not_overwritten(refuse, folder, tmp_path):
  for name in ("samples.jsonl", "summary.json"):
    output = tmp_path / name
    output.mkdir()
    (output / name).write_text("mine")
    said = refuse("--model", folder, "--task", "guess", *ROOM, "--output", output)
    assert str(output) in said
    assert content(output) == {output / name: b"mine"}


REFUSED = {
  "no model": ([], ["--model"]),
  "no task": (["--model", "{folder}"], ["--task"]),
  "an unknown task": (["--model", "{folder}", "--task", "gues"], ["gues", "guess"]),
  "an unknown preset": (["--model", "{folder}", "--preset", "gsm"], ["gsm", "math500-sampled"]),
  "an unknown option": (["--model", "{folder}", "--temprature", "1"], ["--temprature"]),
  "an unknown key": (["{ok}", "--set", "task.pth=1"], ["task.pth", "task.path"]),
  "an unknown split": (["{ok}", "--split", "tset"], ["tset"]),
  "a missing folder": (["--model", "{tmp}/none/at/all", "--task", "guess"], ["/none/at/all"]),
  "an empty folder": (["--model", "{tmp}", "--task", "guess"], ["config.json", "config.yaml"]),
  "a checkpoint of a folder": (["{ok}", "--checkpoint", "best"], ["--checkpoint best"]),
  "samples that are all the same": (
    ["{ok}", "--samples", "2", "--temperature", "0"], ["--samples 2", "--temperature 0"],
  ),
  "more samples than rows": (["{ok}", "--samples", "7"], ["rollout.samples=7", "rollout.rows=6"]),
  "no samples": (["{ok}", "--samples", "0"], ["rollout.samples=0"]),
  "half a sample": (["{ok}", "--samples", "1.5"], ["rollout.samples=1.5"]),
  "no question": (["{ok}", "--limit", "0"], ["eval.problems=0"]),
  "a negative temperature": (["{ok}", "--temperature", "-1"], ["eval.temperature=-1"]),
  "no temperature": (["{ok}", "--temperature", "nan"], ["eval.temperature=nan"]),
  "an empty nucleus": (["{ok}", "--top-p", "0"], ["eval.top_p=0"]),
  "a seed in words": (["{ok}", "--seed", "one"], ["--seed", "one"]),
  "a negative seed": (["{ok}", "--seed", "-1"], ["--seed -1"]),
  "a seed of 32 bits": (["{ok}", "--seed", "2147483648"], ["--seed 2147483648"]),
  "prompts without room": (["{ok}", "--max-prompt-tokens", "2"], ["rollout.max_prompt_tokens"]),
  "more than the context": (["{ok}", "--max-response-tokens", "61"], ["max_position=64"]),
  "a dtype that is none": (["{ok}", "--dtype", "int8"], ["int8", "bfloat16"]),
  "a file for an output": (["{ok}", "--output", "{folder}/config.json/a"], ["config.json/a"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_evaluated_is_said_in_one_line_and_leaves_nothing(
  refuse, folder, tmp_path, monkeypatch, case
):
  arguments, named = REFUSED[case]
  monkeypatch.chdir(tmp_path)
  full = []
  for argument in arguments:
    full += ["--model", "{folder}", "--task", "guess", *ROOM] if argument == "{ok}" else [argument]
  before = content(folder)
  said = refuse(*(a.format(folder=folder, tmp=tmp_path) for a in full))
  assert all(name in said for name in named), said
  assert not list(tmp_path.iterdir())
  assert content(folder) == before


def test_an_error_of_several_lines_becomes_one(refuse, folder, monkeypatch):
  monkeypatch.setattr(Guess, "__init__", lambda *_: (_ for _ in ()).throw(ValueError("a\n  b")))
  assert "error: a b" in refuse("--model", folder, "--task", "guess", *ROOM)


def test_broken_weights_are_said_in_one_line_and_leave_nothing(refuse, folder, tmp_path):
  broken = save(tmp_path / "hf", character_tokenizer(CHARSET))
  (weights,) = broken.glob("*.safetensors")
  weights.write_bytes(weights.read_bytes()[:-9])
  refuse("--model", broken, "--task", "guess", *ROOM, "--output", tmp_path / "a")
  assert not (tmp_path / "a").exists()


def parsed(*arguments):
  return evaluate._parser().parse_args(["--model", "owner/name", *arguments])


def configured(*arguments):
  return evaluate.configure(parsed(*arguments), evaluate.Source("owner/name"))


@pytest.mark.parametrize(("preset", "task", "samples", "temperature", "top_p", "context"), [
  ("gsm8k", "gsm8k", 16, 0.35, 0.9, 2047), ("math500", "math", 1, 0, 1, 2048),
  ("math500-sampled", "math", 16, 0.6, 0.95, 2048),
])  # fmt: skip
def test_presets_are_the_protocols_of_the_paper(preset, task, samples, temperature, top_p, context):
  config = configured("--preset", preset)
  assert (config.task.name, config.rollout.samples) == (task, samples)
  assert (config.eval.temperature, config.eval.top_p) == (temperature, top_p)
  assert config.row_tokens == context
  assert (config.rollout.stop == ("\n\n\nProblem:",)) == (preset == "gsm8k")


def test_an_option_beats_the_preset_and_set_beats_both():
  options = ["--task", "math", "--samples", "4", "--top-p", "0.5", "--max-response-tokens", "9"]
  config = configured("--preset", "gsm8k", *options, "--set", "eval.top_p=0.7")
  assert (config.task.name, config.rollout.samples) == ("math", 4)
  assert (config.eval.temperature, config.eval.top_p) == (0.35, 0.7)
  assert config.rollout.max_response_tokens == 9


def test_several_samples_are_drawn_at_the_temperature_of_the_configuration():
  assert configured("--task", "gsm8k").eval.temperature == 0
  assert configured("--task", "gsm8k", "--samples", "4").eval.temperature == 1
  assert configured("--task", "gsm8k", "--set", "eval.temperature=0.3").eval.temperature == 0.3


@pytest.mark.parametrize("text", ["Q: {question}\nA: [1, 2] # ok", "null", "1e3", '"\\n', "a=b: c"])
def test_texts_of_options_arrive_as_they_were_typed(text):
  config = configured("--task", "gsm8k", "--task-path", text, "--prompt", text, "--stop", text, "x")
  assert config.task.path == config.task.prompt == text
  assert config.rollout.stop == (text, "x")


def test_help_names_every_option(run, capsys):
  with pytest.raises(SystemExit) as stopped:
    run("--help")
  assert stopped.value.code == 0
  out = capsys.readouterr().out
  for option in ("model", "task", "split", "samples", "temperature", "top-p", "limit", "output",
                 "preset", "checkpoint", "task-path", "set", "rows", "stop", "seed"):  # fmt: skip
    assert f"--{option} " in out


def test_a_run_is_evaluated_as_it_evaluated_itself(run, finished, tmp_path):
  run_dir, _ = finished("chain")
  options = ["--temperature", 1, "--limit", 8, "--output", tmp_path / "a"]
  code, _, err = run("--model", run_dir, *options)
  assert (code, err) == (0, "")
  own = [json.loads(line) for line in
         (run_dir / "samples" / "iteration_000006.jsonl").read_text().splitlines()]  # fmt: skip
  fields = ("prompt", "response", "reward", "finished")
  assert [{name: row[name] for name in fields} for row in records(tmp_path / "a")[:2]] == own
  settings = summary(tmp_path / "a")["settings"]
  assert (settings["checkpoint"], settings["task"]["operations"]) == (6, 2)
  assert (settings["rows"], settings["max_response_tokens"]) == (8, 21)


def test_a_checkpoint_of_a_run_may_be_named(run, refuse, finished, tmp_path):
  run_dir, _ = finished("chain")
  command = ["--model", run_dir, "--temperature", 1, "--limit", 8]
  for step in (4, 6, "latest"):
    assert run(*command, "--checkpoint", step, "--output", tmp_path / str(step))[0] == 0
  texts = {s: [r["response"] for r in records(tmp_path / str(s))] for s in (4, 6, "latest")}
  assert texts["latest"] == texts[6] != texts[4]
  assert summary(tmp_path / "4")["settings"]["checkpoint"] == 4
  assert "4, 6" in refuse(*command, "--checkpoint", 5)
  assert "eval.validation_problems" in refuse(*command, "--checkpoint", "best")


def test_a_run_is_not_evaluated_with_the_tokenizer_of_another_task(refuse, finished):
  run_dir, _ = finished("chain")
  assert "task.name" in refuse("--model", run_dir, "--task", "guess")


def test_the_best_checkpoint_is_what_the_run_exported(run, train, config, tmp_path):
  run_dir = tmp_path / "run"
  settings = ["train.iterations=2", "eval.every=1", "eval.validation_problems=4"]
  result = train("--config", config, "--run-dir", run_dir, "--set", *settings)
  assert result.code == 0, result.err
  options = ["--temperature", 1, "--limit", 8]
  lengths = ["--rows", 8, "--max-prompt-tokens", 7, "--max-response-tokens", 21]
  exported = ["--model", run_dir / "model", "--task", "arithmetic", *lengths]
  best = tmp_path / "best"
  assert run("--model", run_dir, "--checkpoint", "best", *options, "--output", best)[0] == 0
  operations = ["--set", "task.operations=2"]
  assert run(*exported, *options, *operations, "--output", tmp_path / "model")[0] == 0
  assert records(best) == records(tmp_path / "model")
  step = json.loads((run_dir / "summary.json").read_text())["best"]["iteration"]
  assert summary(best)["settings"]["checkpoint"] == step


def test_a_run_keeps_its_own_lengths_under_a_preset(finished):
  source = evaluate.find_source(str(finished("chain")[0]), None)
  options = parsed("--preset", "gsm8k", "--task", "arithmetic", "--rows", "16")
  rollout = evaluate.configure(options, source).rollout
  assert (rollout.max_response_tokens, rollout.max_prompt_tokens, rollout.stop) == (21, 7, ())
  assert (rollout.samples, rollout.rows) == (16, 16)


def test_a_run_brings_its_task_and_lengths_and_nothing_that_only_training_wants(tmp_path):
  (tmp_path / "config.yaml").write_text("""
algorithm: tree
schedule: ["3: rollout.max_response_tokens=90"]
model: {path: owner/name}
task: {name: gsm8k, path: mine.jsonl, prompt: boxed, repeat_penalty: 2, unfinished_penalty: 1}
rollout: {samples: 5, rows: 6, max_response_tokens: 80}
spo: {branch_factors: [2, 3], segment_tokens: 70}
train: {iterations: 3, pack_tokens: 700}
sft: {max_steps: 6}
eval: {validation_problems: 4, temperature: 0.7}
""")
  source = evaluate.Source(str(tmp_path), load(tmp_path / "config.yaml"), step=3)
  config = evaluate.configure(parsed("--rows", "4", "--samples", "2"), source)
  assert (config.rollout.rows, config.rollout.max_response_tokens, config.schedule) == (4, 90, ())
  assert (config.sft.max_steps, config.eval.validation_problems) == (0, 0)
  assert (config.rollout.samples, config.eval.temperature) == (2, 0.7)
  assert (config.task.path, config.task.prompt) == ("mine.jsonl", "boxed")
  assert (config.task.repeat_penalty, config.task.unfinished_penalty) == (0, 0)
  longer = evaluate.configure(parsed("--max-response-tokens", "900"), source)
  assert longer.rollout.max_response_tokens == 900
  other = evaluate.configure(parsed("--task", "math"), source)
  assert (other.rollout.samples, other.eval.temperature) == (1, 0)
  assert (other.task.path, other.task.prompt) == (None, "default")


def test_grade_school_problems_of_ones_own_go_through_a_chat_free_template(run, tmp_path):
  rows = [{"question": f"What is {a} and {a}?", "answer": f"It is {2 * a}.\n#### {2 * a}"}
          for a in range(9)]  # fmt: skip
  for split in ("train", "test"):
    (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  tokenizer = bpe_tokenizer([text for row in rows for text in row.values()], 300)
  folder = save(tmp_path / "hf", tokenizer)
  code, _, err = run(
    "--model", folder, "--preset", "gsm8k", "--task-path", tmp_path, "--samples", 2, "--rows", 8,
    "--prompt", "{question}\n", "--max-prompt-tokens", 40, "--max-response-tokens", 8,
    "--limit", 3, "--output", tmp_path / "a",
  )  # fmt: skip
  assert (code, err) == (0, "")
  got = summary(tmp_path / "a")
  assert (got["questions"], got["samples"], got["settings"]["temperature"]) == (3, 2, 0.35)
  asked = [row["prompt"] for row in records(tmp_path / "a")[::2]]
  assert asked == [row["question"] for row in rows[:3]]
  assert got["left_out"] == {"test questions of more than 40 tokens": 0}


@pytest.mark.parametrize("split", ["test", "train"])
def test_data_of_one_split_alone_can_be_evaluated(run, tmp_path, split):
  rows = [{"question": f"What is {a} and {a}?", "answer": f"#### {2 * a}"} for a in range(12)]
  (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  tokenizer = bpe_tokenizer([text for row in rows for text in row.values()], 300)
  folder = save(tmp_path / "hf", tokenizer)
  code, _, err = run(
    "--model", folder, "--task", "gsm8k", "--task-path", tmp_path / f"{split}.jsonl", "--prompt",
    "{question}", *ROOM, "--max-prompt-tokens", 40, "--split", split, "--output", tmp_path / "a",
  )  # fmt: skip
  assert (code, err) == (0, "")
  assert len(records(tmp_path / "a")) == (12 if split == "test" else 11)  # one is for validation
