"""Hugging Face folders in and out: config.json and safetensors <-> ModelConfig and params.

Neither torch nor transformers is needed. Whatever a folder asks for and the model does not do
stops with one line: a model that loads computes what it should.
"""

from spo_jax.hf.configs import ARCHITECTURES, end_ids, export_family, parse_config, read_config
from spo_jax.hf.load import load_pretrained
from spo_jax.hf.save import is_replaceable, save_pretrained

__all__ = [
  "ARCHITECTURES", "end_ids", "export_family", "is_replaceable", "load_pretrained",
  "parse_config", "read_config", "save_pretrained",
]  # fmt: skip
