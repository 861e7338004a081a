"""The side of Hugging Face `generate`, see rollouts.py and gpu.py: `with_generate.py CASE`.

The case has the folder of a model and prompts, for all cores; or a config, whose weights are drawn,
on a GPU where there is one: how long a step takes does not depend on them.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging
from worker import Turns


def model_and_prompts(case: dict[str, Any]) -> tuple[Any, torch.Tensor]:
  dtype = getattr(torch, case["dtype"])
  if "folder" in case:
    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(case["folder"], dtype=dtype)
    return model, torch.tensor(case["prompts"])
  config = AutoConfig.for_model(**case["config"])
  device = "cuda" if torch.cuda.is_available() else "cpu"
  with torch.device(device):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
  return model, torch.randint(config.vocab_size, (case["rows"], case["width"]), device=device)


def main() -> None:
  case = json.loads(sys.argv[1])
  logging.set_verbosity_error()  # it warns of the end id that no row can draw
  logging.disable_progress_bar()
  model, prompts = model_and_prompts(case)
  model.eval().generation_config.eos_token_id = None
  turns = Turns("torch", "transformers")
  while True:
    torch.manual_seed(turns.wait())
    with torch.inference_mode():
      rows = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, max_new_tokens=case["new"], use_cache=True, pad_token_id=0,
      )  # fmt: skip
    turns.answer(rows[:, prompts.shape[1] :].numel())


if __name__ == "__main__":
  main()
