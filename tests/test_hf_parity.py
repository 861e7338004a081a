"""The same numbers as torch: random models of every family, drawn over shapes.

A missing torch fails here instead of skipping: nothing else proves what a folder means.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers import (
  AutoConfig,
  AutoModelForCausalLM,
  AutoTokenizer,
  GenerationConfig,
  LlamaConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from spo_jax import hf, model, sampler, tokenizer, update
from spo_jax.structs import Requests, Sampling

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DRAWN = [(family, seed) for family in FAMILIES for seed in (0, 1)] + [("llama", 2)]
LENGTHS = np.array([11, 4, 1, 7])  # of the right-padded rows
NEW = 64  # tokens of greedy continuations

torch.set_num_threads(1)  # the tests of this file run beside others


class Case(NamedTuple):
  folder: Any  # where transformers saved it
  torch_model: Any
  config: Any
  params: Any


def draw(family, seed):
  """Arguments of a random shape: seeds 0 and 1 of a family differ in tying, biases, head_dim and
  rotary scaling; llama 2 is as Llama 3.1, with every bias."""
  rng = np.random.default_rng([FAMILIES.index(family), seed])
  kv_heads, group, width = rng.integers(1, 4), rng.integers(1, 4), 2 * rng.integers(3, 7)
  heads = int(kv_heads * group)
  own_width = family == "qwen3" or seed == 1
  rope = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
  ][(seed + FAMILIES.index(family)) % 3]  # fmt: skip
  settings: dict[str, Any] = {
    "vocab_size": int(rng.integers(41, 90)),
    "hidden_size": heads * int(rng.integers(5, 12) if own_width else width),
    "intermediate_size": int(rng.integers(11, 40)),
    "num_hidden_layers": 2 - seed % 2,
    "num_attention_heads": heads,
    "num_key_value_heads": int(kv_heads),
    "max_position_embeddings": 256,
    "rms_norm_eps": float(rng.choice([1e-5, 1e-6])),
    "rope_parameters": {**rope, "rope_theta": float(rng.choice([1e3, 1e4, 1e6]))},
    "tie_word_embeddings": seed % 2 == 0,
    "bos_token_id": None,
    "eos_token_id": None,
  }
  if own_width:
    settings["head_dim"] = int(width)
  if family in ("llama", "qwen3"):
    settings["attention_bias"] = seed > 0
  if family == "llama":
    settings["mlp_bias"] = seed == 2
  if family == "mistral":
    settings["sliding_window"] = [None, 256][seed]  # that no position is beyond
  return settings


def random_torch_model(family, seed):
  """Weights large enough that greedy tokens vary and are no ties."""
  config = AutoConfig.for_model(family, **draw(family, seed))
  made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, weight in made.named_parameters():
      noise = torch.randn(weight.shape, generator=generator)
      if name.endswith("norm.weight"):
        weight.copy_(1 + 0.3 * noise)
      elif weight.ndim == 2 and "embed" not in name:
        # Queries and keys stay small: a hard softmax would multiply rounding errors.
        scale = 1 if name.endswith(("q_proj.weight", "k_proj.weight")) else 3
        weight.copy_(scale * noise / weight.shape[1] ** 0.5)
      else:
        weight.copy_(noise)
  return made


@pytest.fixture(
  scope="module",
  params=DRAWN,
  ids=lambda drawn: f"{drawn[0]}-{drawn[1]}",
)
def case(request, tmp_path_factory):
  torch_model = random_torch_model(*request.param)
  folder = tmp_path_factory.mktemp("saved")
  torch_model.save_pretrained(folder)
  return Case(folder, torch_model, *hf.load_pretrained(folder))


def batch(vocab_size):
  """Right-padded rows with garbage in the padding, and their mask."""
  rng = np.random.default_rng(vocab_size)
  tokens = rng.integers(0, vocab_size, (len(LENGTHS), LENGTHS.max()))
  return tokens, np.arange(LENGTHS.max()) < LENGTHS[:, None]


def torch_logits(torch_model, tokens, mask):
  with torch.no_grad():
    return torch_model(torch.tensor(tokens), attention_mask=torch.tensor(mask).int()).logits


def close(ours, theirs, atol=1e-4):
  np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol)


def test_logits_equal_torch(case):
  tokens, mask = batch(case.config.vocab_size)
  theirs = torch_logits(case.torch_model, tokens, mask).numpy()
  assert theirs.std() > 1  # a flat softmax would agree with anything
  close(tiny.logits(case.config, case.params, tokens, mask)[mask], theirs[mask])


def test_token_logprobs_equal_torch(case):
  tokens, mask = batch(case.config.vocab_size)
  ours = np.asarray(update.score_rows(case.config, case.params, tokens, mask, mask, 1.0))
  logprobs = torch_logits(case.torch_model, tokens, mask).log_softmax(-1).numpy()
  theirs = np.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], -1)[..., 0]
  close(ours[:, 1:][mask[:, 1:]], theirs[mask[:, 1:]])


def test_greedy_continuations_equal_torch(case):
  tokens, _ = batch(case.config.vocab_size)
  rows = np.arange(len(LENGTHS), dtype=np.int32)
  lengths = LENGTHS.astype(np.int32)
  store = sampler.prefill(case.config, case.params, tokens.astype(np.int32), lengths)
  nothing = np.zeros_like(rows)
  requests = Requests(
    pieces=rows[:, None], offsets=nothing[:, None], prefix=lengths,
    token=tokens[rows, lengths - 1].astype(np.int32), stop_state=nothing, ids=rows,
    limit=np.full_like(rows, NEW),
  )  # fmt: skip
  samples, _, _ = sampler.grow(
    case.config, case.params, (store,), requests, jax.random.key(0),
    Sampling(temperature=0.0, top_p=1.0, end_ids=(), pad_id=0),
    slots=2, width=LENGTHS.max() + NEW, max_tokens=NEW, keep=False,
  )  # fmt: skip
  left = np.stack([np.roll(row, -length) for row, length in zip(tokens, LENGTHS)])
  is_left = np.arange(LENGTHS.max()) >= LENGTHS.max() - LENGTHS[:, None]
  theirs = case.torch_model.generate(
    torch.tensor(left), attention_mask=torch.tensor(is_left).int(), max_new_tokens=NEW,
    do_sample=False, pad_token_id=0,
  )[:, LENGTHS.max() :].numpy()  # fmt: skip
  assert theirs.shape == (len(LENGTHS), NEW)
  np.testing.assert_array_equal(samples.tokens, theirs)
  assert len(np.unique(theirs)) > 4  # not one token over and over


def test_torch_loads_an_export_with_no_missing_or_unexpected_key(case, tmp_path):
  hf.save_pretrained(tmp_path / "m", case.config, case.params, max_shard_bytes=20_000)
  loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
  assert not any(report.values()), report
  assert type(loaded) is type(case.torch_model)
  assert loaded.dtype == torch.float32
  state = case.torch_model.state_dict()
  assert loaded.state_dict().keys() == state.keys()
  for name, weight in loaded.state_dict().items():
    assert torch.equal(weight, state[name]), name
  tokens, mask = batch(case.config.vocab_size)
  assert torch.equal(
    torch_logits(loaded, tokens, mask)[mask], torch_logits(case.torch_model, tokens, mask)[mask]
  )


def test_an_export_describes_the_model_that_was_loaded(case, tmp_path):
  hf.save_pretrained(tmp_path / "m", case.config, case.params)
  ours, theirs = (AutoConfig.from_pretrained(x).to_dict() for x in (tmp_path / "m", case.folder))
  theirs.setdefault("head_dim", ours["head_dim"])  # Qwen2 has none of its own
  ignored = {"transformers_version", "spo_jax_version", "sliding_window", "_name_or_path"}
  assert {k: v for k, v in ours.items() if k not in ignored} == {
    k: v for k, v in theirs.items() if k not in ignored
  }


@pytest.mark.parametrize("spelling", [("rope_parameters", "dtype"),
                                      ("rope_theta", "rope_scaling", "torch_dtype")])  # fmt: skip
def test_either_spelling_of_an_export_is_enough(case, tmp_path, spelling):
  hf.save_pretrained(tmp_path / "m", case.config, case.params)
  file = tmp_path / "m" / "config.json"
  both = AutoConfig.from_pretrained(tmp_path / "m")
  raw = json.loads(file.read_text())
  file.write_text(json.dumps({k: v for k, v in raw.items() if k not in spelling}))
  one = AutoConfig.from_pretrained(tmp_path / "m")
  assert one.rope_parameters == both.rope_parameters
  assert one.dtype == both.dtype == torch.float32
  assert hf.read_config(tmp_path / "m") == case.config


@pytest.mark.parametrize(("family", "dtype"), [
  ("llama", torch.bfloat16), ("mistral", torch.float16),
  ("qwen2", torch.float16), ("qwen3", torch.bfloat16),
])  # fmt: skip
def test_files_of_16_bits_hold_the_same_model(tmp_path, family, dtype):
  random_torch_model(family, 1).to(dtype).save_pretrained(tmp_path, max_shard_size="4KB")
  assert len([*tmp_path.glob("model-*.safetensors")]) > 2
  config, params = hf.load_pretrained(tmp_path)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  tokens, mask = batch(config.vocab_size)
  ours = tiny.logits(config, params, tokens, mask)
  close(ours[mask], torch_logits(theirs, tokens, mask)[mask])


@pytest.mark.parametrize(("dtype", "name"), [(jnp.bfloat16, "bfloat16"), (jnp.float16, "float16")])
def test_an_export_of_16_bits_has_the_same_bits_in_torch(tmp_path, dtype, name):
  params = jax.tree.map(lambda x: x.astype(dtype), tiny.params())
  hf.save_pretrained(tmp_path / "m", tiny.CONFIG, params)
  loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
  assert loaded.dtype == getattr(torch, name)
  ours = np.asarray(params["layers_0"]["mlp"]["up_proj"]["kernel"].astype(jnp.float32)).T
  np.testing.assert_array_equal(loaded.model.layers[0].mlp.up_proj.weight.float().detach(), ours)


@pytest.mark.parametrize(("theta", "width", "rope"), [
  (10_000.0, 128, {"rope_type": "default"}),
  (1_000_000.0, 64, {"rope_type": "linear", "factor": 4.0}),
  *[(500_000.0, width, {
      "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
    }) for factor, width in ((8.0, 128), (32.0, 64))],  # Llama 3.1 and 3.2
])  # fmt: skip
def test_rotary_frequencies_of_published_models_equal_transformers(tmp_path, theta, width, rope):
  config = LlamaConfig(
    hidden_size=2 * width, num_attention_heads=2, num_hidden_layers=1, head_dim=width,
    max_position_embeddings=131_072, rope_parameters={**rope, "rope_theta": theta},
    architectures=["LlamaForCausalLM"],
  )  # fmt: skip
  config.save_pretrained(tmp_path)
  ours = model.inverse_frequencies(hf.read_config(tmp_path))
  assert ours.dtype == np.float32
  np.testing.assert_allclose(ours, LlamaRotaryEmbedding(config).inv_freq.numpy(), rtol=1e-6)


def test_an_export_brings_its_tokenizer_and_ends(tmp_path):
  text = tokenizer.character_tokenizer("abcdef")
  hf.save_pretrained(tmp_path / "m", tiny.CONFIG, tiny.params(), text, end_ids=(1, 3))
  again = AutoTokenizer.from_pretrained(tmp_path / "m")
  assert again("fade")["input_ids"] == text("fade")["input_ids"]
  generation = GenerationConfig.from_pretrained(tmp_path / "m")
  assert (generation.eos_token_id, generation.pad_token_id) == ([1, 3], 0)
  loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
  assert loaded.generation_config.eos_token_id == [1, 3]
