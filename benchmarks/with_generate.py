"""The side of Hugging Face `generate` on a GPU, see gpu.py: `with_generate.py CASE`.

The weights are drawn, in bfloat16: how long a step takes does not depend on them.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging
from worker import Turns


def main() -> None:
  case = json.loads(sys.argv[1])
  logging.set_verbosity_error()  # it warns of the end id that no row can draw
  config = AutoConfig.for_model(**case["config"])
  device = "cuda" if torch.cuda.is_available() else "cpu"
  with torch.device(device):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
  model.generation_config.eos_token_id = None
  prompts = torch.randint(config.vocab_size, (case["rows"], case["width"]), device=device)
  turns = Turns("torch", "transformers")
  while True:
    torch.manual_seed(turns.wait())
    with torch.inference_mode():
      rows = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, max_new_tokens=case["new"], use_cache=True, pad_token_id=0,
      )  # fmt: skip
    turns.answer(rows[:, case["width"] :].numel())


if __name__ == "__main__":
  main()
