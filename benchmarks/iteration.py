"""One whole GRPO iteration against TRL's GRPOTrainer and google-tunix's GRPOLearner.

    python -m venv trl && trl/bin/pip install trl torch==2.13.0     # a CPU build of torch
    python -m venv tunix && tunix/bin/pip install google-tunix==0.1.7
    python benchmarks/iteration.py 1m 7m --trl-python trl/bin/python --tunix-python tunix/bin/python
    python benchmarks/iteration.py 1m --longest 320 --slots 16 --pack-tokens 2048 ...

An iteration samples `--samples` responses to each of `--questions` prompts, rewards their text,
and takes one step of AdamW on the clipped objective, without a reference model. Every side starts
from the same weights, has the same prompts, computes in float32 on all cores, and trains in
micro-batches of `--micro-rows`. A side lives in an interpreter of its own and waits while another
has its turn.

No end is ever drawn, and every response has as many tokens. With `--longest` the model ends its
responses itself, as real ones do: lengths are geometric, their median a tenth of where they are
cut. They are drawn anew by every side in every turn, so their sums differ a little.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ends
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
  model_config: ModelConfig, params: Any, tokenizer: Any, tokens: np.ndarray, new: int,
  options: argparse.Namespace,
) -> Callable[[int], list[int]]:  # fmt: skip
  """A function that makes one iteration, as `spo_jax.train` does, and returns the tokens seen."""
  (questions, width), samples = tokens.shape, options.samples
  rows, slots = questions * samples, options.slots or questions * samples
  end_ids, reward, prompt_texts = (tokenizer.eos_token_id,), Reward(), words.texts(tokens)
  config = Config(
    algorithm="grpo",
    rollout=RolloutConfig(
      questions=questions, samples=samples, rows=slots, max_prompt_tokens=width,
      max_response_tokens=new, temperature=1.0,
    ),
    train=TrainConfig(
      batch_rows=rows, pack_tokens=options.pack_tokens, probability_mask=False, whiten=False,
      micro_batch_rows=len(jax.devices()) if options.pack_tokens else options.micro_rows,
    ),
    optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
  )  # fmt: skip

  def grade(problems: Any, drawn: np.ndarray, lengths: np.ndarray, _: Any) -> np.ndarray:
    texts = decode_responses(tokenizer, drawn, lengths, end_ids)
    return np.array(reward([prompt_texts[i] for i in problems], texts), np.float32)

  mesh = sharding.make_mesh(config.mesh)
  engine = Engine(model_config, Sampling(1.0, 1.0, end_ids, pad_id=0), slots, new, grade, mesh)
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
  rows, end, each = options.questions * options.samples, None, new
  params = jax.jit(lambda: model.init_params(config, jax.random.key(0)))()
  if options.longest:
    end, new, each = config.vocab_size - 1, options.longest, ends.mean_length(options.longest)
    params = ends.ending(config, params, end, each)
  tokenizer = words.tokenizer(config.vocab_size, end)
  tokens = np.random.default_rng(0).integers(
    0, config.vocab_size - 1, (options.questions, width), np.int32
  )
  print(
    f"{name}: {model.count_params(config) / 1e6:.1f} M parameters, {options.questions} prompts of "
    f"{width} tokens, {options.samples} responses of {each:.0f} tokens, {new} at most, "
    f"micro-batches of {options.micro_rows}, ours in packs of {options.pack_tokens}",
    flush=True,
  )
  sides: dict[str, Callable[[int], list[int]]] = {}
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as workers:
    hf.save_pretrained(folder, config, params, tokenizer)
    case = {
      "folder": folder, "prompts": words.texts(tokens), "samples": options.samples, "new": new,
      "micro_rows": options.micro_rows, "learning_rate": LEARNING_RATE,
    }  # fmt: skip
    for side in ("trl", "tunix"):
      if python := getattr(options, f"{side}_python"):
        worker = side_by_side.Worker(python, f"with_{side}.py", case)
        sides[side] = workers.enter_context(worker)
      else:
        print(f"  {side} is left out: no --{side}-python is given")
    rivals = list(sides)
    sides["spo_jax"] = ours(config, params, tokenizer, tokens, new, options)
    ratios = [(rival, "spo_jax") for rival in rivals]
    counted = side_by_side.compare(sides, round(rows * each), options.repeat, *ratios, warm_up=2)
  for side, turns in counted.items():
    drawn = [responses for _, responses in turns]
    print(f"  {side:9} drew {np.mean(drawn):,.0f} tokens a turn, {min(drawn)} to {max(drawn)}")
    assert all(prompts == rows * width for prompts, _ in turns), (side, turns)
    assert options.longest or set(drawn) == {rows * new}, (side, turns)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("cases", nargs="+", choices=CASES)
  parser.add_argument("--trl-python", help="an interpreter that has TRL")
  parser.add_argument("--tunix-python", help="an interpreter that has google-tunix")
  parser.add_argument("--questions", type=int, default=8)
  parser.add_argument("--samples", type=int, default=8)
  parser.add_argument("--micro-rows", type=int, default=16)
  parser.add_argument("--longest", type=int, default=0, help="responses end, or are cut here")
  parser.add_argument("--slots", type=int, default=0, help="of our sampler; 0: one per response")
  parser.add_argument("--pack-tokens", type=int, default=0, help="of our update; 0: no packs")
  parser.add_argument("--repeat", type=int, default=5)
  options = parser.parse_args()
  for name in options.cases:
    compare(name, options)


if __name__ == "__main__":
  main()
