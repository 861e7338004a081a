"""Every published run from rollout to export, with a tiny model of its architecture."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from runs import metrics, summary

from spo_jax import evaluate, hf, model, sft, train
from spo_jax.config import ModelConfig, config_at, load, to_yaml
from spo_jax.tokenizer import bpe_tokenizer

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED = [path for path in sorted(CONFIGS.glob("*.yaml")) if load(path).model.path]
TRAINED = [path for path in PUBLISHED if load(path).train.iterations]
SUPERVISED = [path for path in PUBLISHED if path not in TRAINED]

# What each published model is, at a size that trains in seconds.
SHAPE = {
  "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2,
  "max_position": 4096,
}  # fmt: skip
ARCHITECTURES = {
  "realtreetune/": ModelConfig(**SHAPE, tie_embeddings=False),
  "microsoft/": ModelConfig(**SHAPE, tie_embeddings=False),
  "deepseek-ai/": ModelConfig(**SHAPE, tie_embeddings=False, qkv_bias=True),
  "Qwen/": ModelConfig(**SHAPE, tie_embeddings=True, qkv_bias=True),
}
CHAT = (
  "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
  "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ROWS = {
  "gsm8k": [
    {"question": f"Ann has {a} pens and buys {b} more. How many pens has she now?",
     "answer": f"She has {a}+{b} = <<{a}+{b}={a + b}>>{a + b} pens.\n#### {a + b}"}
    for a in range(2, 12) for b in range(3, 6)
  ],
  "math": [
    {"problem": f"What is ${a} \\cdot {b}$?",
     "solution": f"We have ${a} \\cdot {b} = \\boxed{{{a * b}}}$.", "answer": str(a * b)}
    for a in range(2, 12) for b in range(3, 6)
  ],
}  # fmt: skip
# A random model solves nothing; that a few of its responses come to an end is the signal here.
SMALLER = [
  "train.iterations=1", "train.batch_rows=4", "train.micro_batch_rows=2", "rollout.questions=2",
  "rollout.max_prompt_tokens=256", "rollout.max_response_tokens=48", "eval.problems=4",
  "eval.validation_problems=4", "task.unfinished_penalty=1",
]  # fmt: skip
SMALLER_BY_ALGORITHM = {
  "chain": ["rollout.samples=2", "rollout.rows=8", "spo.continuations=4"],
  "tree": ["spo.branch_factors=[2,2,2]", "spo.segment_tokens=4", "rollout.rows=8",
           "spo.edges_per_iteration=8"],
  "grpo": ["rollout.samples=8", "rollout.rows=16"],
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """data(task) -> a folder with its train.jsonl, validation.jsonl and test.jsonl."""
  folder = tmp_path_factory.mktemp("data")
  for task, rows in ROWS.items():
    (folder / task).mkdir()
    for i, split in enumerate(("train", "validation", "test")):
      lines = map(json.dumps, rows[i::3])
      (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
  return lambda task: folder / task if task in ROWS else None


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
  """tiny_model(name) -> a folder with random weights of the named model's architecture."""
  texts = [text for rows in ROWS.values() for row in rows for text in row.values()]

  def make(name: str) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    tokenizer = bpe_tokenizer(texts, 400)
    tokenizer.chat_template = CHAT
    publisher = next(start for start in ARCHITECTURES if name.startswith(start))
    shape = ARCHITECTURES[publisher]
    config = ModelConfig(**{**vars(shape), "vocab_size": len(tokenizer)})
    hf.save_pretrained(folder, config, model.init_params(config, jax.random.key(0)), tokenizer)
    return folder

  return make


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_a_published_run_goes_from_rollout_to_export(data, tiny_model, tmp_path, path):
  published = load(path)
  settings = [
    f"model.path={tiny_model(published.model.path)}", *SMALLER,
    *SMALLER_BY_ALGORITHM[published.algorithm],
  ]  # fmt: skip
  if folder := data(published.task.name):
    settings.append(f"task.path={folder}")
  # In this process, where runs of one architecture and method share their compiled programs.
  arguments = ["--config", str(path), "--run-dir", str(tmp_path), "--set", *settings]
  assert train.main(arguments) == 0

  first, last = metrics(tmp_path)
  assert last["tokens/trained"] > 0 and last["tokens/decoded"] > 0
  assert last["loss/updates"] >= 1 and last["loss/skipped_nonfinite"] == 0
  assert {"eval/greedy_accuracy", "eval/validation_accuracy"} <= first.keys() & last.keys()
  assert (tmp_path / "checkpoints" / "policy" / "1").is_dir()
  assert summary(tmp_path)["iterations"] == 1
  config, params = hf.load_pretrained(tmp_path / "model")
  assert config.vocab_size == params["embed_tokens"].shape[0]


