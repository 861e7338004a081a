"""What a run is made of: task, tokenizer, model and engine, built from the configuration.

Every random choice is a function of the seed, a purpose and a counter, so resuming needs no
generator state.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from spo_jax import evaluate, model, tokenizer
from spo_jax.config import Config, ModelConfig
from spo_jax.layout import behind_prompts, select
from spo_jax.rollouts import Engine
from spo_jax.structs import Prompts, Samples, Sampling
from spo_jax.tasks import Problem, Task, load_task, question_order


class Purpose(enum.IntEnum):
  """What a random stream is for; the numbers are part of what makes a run repeatable."""

  INIT = 0
  ROLLOUT = 1
  EVALUATE = 2
  DEMONSTRATE = 3
  SHUFFLE = 4
  DRAW = 5


@dataclass(frozen=True)
class Experiment:
  config: Config
  model_config: ModelConfig
  task: Task
  tokenizer: Any
  engine: Engine

  def key(self, purpose: Purpose, count: int = 0) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(self.config.seed), int(purpose))
    return jax.random.fold_in(key, count)

  def rng(self, purpose: Purpose, count: int = 0) -> np.random.Generator:
    return np.random.default_rng([self.config.seed, int(purpose), count])

  def init_params(self) -> model.Params:
    return model.init_params(self.model_config, self.key(Purpose.INIT))

  def questions(self, cursor: int, count: int) -> Prompts:
    """The training questions at positions cursor .. cursor + count - 1 of the seeded order."""
    problems = self.task.split("train")
    order = question_order(len(problems), self.config.seed, cursor, count)
    return self._prompts([problems[int(i)] for i in order])

  def held_out(self, split: str, count: int) -> Prompts:
    """The first `count` problems of a split, the same at every evaluation."""
    problems = self.task.split(split)
    return self._prompts([problems[i] for i in range(min(count, len(problems)))])

  def demonstrations(self, cursor: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows of the warm start: tokens, is_token and the mask of the response."""
    problems = self.task.split("train")
    order = question_order(
      len(problems), self.config.seed + int(Purpose.DEMONSTRATE), cursor, count
    )
    prompts = self._prompts([problems[int(i)] for i in order])
    texts = [str(problem.demonstration) for problem in prompts.problems]
    end = self.engine.sampling.end_ids[0]
    room = self.config.rollout.max_response_tokens
    tokens, lengths = tokenizer.encode_prompts(self.tokenizer, texts, room - 1)
    tokens = np.pad(tokens, ((0, 0), (0, 1)))
    tokens[np.arange(count), lengths] = end
    return behind_prompts(prompts, np.arange(count), tokens, lengths + 1)

  def test_accuracies(
    self, params: model.Params, count: int
  ) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Held-out figures, and a few sampled texts with their rewards."""
    prompts = self.held_out("test", count)
    settings = self.config.eval
    figures, sampled = evaluate.accuracies(
      self.engine, params, prompts, settings.temperature, settings.top_p,
      self.key(Purpose.EVALUATE),
    )  # fmt: skip
    shown = select(sampled, slice(settings.texts))
    return figures, evaluate.texts(prompts, shown, self._decode(shown.samples))

  def dev_accuracy(self, params: model.Params, count: int) -> float:
    """Sampled accuracy on the validation split."""
    settings = self.config.eval
    responses = evaluate.respond(
      self.engine, params, self.held_out("validation", count), settings.temperature,
      settings.top_p, self.key(Purpose.EVALUATE),
    )  # fmt: skip
    return evaluate.accuracy(responses)

  def _prompts(self, problems: Sequence[Problem]) -> Prompts:
    tokens, lengths = tokenizer.encode_prompts(
      self.tokenizer, [p.prompt for p in problems], self.config.rollout.max_prompt_tokens
    )
    uids = np.array([p.uid for p in problems], np.int64)
    return Prompts(tokens, lengths, uids, tuple(problems))

  def _decode(self, samples: Samples) -> list[str]:
    ends = self.engine.sampling.end_ids
    return tokenizer.decode_responses(self.tokenizer, samples.tokens, samples.lengths, ends)


def build(config: Config) -> Experiment:
  """Loads everything a run needs except parameters.

  Raises:
    ValueError: one line, where task, tokenizer and configuration do not fit together.
  """
  task = load_task(
    config.task.name, config.task.path, config.task.operations, config.task.unfinished_penalty,
    config.seed,
  )  # fmt: skip
  if task.charset is None:
    raise ValueError(f"task.name={config.task.name} needs a tokenizer; set model.path.")
  if config.model.path:
    raise ValueError(f"model.path={config.model.path}: only new models can be trained so far. "
                     "Set model.path=null.")  # fmt: skip
  tokens = tokenizer.character_tokenizer(task.charset)
  if config.model.vocab_size not in (0, len(tokens)):
    raise ValueError(f"model.vocab_size={config.model.vocab_size}, but the tokenizer has "
                     f"{len(tokens)} tokens. Set model.vocab_size=0.")  # fmt: skip
  model_config = dataclasses.replace(config.model, vocab_size=len(tokens))
  ends = tokenizer.eos_ids(tokens)
  rollout = config.rollout

  def grade(
    problems: Sequence[Problem], rows: np.ndarray, lengths: np.ndarray, finished: np.ndarray
  ) -> np.ndarray:
    responses = tokenizer.decode_responses(tokens, rows, lengths, ends)
    graded = zip(problems, responses, finished.tolist(), strict=True)
    return np.array([task.grade(*row).reward for row in graded], np.float32)

  sampling = Sampling(
    temperature=rollout.temperature,
    top_p=rollout.top_p,
    end_ids=ends,
    pad_id=int(tokens.pad_token_id),
    top_k=rollout.top_k,
    truncate=rollout.top_p < 1 or rollout.top_k > 0,
  )
  engine = Engine(model_config, sampling, rollout.rows, rollout.max_response_tokens, grade)
  experiment = Experiment(config, model_config, task, tokens, engine)
  _check_lengths(experiment)
  return experiment


_CHECKED = 512  # problems of a split, so that what does not fit is said before any compute


def _check_lengths(experiment: Experiment) -> None:
  """Raises ValueError for prompts and demonstrations that are longer than their rows."""
  config = experiment.config
  experiment.held_out("test", min(config.eval.problems, _CHECKED))
  problems = experiment.questions(cursor=0, count=_CHECKED).problems
  if config.sft.max_steps:
    experiment.held_out("validation", min(config.sft.check_problems, _CHECKED))
    texts = [str(problem.demonstration) for problem in problems]
    longest = 1 + max(map(len, experiment.tokenizer(texts)["input_ids"]))
    if longest > config.rollout.max_response_tokens:
      raise ValueError(
        f"a demonstration has {longest} tokens with its end, rollout.max_response_tokens="
        f"{config.rollout.max_response_tokens} cannot hold it. Raise it to {longest}."
      )
