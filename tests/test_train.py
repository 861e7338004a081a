"""The command line: what it refuses, what it promises beforehand, and what it leaves behind."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

import spo_jax
from spo_jax import hf, sampler
from spo_jax.config import load

pytest.register_assert_rewrite("runs")
pytest_plugins = ["runs"]

from runs import VARIANTS, final_state, metrics, summary  # noqa: E402

ALGORITHMS = sorted(VARIANTS)
KEYS = {
  "iteration", "rollout/reward_mean", "loss/policy", "loss/kl", "loss/clip_fraction",
  "mask/fraction", "tokens/prefilled", "tokens/decoded", "tokens/unique", "tokens/trained",
  "compile/count", "time/rollout_s", "time/grade_s", "time/update_s",
  "memory/kv_bytes",
}  # fmt: skip
ACCURACIES = {"greedy_accuracy", "sampled_accuracy"}

REFUSED = {
  "an unknown key": (["spo.treshold=0.5"], ["spo.treshold", "spo.threshold"]),
  "a wrong type": (["train.iterations=many"], ["train.iterations=many", "int"]),
  "an unknown algorithm": (["algorithm=chian"], ["chian", "chain"]),
  "a batch that does not divide": (["train.micro_batch_rows=3"], ["train.micro_batch_rows=3"]),
  "a tree larger than the rows": (
    ["algorithm=tree", "spo.branch_factors=[3,3]"], ["9 leaves", "rollout.rows=8"],
  ),
  "a prompt longer than the context": (
    ["rollout.max_prompt_tokens=4000"], ["rollout.max_prompt_tokens=4000", "model.max_position"],
  ),
  "a kernel of other devices": (["model.attention=splash"], ["model.attention=splash", "cpu"]),
  "an unknown task": (["task.name=arithmetik"], ["arithmetik", "arithmetic"]),
  "a prompt longer than its room": (
    ["rollout.max_prompt_tokens=6"], ["rollout.max_prompt_tokens=6", "7"],
  ),
  "a model that is not there": (["model.path=/no/such/model"], ["/no/such/model"]),
  "a demonstration longer than its room": (
    ["rollout.max_response_tokens=19"], ["rollout.max_response_tokens=19", "20"],
  ),
}  # fmt: skip


@pytest.fixture(params=ALGORITHMS)
def run(finished, request):
  """Run directory and result of one finished run of every algorithm."""
  return finished(request.param)


def records(run_dir):
  return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_said_in_one_line_before_anything_happens(
  refuse, config, tmp_path, case
):
  settings, named = REFUSED[case]
  said = refuse("--config", config, "--run-dir", tmp_path / "run", "--set", *settings)
  assert all(name in said for name in named), said
  assert not list(tmp_path.iterdir())


def test_a_folder_in_place_of_the_exported_model_is_named_before_training(refuse, config, tmp_path):
  mine = tmp_path / "run" / "model" / "mine.txt"
  mine.parent.mkdir(parents=True)
  mine.write_text("years of work")
  said = refuse("--config", config, "--run-dir", tmp_path / "run")
  assert str(mine.parent) in said and mine.read_text() == "years of work"
  assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_missing_config_file_is_named(refuse, tmp_path):
  assert str(tmp_path / "none.yaml") in refuse("--config", tmp_path / "none.yaml")


def test_room_for_demonstrations_is_not_asked_for_without_a_warm_start(train, config):
  settings = ["rollout.max_response_tokens=19", "sft.max_steps=0"]
  assert train("--config", config, "--dry-run", "--set", *settings).code == 0


def test_a_dry_run_prints_the_config_and_the_plan_and_makes_nothing(train, config, tmp_path):
  settings = ["algorithm=tree", "seed=5", "optimizer.learning_rate=3e-5", "train.pack_tokens=64"]
  result = train(
    "--config", config, "--dry-run", "--run-dir", tmp_path / "run", "--set", *settings, cwd=tmp_path
  )
  assert (result.code, result.err) == (0, "")
  assert not list(tmp_path.iterdir())
  printed, _, plan = result.out.partition("\n\n")
  (tmp_path / "printed.yaml").write_text(printed)
  assert load(tmp_path / "printed.yaml") == load(config, settings)
  assert spo_jax.__version__ in plan
  for words in ("6 iterations of 4 questions", "[2, 2]", "4 leaves", "8 rows at once",
                "4 rows in at most 2 packs of 64 tokens, 1 in a micro-batch"):  # fmt: skip
    assert words in plan


def test_help_names_every_option(train):
  result = train("--help")
  assert (result.code, result.err) == (0, "")
  for option in ("--config", "--set", "--run-dir", "--resume", "--dry-run"):
    assert option in result.out


def test_the_output_begins_with_config_version_devices_and_parameter_count(run):
  run_dir, result = run
  printed, _, rest = result.out.partition("\n\n")
  assert printed + "\n" == (run_dir / "config.yaml").read_text()
  version, model = rest.splitlines()[:2]
  assert spo_jax.__version__ in version and jax.__version__ in version and "cpu" in version
  assert "9,856 parameters" in model


def test_the_output_ends_with_a_table_and_where_the_run_is(run):
  run_dir, result = run
  for words in ("before", "after", "greedy accuracy", "sampled accuracy", "tokens", str(run_dir)):
    assert words in result.out[-1500:]
  assert result.err == ""


def test_a_run_directory_is_complete(run):
  run_dir, _ = run
  assert load(run_dir / "config.yaml").train.iterations == 6
  names = sorted(path.name for path in (run_dir / "samples").iterdir())
  assert names == [f"iteration_{i:06d}.jsonl" for i in (0, 3, 6)]
  for name in names:
    texts = [json.loads(line) for line in (run_dir / "samples" / name).read_text().splitlines()]
    assert len(texts) == 2
    assert all({"prompt", "response", "reward", "finished"} <= text.keys() for text in texts)
  assert any((run_dir / "tensorboard").glob("events.out.tfevents.*"))
  assert {path.name for path in (run_dir / "checkpoints" / "policy").iterdir()} == {"4", "6"}
  assert "<html" in (run_dir / "report.html").read_text()


def test_every_record_has_the_keys_that_others_read(run):
  first, *rest = records(run[0])
  assert [first["iteration"], *(record["iteration"] for record in rest)] == list(range(7))
  for record in rest:
    assert record.keys() >= KEYS
    for key in KEYS:
      assert math.isfinite(record[key]), key
  for record in (first, *rest):
    evaluated = {f"eval/{name}" for name in ACCURACIES} <= record.keys()
    assert evaluated == (record["iteration"] % 3 == 0)


def test_the_summary_says_what_the_metrics_say(run):
  run_dir, _ = run
  ours, all_records = summary(run_dir), records(run_dir)
  for when, record in (("initial", all_records[0]), ("final", all_records[-1])):
    assert ours[when] == {name: record[f"eval/{name}"] for name in ACCURACIES}
  assert ours["iterations"] == 6
  assert ours["seconds"] > 0
  counted = ("tokens/prefilled", "tokens/decoded", "tokens/trained")
  assert ours["tokens"] == sum(record[key] for record in all_records[1:] for key in counted)


def test_nothing_is_compiled_after_the_second_iteration(run):
  run_dir, result = run
  counts = [record["compile/count"] for record in records(run_dir)]
  assert counts[2:] == [counts[2]] * 5
  assert counts[0] < counts[2]
  compiled = dict(result.compiled)  # of any kind, the small ones outside our programs too
  assert [compiled[i] for i in range(2, 7)] == [compiled[2]] * 5


def test_no_token_is_computed_twice_in_a_rollout(run):
  for record in records(run[0])[1:]:
    assert record["tokens/prefilled"] + record["tokens/decoded"] == record["tokens/unique"] > 0
    # Each question's prompt once: 4 of 7 tokens.
    assert record["tokens/prefilled"] == 28


def test_the_most_memory_of_keys_and_values_is_logged(run):
  """What the slots hold, at least: they are as large as prompt and response together."""
  run_dir, _ = run
  config = load(run_dir / "config.yaml", [])
  slots = sampler.store_bytes(config.model, config.rollout.rows, config.row_tokens)
  logged = {record["memory/kv_bytes"] for record in records(run_dir)[1:]}
  assert len(logged) == 1 and slots < logged.pop() < 4 * slots


def test_the_last_policy_is_exported(finished):
  run_dir, _ = finished("chain")
  config, params = hf.load_pretrained(run_dir / "model")
  assert config.vocab_size == len(AutoTokenizer.from_pretrained(run_dir / "model"))
  trained = {leaf.tobytes() for leaf in final_state(run_dir)}
  assert all(np.asarray(leaf).tobytes() in trained for leaf in jax.tree.leaves(params))


def test_the_best_policy_by_validation_is_kept_and_exported(finished):
  run_dir, _ = finished("grpo")
  accuracy = {
    record["iteration"]: record["eval/validation_accuracy"]
    for record in records(run_dir)
    if "eval/validation_accuracy" in record
  }
  assert list(accuracy) == [0, 3, 6]
  best = max(accuracy, key=accuracy.__getitem__)  # the first of equals
  assert summary(run_dir)["best"] == {"iteration": best, "validation_accuracy": accuracy[best]}
  assert [path.name for path in (run_dir / "checkpoints" / "best").iterdir()] == [str(best)]
  _, params = hf.load_pretrained(run_dir / "model")
  last = {leaf.tobytes() for leaf in final_state(run_dir)}
  is_last = all(np.asarray(leaf).tobytes() in last for leaf in jax.tree.leaves(params))
  assert is_last == (best == 6)


def test_a_schedule_lets_responses_grow(train, config, tmp_path):
  settings = [
    "algorithm=grpo", "sft.max_steps=0", "train.iterations=3", "rollout.max_response_tokens=4",
    'schedule=["3: rollout.max_response_tokens=8"]',
  ]  # fmt: skip
  result = train("--config", config, "--run-dir", tmp_path, "--set", *settings)
  assert result.code == 0, result.err
  lengths = [record["rollout/length_mean"] for record in records(tmp_path)[1:]]
  assert max(lengths[:2]) <= 4 < lengths[2] <= 8


def test_the_divergence_is_measured_where_it_is_asked_for(finished):
  with_kl = [record["loss/kl"] for record in records(finished("grpo")[0])[1:]]
  assert with_kl[-1] > 0  # the policy has left its reference
  assert {record["loss/kl"] for record in records(finished("chain")[0])[1:]} == {0}
  assert (finished("grpo")[0] / "checkpoints" / "reference").exists()
  assert not (finished("chain")[0] / "checkpoints" / "reference").exists()


def test_the_seed_decides_everything(train, finished, config, tmp_path):
  """That equal seeds make equal runs: test_more_iterations_on_resume_equal_a_longer_run."""
  options = ["--config", config, "--run-dir", tmp_path, "--set"]
  assert train(*options, "seed=1", "train.iterations=1").code == 0
  other, ours = metrics(tmp_path), metrics(finished("chain")[0])
  assert other[1] != ours[1]
  assert metrics(tmp_path / "warm_start") != metrics(finished("chain")[0] / "warm_start")