@pytest.mark.parametrize("path", SUPERVISED, ids=lambda path: path.stem)
def test_supervised_training_goes_from_a_folder_to_an_export(data, tiny_model, tmp_path, path):
  published = load(path)
  settings = [
    f"model.path={tiny_model(published.model.path)}", f"task.path={data(published.task.name)}",
    *SMALLER, *SMALLER_BY_ALGORITHM[published.algorithm], "sft.max_steps=2", "sft.batch_rows=4",
    "sft.micro_batch_rows=2", "sft.check_problems=4", "rollout.max_response_tokens=48",
  ]  # fmt: skip
  code = sft.main(["--config", str(path), "--run-dir", str(tmp_path), "--set", *settings])
  assert code == 0
  assert [record["iteration"] for record in metrics(tmp_path)] == [0]
  assert [record["iteration"] for record in metrics(tmp_path / "warm_start")] == [2]
  before = hf.load_pretrained(settings[0].partition("=")[2])[1]
  after = hf.load_pretrained(tmp_path / "model")[1]
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
  assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_run_says_its_command_its_hardware_and_its_result(path):
  header = [line for line in path.read_text().splitlines() if line.startswith("#")]
  text = "\n".join(header)
  program = "train" if path in TRAINED else "sft"
  assert f"python -m spo_jax.{program} --config configs/{path.name}" in text
  assert "# Hardware: " in text and "# Published" in text


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_a_published_run_is_evaluated_as_it_was_trained(tmp_path, path):
  """The command of the header asks with the prompt, the lengths and the stops of the run."""
  config = load(path)
  (tmp_path / "config.yaml").write_text(to_yaml(config))
  (tmp_path / "checkpoints" / "best" / "7").mkdir(parents=True)
  header = re.sub(r"\\?\n#", " ", path.read_text())
  command = re.search(r"python -m spo_jax\.evaluate (.*?)  ", header.replace("\n", "  "))[1]
  options = evaluate._parser().parse_args(command.replace("RUN_DIR", str(tmp_path)).split())
  asked = evaluate.configure(options, evaluate.find_source(options.model, options.checkpoint))
  last = config_at(config, config.train.iterations)
  for section, names in {
    "task": ("name", "path", "prompt"), "model": ("path", "compute_dtype"),
    "rollout": ("max_prompt_tokens", "max_response_tokens", "stop"),
  }.items():  # fmt: skip
    for name in names:
      assert getattr(getattr(asked, section), name) == getattr(getattr(last, section), name), name
  sampled = config.task.name == "gsm8k" or "deepseek" in path.stem
  figures = (asked.rollout.samples, asked.eval.temperature, asked.eval.top_p)
  assert figures == ((16, 0.35, 0.9) if sampled else (1, 0, 1))


HELD = """
import json, sys
from pathlib import Path
import jax
from spo_jax import attention, model, sharding
from spo_jax.config import config_at, load
from spo_jax.plan.programs import Programs
from spo_jax.plan.shapes import model_shape

attention.platform = model.platform = lambda: "gpu"  # which keeps keys and values in bfloat16
found = {}
for name, devices in json.loads(sys.argv[1]).items():
  config = load(Path(name))
  config = config_at(config, config.train.iterations)
  shape, _ = model_shape(config, None, None)
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  rollouts = sharding.make_rollout_mesh(config.rollout.mesh, mesh)
  found[name] = {
    # Of an update also its gradients, and what layers keep for the backward pass.
    p.name: sum(p.held.values()) + p.per_layer * shape.num_layers
    + p.held["parameters"] * ("update" in p.name)
    for p in Programs(config, shape, mesh, rollouts).listed()
  }
print(json.dumps(found))
"""


def test_what_a_published_run_holds_fits_the_hardware_that_it_names():
  """At the end of its schedule, with a tenth left to what is not counted here."""
  named = {
    str(path): re.search(r"# Hardware: (\d+) GPUs? of (\d+) GB", path.read_text())
    for path in PUBLISHED
  }
  devices = {path: int(match[1]) for path, match in named.items()}
  environment = os.environ | {
    "JAX_NUM_CPU_DEVICES": str(max(devices.values())), "PYTHONPATH": str(CONFIGS.parent),
  }  # fmt: skip
  done = subprocess.run(
    [sys.executable, "-c", HELD, json.dumps(devices)], env=environment, capture_output=True,
    text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  too_large = [
    f"{Path(path).stem}, {program}: {held / 1e9:.1f} GB"
    for path, programs in json.loads(done.stdout).items()
    for program, held in programs.items()
    if held > 0.9 * int(named[path][2]) * 1e9
  ]
  assert not too_large
