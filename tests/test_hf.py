"""Weights in and out without torch; test_hf_parity.py compares the numbers with torch."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from spo_jax import hf, model
from spo_jax.config import ConfigError

ROOT = Path(__file__).parents[1]
MODELS = {
  "llama": tiny.LLAMA,
  "llama3.1": tiny.LLAMA31,
  "linear": tiny.LINEAR,
  "mistral": dataclasses.replace(tiny.LLAMA, family="mistral", tie_embeddings=False),
  "qwen2": tiny.CONFIG,
  "qwen3": dataclasses.replace(tiny.QWEN3, tie_embeddings=False),
}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())


def rewrite(folder, change, name="model.safetensors"):
  """Changes the tensors of a file of weights."""
  tensors = load_file(folder / name)
  change(tensors)
  save_file(tensors, folder / name)


def refusal(function, *args):
  """The message of a ConfigError, which is one line."""
  with pytest.raises(ConfigError) as caught:
    function(*args)
  message = str(caught.value)
  assert "\n" not in message
  return message


def assert_bitwise(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def saved(tmp_path):
  """A folder of an untied model with biases."""
  hf.save_pretrained(tmp_path / "model", tiny.CONFIG, tiny.params())
  return tmp_path / "model"


@pytest.fixture
def tied(tmp_path):
  hf.save_pretrained(tmp_path / "model", tiny.LLAMA, tiny.params(tiny.LLAMA))
  return tmp_path / "model"


# Weights


@every_model
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 3_000], ids=["one-file", "files"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_load_save_load_is_bitwise(tmp_path, config, max_shard_bytes, dtype):
  params = jax.tree.map(lambda x: x.astype(dtype), tiny.params(config))
  hf.save_pretrained(tmp_path / "a", config, params, max_shard_bytes=max_shard_bytes)
  read, loaded = hf.load_pretrained(tmp_path / "a", dtype)
  assert_bitwise(loaded, params)
  assert read == hf.read_config(tmp_path / "a")
  assert read.family != "auto"
  assert dataclasses.replace(read, family=config.family) == config

  hf.save_pretrained(tmp_path / "b", read, loaded, max_shard_bytes=max_shard_bytes)
  assert_bitwise(hf.load_pretrained(tmp_path / "b", dtype)[1], params)
  for file in (tmp_path / "a").iterdir():
    assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
  shards = len([*(tmp_path / "a").glob("*.safetensors")])
  assert (shards > 2) if max_shard_bytes == 3_000 else (shards == 1)


def test_files_hold_what_torch_calls_weights(saved):
  params, stored = tiny.params(), load_file(saved / "model.safetensors")
  attention = params["layers_1"]["self_attn"]
  np.testing.assert_array_equal(
    stored["model.layers.1.self_attn.k_proj.weight"], np.asarray(attention["k_proj"]["kernel"]).T
  )
  np.testing.assert_array_equal(
    stored["model.layers.1.self_attn.k_proj.bias"], attention["k_proj"]["bias"]
  )
  np.testing.assert_array_equal(stored["lm_head.weight"], np.asarray(params["lm_head"]).T)
  np.testing.assert_array_equal(stored["model.embed_tokens.weight"], params["embed_tokens"])
  np.testing.assert_array_equal(stored["model.norm.weight"], params["norm"]["weight"])
  with safe_open(saved / "model.safetensors", "np") as file:
    assert file.metadata()["format"] == "pt"
  assert len({file.stat().st_mode for file in saved.iterdir()}) == 1  # readable by the same people


def test_an_index_names_the_file_of_every_tensor(tmp_path):
  hf.save_pretrained(tmp_path / "m", tiny.CONFIG, tiny.params(), max_shard_bytes=3_000)
  index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
  held = {name: file.name for file in (tmp_path / "m").glob("*.safetensors")
          for name in load_file(file)}  # fmt: skip
  assert index["weight_map"] == held
  assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(tiny.params()))
  sizes = [sum(x.nbytes for x in load_file(file).values())
           for file in (tmp_path / "m").glob("*.safetensors")]  # fmt: skip
  assert max(sizes) <= 3_000


def test_only_the_arrays_of_one_file_are_on_the_host_at_once(tmp_path, monkeypatch):
  held = []  # (bytes, weak reference) of every array that was fetched

  def fetch(leaf):
    array = np.array(leaf, order="F")  # whose transpose is written as it lies, without a copy
    held.append((array.nbytes, weakref.ref(array)))
    alive.append(sum(size for size, array in held if array() is not None))
    return array

  alive = []
  monkeypatch.setattr(hf.save, "to_host", fetch)
  hf.save_pretrained(tmp_path / "m", tiny.CONFIG, tiny.params(), max_shard_bytes=3_000)
  assert max(alive) <= 2 * 3_000 < 0.5 * sum(size for size, _ in held)


def test_other_processes_take_part_in_every_array_and_write_nothing(tmp_path, monkeypatch):
  fetched = []
  monkeypatch.setattr(hf.save, "is_main", lambda: False)
  monkeypatch.setattr(hf.save, "to_host", fetched.append)
  hf.save_pretrained(tmp_path / "m", tiny.CONFIG, tiny.params())
  assert len(fetched) == len(jax.tree.leaves(tiny.params())) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_parameters_have_the_dtype_asked_for(saved, wanted):
  _, params = hf.load_pretrained(saved, wanted)
  assert_bitwise(params, jax.tree.map(lambda x: x.astype(wanted), tiny.params()))


def test_a_tied_model_has_no_head_in_its_file_and_may_have_one(tied, monkeypatch):
  assert "lm_head.weight" not in load_file(tied / "model.safetensors")
  embedding = "model.embed_tokens.weight"
  rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].copy()}))
  assert_bitwise(hf.load_pretrained(tied)[1], tiny.params(tiny.LLAMA))
  monkeypatch.setattr("spo_jax.hf.load._ROWS", 3)  # compared in blocks: the last one counts too
  assert_bitwise(hf.load_pretrained(tied)[1], tiny.params(tiny.LLAMA))
  last = np.eye(8, 16, -7, np.float32)
  for change in (lambda x: x + last, lambda x: x[:-1], lambda x: x.astype(np.float16)):
    head = np.ascontiguousarray(change(load_file(tied / "model.safetensors")[embedding]))
    rewrite(tied, lambda tensors, head=head: tensors.update({"lm_head.weight": head}))
    message = refusal(hf.load_pretrained, tied)
    assert "lm_head.weight differs" in message
    assert "tie_word_embeddings" in message


def test_rotary_buffers_of_old_files_are_ignored(saved):
  buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
  rewrite(saved, lambda tensors: tensors.update(buffer))
  assert_bitwise(hf.load_pretrained(saved)[1], tiny.params())


@pytest.mark.parametrize(("change", "words"), [
  (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
   ["model.layers.1.mlp.up_proj.weight", "missing"]),
  (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
  (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((2, 2), np.float32)}),
   ["model.layers.2.mlp.up_proj.weight", "no part"]),
  (lambda t: t.update({"model.norm.weight": np.zeros(17, np.float32)}),
   ["model.norm.weight", "[17]", "[16]"]),
  (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.copy()}),
   ["lm_head.weight", "[16, 8]", "[8, 16]"]),
  (lambda t: t.update({"model.norm.weight": np.zeros(16, np.int8)}), ["model.norm.weight", "I8"]),
])  # fmt: skip
def test_tensors_that_are_not_the_models_stop_with_one_line(saved, change, words):
  rewrite(saved, change)
  message = refusal(hf.load_pretrained, saved)
  for word in [str(saved), "model.safetensors", *words]:
    assert word in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_stops_with_one_line(saved, keep):
  file = saved / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  assert str(file) in refusal(hf.load_pretrained, saved)


def test_files_that_an_index_names_wrongly_stop_with_one_line(tmp_path):
  saved = tmp_path / "model"
  hf.save_pretrained(saved, tiny.CONFIG, tiny.params(), max_shard_bytes=3_000)
  index = saved / "model.safetensors.index.json"
  first, second = sorted(file.name for file in saved.glob("*.safetensors"))[:2]
  tensor = next(iter(load_file(saved / first)))
  spare = {"model.norm.weight": np.ones(16, np.float32)}

  def add_twice():
    for name in (first, second):
      rewrite(saved, lambda tensors: tensors.update(spare), name)

  backup = tmp_path / "backup"
  shutil.copytree(saved, backup)
  for damage, words in [
    (lambda: (saved / first).unlink(), [str(index), tensor, first, "missing"]),
    (lambda: rewrite(saved, lambda tensors: tensors.pop(tensor), first), [tensor, "missing"]),
    (add_twice, ["model.norm.weight", first, second]),
    (lambda: index.write_text('{"weight_map": []}'), [str(index), "weight_map"]),
    (lambda: index.unlink(), [str(saved), "model.safetensors"]),
  ]:
    shutil.rmtree(saved)
    shutil.copytree(backup, saved)
    damage()
    message = refusal(hf.load_pretrained, saved)
    for word in words:
      assert word in message


# Saving


def test_what_is_not_the_model_is_not_saved(tmp_path):
  params = tiny.params()
  for wrong, word in [
    ({k: v for k, v in params.items() if k != "norm"}, "norm/weight is missing"),
    ({**params, "value_head": params["norm"]}, "value_head/weight is no part"),
    ({**params, "lm_head": params["lm_head"].T}, "lm_head is of shape [8, 16]"),
    ({**params, "lm_head": params["lm_head"].astype(jnp.int32)}, "lm_head is int32"),
  ]:
    assert word in refusal(hf.save_pretrained, tmp_path / "model", tiny.CONFIG, wrong)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("changes", "family"), [
  ({}, "llama"),
  ({"qkv_bias": True, "o_bias": True, "mlp_bias": True}, "llama"),
  ({"head_dim": 6}, "llama"),
  ({"family": "mistral"}, "mistral"),
  ({"hidden_size": 18, "head_dim": 6}, "mistral"),
  ({"qkv_bias": True}, "qwen2"),
  ({"qk_norm": True}, "qwen3"),
  ({"qk_norm": True, "qkv_bias": True, "o_bias": True}, "qwen3"),
  ({"qk_norm": True, "mlp_bias": True}, None),
  ({"qk_norm": True, "qkv_bias": True}, None),
  ({"o_bias": True}, None),
  ({"family": "llama", "qkv_bias": True}, None),
  ({"family": "mistral", "qkv_bias": True, "o_bias": True}, None),
])  # fmt: skip
def test_an_export_is_of_the_family_that_has_its_flags(tmp_path, changes, family):
  config = dataclasses.replace(tiny.LLAMA, **changes)
  if family is None:
    assert "model.family" in refusal(hf.save_pretrained, tmp_path / "m", config, {})
    return
  hf.save_pretrained(tmp_path / "m", config, tiny.params(config))
  assert hf.read_config(tmp_path / "m") == dataclasses.replace(config, family=family)


def test_a_folder_of_something_else_is_left_alone(tmp_path, saved):
  notes = tmp_path / "notes"
  notes.mkdir()
  (notes / "thesis.txt").write_text("years of work")
  assert str(notes) in refusal(hf.save_pretrained, notes, tiny.CONFIG, tiny.params())
  assert "a file" in refusal(
    hf.save_pretrained, notes / "thesis.txt", tiny.CONFIG, tiny.params()
  )
  raw = json.loads((saved / "config.json").read_text())
  (saved / "config.json").write_text(json.dumps({**raw, "transformers_version": "5"}))  # re-saved
  assert str(saved) in refusal(hf.save_pretrained, saved, tiny.CONFIG, tiny.params())
  assert (notes / "thesis.txt").read_text() == "years of work"
  assert_bitwise(hf.load_pretrained(saved)[1], tiny.params())


def test_an_export_replaces_an_earlier_one_as_a_whole(tmp_path):
  target = tmp_path / "model"
  target.mkdir()  # an empty folder is no obstacle
  hf.save_pretrained(target, tiny.CONFIG, tiny.params(), max_shard_bytes=3_000)
  hf.save_pretrained(target, tiny.LLAMA, tiny.params(tiny.LLAMA))
  assert {file.name for file in target.iterdir()} == {
    "config.json", "generation_config.json", "model.safetensors"
  }  # fmt: skip
  assert_bitwise(hf.load_pretrained(target)[1], tiny.params(tiny.LLAMA))
  assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("is_replacing", [False, True])
def test_what_killed_exports_have_left_is_tidied_up(saved, is_replacing):
  folder = saved.parent
  (folder / ".model.new-1").mkdir()
  (folder / ".model.new-1" / "model.safetensors").write_text("half")
  if is_replacing:  # killed between its two renames
    saved.rename(folder / ".model.old-1")
  hf.save_pretrained(saved, tiny.LLAMA, tiny.params(tiny.LLAMA))
  assert_bitwise(hf.load_pretrained(saved)[1], tiny.params(tiny.LLAMA))
  assert [file.name for file in folder.iterdir()] == ["model"]


def test_an_export_that_fails_leaves_the_earlier_one(saved):
  class Broken:
    bos_token_id = eos_token_id = pad_token_id = None

    def save_pretrained(self, folder):
      assert Path(folder, "model.safetensors").exists()
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    hf.save_pretrained(saved, tiny.LLAMA, tiny.params(tiny.LLAMA), Broken())
  assert_bitwise(hf.load_pretrained(saved)[1], tiny.params())
  assert [file.name for file in saved.parent.iterdir()] == ["model"]


# Devices and memory


SHARDED = """
import sys
import weakref
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from spo_jax import hf
import spo_jax.hf.load as load

mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
data = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
whole = hf.load_pretrained(sys.argv[1])[1]
copies = hf.load_pretrained(sys.argv[1], mesh=data)[1]
matrix, vector = NamedSharding(mesh, P("data", "tensor")), NamedSharding(mesh, P("tensor"))
load.sharding.placement = lambda name, shape, mesh: vector if len(shape) == 1 else matrix
parts = hf.load_pretrained(sys.argv[1], mesh=mesh)[1]
for a, b, c in zip(*map(jax.tree.leaves, (whole, copies, parts)), strict=True):
  assert len(b.addressable_shards) == 4 and b.is_fully_replicated
  assert len({str(shard.index) for shard in c.addressable_shards}) == 2 ** c.ndim
  for leaf in (b, c):
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(a))
"""


def test_devices_of_a_mesh_get_copies_or_read_their_own_part(saved, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
  run = [sys.executable, "-c", SHARDED, str(saved)]
  result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stderr


MEMORY = """
import sys
import weakref
import jax
from spo_jax import hf

def kilobytes(key):
  return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key))

hf.load_pretrained(sys.argv[1])  # imports and thread pools belong to the process, not the model
before = kilobytes("VmRSS:")
_, params = hf.load_pretrained(sys.argv[2])
print((kilobytes("VmHWM:") - before) * 1024 / sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_loading_is_at_most_1_3_times_the_parameters(tmp_path, saved, dtype):
  config = dataclasses.replace(
    tiny.QWEN2, vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_layers=2
  )
  shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.random(x.shape, np.float32).astype(jnp.dtype(dtype)), shapes
  )
  hf.save_pretrained(tmp_path / "large", config, params)
  run = [sys.executable, "-c", MEMORY, str(saved), str(tmp_path / "large")]
  result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stderr
  assert 0.9 < float(result.stdout) < 1.3
