"""What config.json and generation_config.json say, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny

from spo_jax import hf, tokenizer
from spo_jax.config import ConfigError, ModelConfig, RopeScaling

LLAMA = {
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40,
  "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6,
  "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
  "hidden_act": "silu",
}  # fmt: skip
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
           "sliding_window": None}  # fmt: skip
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8}
LLAMA3_SCALING = {
  "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 256,
}  # fmt: skip
SHAPE = ModelConfig(
  family="llama", vocab_size=40, hidden_size=24, intermediate_size=20, num_layers=3, num_heads=6,
  num_kv_heads=2, norm_eps=1e-5, tie_embeddings=False, max_position=512,
)  # fmt: skip


def describe(folder, raw):
  (folder / "config.json").write_text(json.dumps(raw))
  return folder


def refusal(function, *args):
  """The message of a ConfigError, which is one line."""
  with pytest.raises(ConfigError) as caught:
    function(*args)
  message = str(caught.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize(("raw", "changes"), [
  (LLAMA, {}),
  ({**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
   {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "tie_embeddings": True}),
  ({**LLAMA, "head_dim": 10}, {"head_dim": 10}),
  ({**LLAMA, "head_dim": 4}, {}),
  ({**LLAMA, "head_dim": None, "rope_scaling": None, "quantization_config": None}, {}),
  ({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, {"num_kv_heads": 6}),
  ({k: v for k, v in LLAMA.items() if k != "rms_norm_eps"}, {"norm_eps": 1e-6}),
  (MISTRAL, {"family": "mistral"}),
  ({**MISTRAL, "sliding_window": 512}, {"family": "mistral"}),
  (QWEN2, {"family": "qwen2", "qkv_bias": True}),
  ({**QWEN2, "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 2},
   {"family": "qwen2", "qkv_bias": True}),
  ({**QWEN2, "use_sliding_window": True, "sliding_window": 64,
    "layer_types": ["full_attention"] * 3}, {"family": "qwen2", "qkv_bias": True}),
  (QWEN3, {"family": "qwen3", "qk_norm": True, "head_dim": 8}),
  ({k: v for k, v in QWEN3.items() if k != "head_dim"},
   {"family": "qwen3", "qk_norm": True, "head_dim": 128}),
  ({**QWEN3, "attention_bias": True},
   {"family": "qwen3", "qk_norm": True, "head_dim": 8, "qkv_bias": True, "o_bias": True}),
])  # fmt: skip
def test_config_is_read_without_weights(tmp_path, raw, changes):
  assert hf.read_config(describe(tmp_path, raw)) == dataclasses.replace(SHAPE, **changes)


@pytest.mark.parametrize("rope", [
  {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
  {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}},
  {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 5e5}, "rope_theta": 5e5,
   "rope_scaling": LLAMA3_SCALING},
])  # fmt: skip
def test_both_spellings_of_rotary_parameters_are_read(tmp_path, rope):
  config = hf.read_config(describe(tmp_path, {**LLAMA, **rope}))
  assert config.rope_theta == 5e5
  assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 256)


@pytest.mark.parametrize(("rope", "expected"), [
  ({}, (1e4, RopeScaling())),
  ({"rope_theta": 1000000}, (1e6, RopeScaling())),
  ({"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 4}},
   (2e4, RopeScaling("linear", 4.0))),
  ({"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e3}},
   (1e3, RopeScaling("linear", 2.5))),
  ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}}, (1e3, RopeScaling())),
  ({"rope_theta": 1e3, "rope_parameters": {"rope_theta": 2e3}}, (2e3, RopeScaling())),
])  # fmt: skip
def test_rotary_parameters_have_the_defaults_of_transformers(tmp_path, rope, expected):
  config = hf.read_config(describe(tmp_path, {**LLAMA, **rope}))
  assert (config.rope_theta, config.rope_scaling) == expected


@pytest.mark.parametrize(("raw", "words"), [
  ({**LLAMA, "architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
   ["GemmaForCausalLM", "Qwen3ForCausalLM"]),
  ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]},
   ["LlamaForSequenceClassification", "LlamaForCausalLM"]),
  ({**LLAMA, "model_type": "qwen2_moe", "architectures": None}, ["qwen2_moe"]),
  ({**LLAMA, "model_type": ["llama"]}, ["model_type"]),
  ({**MISTRAL, "sliding_window": 256}, ["sliding_window=256", "max_position_embeddings=512"]),
  ({**{k: v for k, v in MISTRAL.items() if k != "sliding_window"},
    "max_position_embeddings": 8192}, ["sliding_window=4096"]),
  ({**MISTRAL, "sliding_window": "wide"}, ["sliding_window='wide'"]),
  ({**QWEN2, "use_sliding_window": True, "sliding_window": 256}, ["sliding_window=256"]),
  ({**QWEN3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
   ["sliding_attention", "full_attention"]),
  ({**LLAMA, "layer_types": 7}, ["layer_types has 7"]),
  ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "llama3"]),
  ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, ["'dynamic'", "linear"]),
  ({**LLAMA, "rope_parameters": {"rope_type": "longrope"}}, ["'longrope'"]),
  ({**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
   ["rope_parameters", "full_attention"]),
  ({**LLAMA, "rope_scaling": {"rope_type": "linear"}}, ["lacks factor"]),
  ({**LLAMA, "rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 4.0}}, ["high_freq_factor=4.0"]),
  ({**LLAMA, "rope_scaling": {**LLAMA3_SCALING, "factor": "8"}}, ["factor='8'"]),
  ({**LLAMA, "rope_scaling": "linear"}, ["'linear'"]),
  ({**LLAMA, "partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
  ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.25}}, ["partial_rotary_factor=0.25"]),
  ({**LLAMA, "hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
  ({**LLAMA, "is_causal": False}, ["is_causal=false"]),
  ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, ["quantization_config", "bfloat16"]),
  ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, ["lacks vocab_size"]),
  ({k: v for k, v in QWEN2.items() if k != "num_key_value_heads"}, ["lacks num_key_value_heads"]),
  ({**LLAMA, "hidden_size": "24"}, ["hidden_size='24'", "integer"]),
  ({**LLAMA, "hidden_size": 24.5}, ["hidden_size=24.5"]),
  ({**LLAMA, "hidden_size": True}, ["hidden_size=True"]),
  ({**LLAMA, "hidden_size": 25}, ["lacks head_dim"]),
  ({**LLAMA, "num_hidden_layers": 0}, ["num_hidden_layers=0"]),
  ({**LLAMA, "rms_norm_eps": float("nan")}, ["rms_norm_eps=nan"]),
  ({**LLAMA, "num_key_value_heads": 4}, ["num_key_value_heads=4"]),
  ({**LLAMA, "head_dim": 5}, ["head_dim=5"]),
  ({**LLAMA, "tie_word_embeddings": "yes"}, ["tie_word_embeddings='yes'"]),
])  # fmt: skip
def test_what_is_not_supported_stops_with_one_line(tmp_path, raw, words):
  message = refusal(hf.read_config, describe(tmp_path, raw))
  for word in [str(tmp_path / "config.json"), *words]:
    assert word in message


@pytest.mark.parametrize("text", ["{", "[1]", "\ufffe"])
def test_a_broken_config_stops_with_one_line(tmp_path, text):
  assert "config.json cannot be read" in refusal(hf.read_config, tmp_path)
  (tmp_path / "config.json").write_text(text)
  assert "JSON" in refusal(hf.read_config, tmp_path)


def test_a_model_that_is_nowhere_stops_with_one_line(tmp_path):
  file = tmp_path / "file"
  file.touch()
  for name in (str(tmp_path / "nowhere"), "a/b/c", str(file)):
    for function in (hf.read_config, hf.load_pretrained):
      assert name in refusal(function, name)
  assert "hub" in refusal(hf.load_pretrained, "no-such/model")


@pytest.mark.parametrize(("stored", "own", "expected"), [
  (None, 1, (1,)),
  ({}, 1, (1,)),
  ({"eos_token_id": 7}, 1, (7, 1)),
  ({"eos_token_id": [5, 1, 7]}, 1, (5, 1, 7)),
  ({"eos_token_id": [5, 7]}, None, (5, 7)),
  ({"eos_token_id": None}, 1, (1,)),
])  # fmt: skip
def test_end_ids_are_those_of_the_folder_and_the_tokenizer(tmp_path, stored, own, expected):
  text = tokenizer.character_tokenizer("ab")
  assert text.eos_token_id == 1
  if own is None:
    text.eos_token = None
  if stored is not None:
    # Where that file is missing transformers reads the other one.
    for name in ("config.json", "generation_config.json"):
      (tmp_path / name).write_text(json.dumps(stored))
      assert hf.end_ids(tmp_path, text) == expected
      (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
  else:
    assert hf.end_ids(tmp_path, text) == expected


@pytest.mark.parametrize("stored", [{}, {"eos_token_id": "</s>"}, {"eos_token_id": [1, -2]}])
def test_end_ids_that_are_none_stop_with_one_line(tmp_path, stored):
  text = tokenizer.character_tokenizer("ab")
  text.eos_token = None
  (tmp_path / "generation_config.json").write_text(json.dumps(stored))
  assert "eos_token_id" in refusal(hf.end_ids, tmp_path, text)


@pytest.mark.parametrize(("ids", "stored", "expected"), [
  ((), 1, (1,)), ((3, 1), [3, 1], (3, 1)), ((2,), 2, (2, 1))
])  # fmt: skip
def test_an_export_keeps_end_ids(tmp_path, ids, stored, expected):
  text = tokenizer.character_tokenizer("abcdef")
  hf.save_pretrained(tmp_path / "m", tiny.CONFIG, tiny.params(), text, end_ids=ids)
  written = json.loads((tmp_path / "m" / "generation_config.json").read_text())
  assert written == {"eos_token_id": stored, "pad_token_id": 0}
  assert hf.end_ids(tmp_path / "m", text) == expected
