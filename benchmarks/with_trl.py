"""One GRPO iteration per turn with TRL's GRPOTrainer, see iteration.py: `with_trl.py CASE`.

Precision, loss and optimiser are those of the other sides, and what TRL turns on to save memory
and would only slow this model down (bfloat16, checkpointing, padding) is off.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from worker import Reward, Turns


class Paced(transformers.TrainerCallback):
  """Every optimiser step, its rollout included, waits until it is asked for."""

  def __init__(self, turns: Turns, reward: Reward):
    self.turns, self.reward = turns, reward

  def on_step_begin(self, *_: Any, **__: Any) -> None:
    self.turns.wait()

  def on_step_end(self, *_: Any, **__: Any) -> None:
    self.turns.answer(self.reward.take())


def main() -> None:
  case = json.loads(sys.argv[1])
  torch.set_num_threads(os.cpu_count() or 1)
  tokenizer = transformers.AutoTokenizer.from_pretrained(case["folder"])
  model = transformers.AutoModelForCausalLM.from_pretrained(case["folder"], dtype=torch.float32)
  rows = len(case["prompts"]) * case["samples"]
  settings = GRPOConfig(
    output_dir=tempfile.mkdtemp(), max_steps=2**30, learning_rate=case["learning_rate"],
    lr_scheduler_type="constant", per_device_train_batch_size=case["micro_rows"],
    gradient_accumulation_steps=rows // case["micro_rows"], num_generations=case["samples"],
    max_completion_length=case["new"], pad_to_multiple_of=None, beta=0.0, loss_type="dapo",
    gradient_checkpointing=False, bf16=False, use_cpu=True, logging_strategy="no",
    save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
  )  # fmt: skip
  reward = Reward()
  turns = Turns("trl", "transformers", "torch")
  GRPOTrainer(
    model, reward, settings, Dataset.from_dict({"prompt": case["prompts"]}),
    processing_class=tokenizer, callbacks=[Paced(turns, reward)],
  ).train()  # fmt: skip


if __name__ == "__main__":
  main()
