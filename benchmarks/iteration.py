"""One whole GRPO iteration against TRL's GRPOTrainer and google-tunix's GRPOLearner.

    python -m venv trl && trl/bin/pip install trl torch==2.13.0     # a CPU build of torch
    python -m venv tunix && tunix/bin/pip install google-tunix==0.1.7
    python benchmarks/iteration.py 1m 7m --trl-python trl/bin/python --tunix-python tunix/bin/python

An iteration samples `--samples` responses to each of `--questions` prompts, rewards their text,
and takes one step of AdamW on the clipped objective, without a reference model. Every side starts
from the same weights, has the same prompts and the same number of tokens (no end is ever drawn),
computes in float32 on all cores, and trains in micro-batches of `--micro-rows`. A side lives in an
interpreter of its own and waits while another has its turn.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import side_by_side
import words
from rollouts import CASES
from worker import Reward

from spo_jax import hf, model, sharding, update
from spo_jax.algorithms import collect
from spo_jax.config import Config, ModelConfig, OptimizerConfig, RolloutConfig, TrainConfig
from spo_jax.experiment import Experiment
from spo_jax.packing import EdgeBuffer
from spo_jax.rollouts import Engine
from spo_jax.structs import Prompts, Sampling
from spo_jax.tokenizer import decode_responses
from spo_jax.train import learn

LEARNING_RATE = 1e-6


def ours(
  model_config: ModelConfig, params: Any, tokens: np.ndarray, samples: int, new: int,
  micro_rows: int,
) -> Callable[[int], list[int]]:  # fmt: skip
  """A function that makes one iteration, as `spo_jax.train` does, and returns the tokens seen."""
  questions, width = tokens.shape
  rows, tokenizer = questions * samples, words.tokenizer(model_config.vocab_size)
  ends, reward, prompt_texts = (tokenizer.eos_token_id,), Reward(), words.texts(tokens)
  config = Config(
    algorithm="grpo",
    rollout=RolloutConfig(
      questions=questions, samples=samples, rows=rows, max_prompt_tokens=width,
      max_response_tokens=new, temperature=1.0,
    ),
    train=TrainConfig(
      batch_rows=rows, micro_batch_rows=micro_rows, probability_mask=False, whiten=False
    ),
    optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
  )  # fmt: skip

  def grade(problems: Any, drawn: np.ndarray, lengths: np.ndarray, _: Any) -> np.ndarray:
    texts = decode_responses(tokenizer, drawn, lengths, ends)
    return np.array(reward([prompt_texts[i] for i in problems], texts), np.float32)

  mesh = sharding.make_mesh(config.mesh)
  engine = Engine(model_config, Sampling(1.0, 1.0, ends, pad_id=0), rows, new, grade, mesh)
  experiment = Experiment(config, model_config, None, tokenizer, "", engine, mesh)
  prompts = Prompts(
    tokens, np.full(questions, width, np.int32), np.arange(questions), tuple(range(questions))
  )
  optimizer = update.make_optimizer(config.optimizer)
  state = update.init_state(params, optimizer)
  state = jax.device_put(state, sharding.placements(state, mesh))
  run: Any = SimpleNamespace(
    experiment=experiment, state=state, reference=None, optimizer=optimizer
  )
  buffer = EdgeBuffer(quota=0, max_age=0)  # of trees only

  def iterate(turn: int) -> list[int]:
    with jax.set_mesh(mesh):
      drawn, _ = collect(experiment, run.state.params, prompts, turn, buffer)
      learn(run, drawn, turn)
      jax.block_until_ready(run.state)
    return reward.take()

  return iterate


def compare(name: str, options: argparse.Namespace) -> None:
  config, _, width, new = CASES[name]
  rows = options.questions * options.samples
  params = jax.jit(lambda: model.init_params(config, jax.random.key(0)))()
  tokens = np.random.default_rng(0).integers(
    0, config.vocab_size, (options.questions, width), np.int32
  )
  print(
    f"{name}: {model.count_params(config) / 1e6:.1f} M parameters, {options.questions} prompts of "
    f"{width} tokens, {options.samples} responses of {new}, micro-batches of {options.micro_rows}",
    flush=True,
  )
  sides: dict[str, Callable[[int], list[int]]] = {}
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as workers:
    hf.save_pretrained(folder, config, params, words.tokenizer(config.vocab_size))
    case = {
      "folder": folder, "prompts": words.texts(tokens), "samples": options.samples, "new": new,
      "micro_rows": options.micro_rows, "learning_rate": LEARNING_RATE,
    }  # fmt: skip
    for side in ("trl", "tunix"):
      if python := getattr(options, f"{side}_python"):
        worker = side_by_side.Worker(python, f"with_{side}.py", case)
        sides[side] = workers.enter_context(worker)
        print("  " + ", ".join(f"{name} {found}" for name, found in worker.versions.items()))
      else:
        print(f"  {side} is left out: no --{side}-python is given")
    rivals = list(sides)
    sides["spo_jax"] = ours(config, params, tokens, options.samples, new, options.micro_rows)
    ratios = [(rival, "spo_jax") for rival in rivals]
    counted = side_by_side.compare(sides, rows * new, options.repeat, *ratios, warm_up=2)
  for side, turns in counted.items():
    assert all(found == [rows * width, rows * new] for found in turns), (side, turns)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("cases", nargs="+", choices=CASES)
  parser.add_argument("--trl-python", help="an interpreter that has TRL")
  parser.add_argument("--tunix-python", help="an interpreter that has google-tunix")
  parser.add_argument("--questions", type=int, default=8)
  parser.add_argument("--samples", type=int, default=8)
  parser.add_argument("--micro-rows", type=int, default=16)
  parser.add_argument("--repeat", type=int, default=5)
  options = parser.parse_args()
  for name in options.cases:
    compare(name, options)


if __name__ == "__main__":
  main()
