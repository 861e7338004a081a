"""What a run is made of: rows that can be shared out, folders that are found, problems that fit."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from runs import CONFIG

from spo_jax import experiment, hf
from spo_jax.config import ConfigError, TaskConfig, load
from spo_jax.experiment import build, check_rows
from spo_jax.sharding import AXES
from spo_jax.tasks import load_task
from spo_jax.tokenizer import character_tokenizer


def mesh(*sizes):
  return SimpleNamespace(shape=dict(zip(AXES, sizes)))


def test_all_rows_that_cannot_be_shared_out_are_named_at_once():
  config = load(None, ["rollout.rows=216", "train.micro_batch_rows=8"])
  with pytest.raises(ConfigError) as said:
    check_rows(config, mesh(2, 8, 1), mesh(16, 1, 1), training=True)
  text = str(said.value)
  assert "rollout.rows=216" in text and "train.micro_batch_rows=8" in text
  assert text.count("multiple of 16") == 2
  check_rows(config, mesh(2, 4, 1), mesh(8, 1, 1), training=True)


def test_a_model_in_the_home_folder_is_found(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert load(None, ["model.path=~/qwen"]).model.path == str(tmp_path / "qwen")
  assert load(None, ["model.path=owner/name~1"]).model.path == "owner/name~1"


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
  """generated(prompt tokens, response tokens) -> an experiment whose task has endless problems."""
  path = tmp_path_factory.mktemp("generated") / "config.yaml"
  path.write_text(CONFIG)
  made = build(load(path, [
    "task.name=countdown", "task.prompt=plain", "task.numbers=3", "task.largest=999",
    "model.tokenizer_tokens=290", "rollout.max_prompt_tokens=60", "rollout.max_response_tokens=120",
  ]))  # fmt: skip
  assert len(made.split("train")) > experiment._LISTED and not any(made.left_out.values())

  def make(prompt: int, response: int):
    rollout = dataclasses.replace(
      made.config.rollout, max_prompt_tokens=prompt, max_response_tokens=response
    )
    config = dataclasses.replace(made.config, rollout=rollout)
    return dataclasses.replace(made, config=config, left_out={}, _held_out={})

  return make


def test_another_stands_in_for_a_generated_question_that_is_too_long(generated):
  whole = generated(60, 120).questions(0, 64)
  longest = int(whole.lengths.max())
  fits = whole.lengths < longest
  shorter = generated(longest - 1, 120)
  taken = shorter.questions(0, 64)
  assert 0 < fits.sum() < 64 and taken.lengths.max() < longest
  same = [new == old for new, old in zip(taken.problems, whole.problems)]
  assert same == fits.tolist()
  counted = dict(shorter.left_out)
  assert list(counted.values()) == [64 - fits.sum()]
  assert shorter.questions(0, 64).problems == taken.problems and shorter.left_out == counted


@pytest.mark.parametrize("shorter", [1, 3])
def test_no_held_out_question_is_asked_twice_where_some_do_not_fit(generated, shorter):
  whole = generated(60, 120).held_out("test", 64)
  asked = generated(int(whole.lengths.max()) - shorter, 120).held_out("test", 64)
  assert asked.lengths.max() <= whole.lengths.max() - shorter
  assert len(set(asked.question.tolist())) == len(set(whole.question.tolist())) == 64


def test_another_stands_in_for_a_generated_demonstration_that_is_too_long(generated):
  _, _, mask = generated(60, 120).demonstrations(0, 64)
  longest = int(mask.sum(axis=1).max())
  _, is_token, mask = generated(60, longest - 1).demonstrations(0, 64)
  assert 0 < mask.sum(axis=1).max() < longest
  assert is_token.shape[1] == 60 + longest - 1


def test_where_no_question_fits_the_room_that_is_needed_is_named(generated):
  with pytest.raises(ValueError, match=r"rollout\.max_prompt_tokens=2 .*Raise it to \d"):
    generated(2, 120).questions(0, 4)


def test_accuracies_count_right_answers_whatever_penalties_take_off(monkeypatch, tmp_path):
  path = tmp_path / "config.yaml"
  path.write_text(CONFIG)
  made = build(load(path, ["task.unfinished_penalty=1", "eval.validation_problems=2"]))
  cut_off = np.array([False])
  response = made.split("validation")[:1], np.zeros((1, 4), np.int32), np.array([4]), cut_off
  assert made.engine.grade_fn(*response) == -1

  def flat(engine, params, prompts, samples, key):
    assert engine.grade_fn(*response) == 0
    raise StopIteration

  monkeypatch.setattr(experiment.validation.rollouts, "flat", flat)
  for accuracy in (made.test_accuracies, lambda *args: made.dev_accuracy(*args, 0.0)):
    with pytest.raises(StopIteration):
      accuracy(None, 2)


@pytest.fixture
def outgrown(tmp_path):
  """outgrown(...) -> a folder whose tokenizer was given special tokens that its model lacks."""

  def make(**special):
    tokenizer = character_tokenizer(load_task(TaskConfig(), seed=0).charset)
    config = dataclasses.replace(tiny.CONFIG, vocab_size=len(tokenizer), max_position=64)
    hf.save_pretrained(tmp_path / "m", config, tiny.params(config))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(tmp_path / "m")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return load(path, [f"model.path={tmp_path / 'm'}"])

  return make


def test_an_end_that_the_model_cannot_say_is_refused(outgrown):
  with pytest.raises(ValueError, match=r"end with token 17 .* its model has 17"):
    build(outgrown(eos_token="</s>"))


def test_padding_that_the_model_does_not_know_is_not_fed_to_it(outgrown):
  made = build(outgrown(pad_token="[PAD]"))
  assert made.tokenizer.pad_token_id == 17
  assert made.questions(0, 8).tokens.max() < 17 and made.engine.sampling.pad_id < 17


def test_problems_without_demonstrations_start_no_warm_start(tmp_path):
  rows = [{"nums": [1, 2, 3], "target": target} for target in (6, 7, 9)]
  for split in ("train", "test", "validation"):
    (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (tmp_path / "config.yaml").write_text(CONFIG)
  settings = ["task.name=countdown", f"task.path={tmp_path}", "rollout.max_prompt_tokens=400"]
  with pytest.raises(ValueError, match=r"no demonstrations to start from\. Set sft\.max_steps=0"):
    build(load(tmp_path / "config.yaml", [*settings, "model.tokenizer_tokens=290"]))


def test_where_no_generated_problem_fits_the_search_for_another_ends_soon(generated, monkeypatch):
  asked = []
  look = experiment.Experiment._lengths
  monkeypatch.setattr(
    experiment.Experiment, "_lengths", lambda *args: asked.append(len(args[1])) or look(*args)
  )
  with pytest.raises(ValueError, match=r"rollout\.max_prompt_tokens"):
    generated(2, 120).questions(0, 512)
  assert sum(asked) == 8 * 512
