"""The planner as a command: programs compiled for virtual devices, and for TPUs without one."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spo_jax import sharding
from spo_jax.config import MeshConfig, ModelConfig, load
from spo_jax.plan.__main__ import main
from spo_jax.plan.compiling import Compiler
from spo_jax.plan.programs import Programs

ROOT = Path(__file__).parents[1]

TINY = """
algorithm: tree
model: {hidden_size: 16, intermediate_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 2}
spo: {branch_factors: [2, 2], segment_tokens: 4, edges_per_iteration: 32}
rollout: {questions: 4, rows: 16, max_prompt_tokens: 8, max_response_tokens: 16}
train: {batch_rows: 32, micro_batch_rows: 32}
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  file = tmp_path_factory.mktemp("plan") / "tiny.yaml"
  file.write_text(TINY)
  return file


def command(*arguments, platforms="cpu"):
  path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
  environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": platforms}
  return subprocess.run(
    [sys.executable, "-m", "spo_jax.plan", *map(str, arguments)], env=environment,
    capture_output=True, text=True,
  )  # fmt: skip


PROGRAMS = [
  "prefill", "grow level 1", "grow level 2", "update", "evaluate: prefill", "evaluate: grow",
]  # fmt: skip


@pytest.fixture(scope="module")
def fitting(tiny):
  done = command("--config", tiny, "--topology", "cpu:8", "--hbm", 1, "--json")
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_a_run_that_fits(fitting):
  assert fitting["fits"] and fitting["search"] is None
  assert (fitting["chips"], fitting["topology"]) == (8, "cpu:8")
  plan = fitting["as_configured"]
  assert plan["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
  assert [program["name"] for program in plan["programs"]] == PROGRAMS
  for program in plan["programs"]:
    assert program["bytes"]["peak"] > program["bytes"]["parameters"] > 0
    assert program["flops"] > 0 and program["bytes_moved"] > 0
    assert program["seconds"] is None  # a CPU has no public peaks
    assert program["layers_compiled"] == [2]


def test_bytes_of_the_state_by_hand(fitting):
  """Replicated float32; AdamW's two moments and a count; no reference without a KL term."""
  update = next(p for p in fitting["as_configured"]["programs"] if p["name"] == "update")
  parameters = 4 * fitting["model"]["parameters"]
  assert update["bytes"]["parameters"] == parameters
  assert 2 * parameters < update["bytes"]["optimiser"] <= 2 * parameters + 8
  assert update["bytes"]["reference"] == 0


def test_bytes_of_the_cache_by_hand(fitting):
  """Tokens that a chip holds of 8 questions (4 and their fillers) with 2 and 4 rows each in 16
  slots: prompts of 8, kept nodes of 4, slots of 8 and what the level has room for."""
  token = 2 * 2 * 2 * 8 * 4  # layers * 2 * heads * width * 4 bytes
  held = {p["name"]: p["bytes"]["kv_cache"] for p in fitting["as_configured"]["programs"]}
  assert held["prefill"] == 8 * token
  assert held["grow level 1"] == (8 + 2 * 4 + 2 * (8 + 4)) * token
  assert held["grow level 2"] == (8 + 2 * 4 + 2 * (8 + 16)) * token
  assert held["evaluate: grow"] == 512 / 8 * 8 * token + 2 * (8 + 16) * token


def test_gradients_are_summed_over_the_rows_of_all_chips(fitting):
  """An all-reduce of every parameter for the only micro-batch, and one or two more of the head."""
  update = next(p for p in fitting["as_configured"]["programs"] if p["name"] == "update")
  gradients = 2 * 4 * fitting["model"]["parameters"] * 7 / 8
  assert gradients <= update["collective_bytes"]["all-reduce"] <= 3 * gradients


def test_no_keys_and_values_are_sent(fitting):
  """What is: one word per step, on whether a slot of any chip is still busy."""
  for program in fitting["as_configured"]["programs"]:
    if "grow" in program["name"]:
      assert set(program["collective_bytes"]) <= {"all-reduce"}
      assert sum(program["collective_bytes"].values()) < 4 * program["tokens_per_call"]


def test_a_run_that_does_not_fit_says_what_to_change(tiny, fitting):
  """A limit just below the peak: parameters are shared out."""
  (prefill,) = (p for p in fitting["as_configured"]["programs"] if p["name"] == "prefill")
  limit = 0.9 * prefill["bytes"]["peak"] / 2**30
  done = command("--config", tiny, "--topology", "cpu:8", "--hbm", limit, "--only", "prefill")
  assert done.returncode == 3, done.stderr
  assert "does not fit: prefill takes 0.00 of 0.00 GiB" in done.stdout
  assert "To make it fit: --set mesh.data=1 mesh.fsdp=8" in done.stdout
  assert "GiB per chip" in done.stdout


def test_a_run_that_cannot_fit_ends_with_3(tiny):
  """Its 15 rows, which 2 chips cannot share out, are moved to 16 first."""
  done = command(
    "--config", tiny, "--topology", "cpu:2", "--hbm", 1e-6, "--json", "--only", "prefill",
    "--set", "rollout.rows=15",
  )  # fmt: skip
  result = json.loads(done.stdout)
  assert (done.returncode, result["fits"], result["as_configured"]) == (3, False, None)
  assert "rollout.rows=15 cannot be shared out" in result["cannot_run"]
  search = result["search"]
  assert search["steps"][0]["change"] == {
    "mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 1, "rollout.rows": 16,
  }  # fmt: skip
  assert (search["fits"], search["plan"]) == (False, None) and len(search["steps"]) > 2


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["--topology", "v9:4x4"], "--topology v9:4x4"),
    (["--topology", "v5e:4x4x4"], "--topology v5e:4x4x4 is no slice of v5e"),
    (["--topology", "cpu:9999"], "virtual devices, 1024 at most"),
    (["--topology", "cpu:8", "--hbm", "-1"], "--hbm -1"),
    (["--set", "model.num_heads=3"], "model.num_heads=3"),
    (["--only", "drow"], "--only drow is none of prefill, grow level 1"),
    (["--no-search", "--set", "mesh.data=2"], "mesh.data=2"),
  ],
)
def test_wrong_usage_is_one_line_and_2(tiny, capsys, arguments, said):
  assert main(["--config", str(tiny), *arguments]) == 2
  out, error = capsys.readouterr()
  assert out == "" and error.startswith("error: ") and error.count("\n") == 1, error
  assert said in error


@pytest.mark.parametrize("platforms", ["banana", "cuda"])
def test_a_machine_without_the_platform_is_one_line_and_2(tiny, platforms):
  done = command("--config", tiny, "--only", "prefill", platforms=platforms)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
  assert f"local finds no devices with JAX_PLATFORMS={platforms}" in done.stderr


def programs_of(*settings):
  """By name, of 4 rows at once on one device."""
  config = load(None, [*SMALL, *settings])
  mesh = sharding.make_mesh(MeshConfig())
  found = Programs(config, dataclasses.replace(config.model, vocab_size=64), mesh).listed()
  return {p.name: p for p in found}


def evaluations(*settings):
  """(calls per iteration, tokens of one call) by program."""
  found = programs_of(*settings)
  return {name: (p.calls, p.tokens) for name, p in found.items() if ":" in name}


SMALL = [
  "model.hidden_size=16", "model.num_heads=2", "model.num_kv_heads=2", "rollout.rows=4",
  "rollout.samples=1", "rollout.max_prompt_tokens=8", "rollout.max_response_tokens=16",
  "train.iterations=25", "eval.every=10", "eval.problems=10", "eval.temperature=0",
]  # fmt: skip


def test_the_evaluations_of_a_run_are_counted():
  """Behind iterations 0, 10, 20 and 25 of 25; 10 questions are filled up to 12."""
  once = {"evaluate: prefill": (4 / 25, 12 * 8), "evaluate: grow": (4 / 25, 12 * 16)}
  assert evaluations() == once
  twice = evaluations("eval.temperature=0.6")  # greedy as well
  assert twice == {name: (2 * calls, tokens) for name, (calls, tokens) in once.items()}
  assert evaluations("train.iterations=20")["evaluate: grow"][0] == 3 / 20
  assert evaluations("eval.every=100")["evaluate: grow"][0] == 2 / 25
  chosen = evaluations("eval.temperature=0.6", "eval.validation_problems=7")
  validation = {"validate: prefill": (4 / 25, 8 * 8), "validate: grow": (4 / 25, 8 * 16)}
  assert chosen == twice | validation


def test_how_many_questions_matters_only_beyond_the_rows_that_are_filled_up():
  few, many = (programs_of(f"eval.problems={n}")["evaluate: prefill"] for n in (4, 5))
  assert (few.setting, many.setting) == ("rollout.rows", "eval.problems")


def test_a_warm_start_alone_is_its_updates_checks_and_one_evaluation():
  found = programs_of(
    "train.iterations=0", "sft.max_steps=9", "sft.batch_rows=4", "sft.check_problems=30",
    "train.kl.coefficient=0.1",
  )
  calls = {"supervised update": 0, "check: prefill": 0, "check: grow": 0}
  assert {name: p.calls for name, p in found.items()} == calls | {
    "evaluate: prefill": 1, "evaluate: grow": 1,
  }  # fmt: skip
  assert found["check: prefill"].tokens == 32 * 8  # filled up
  assert found["check: prefill"].setting == "sft.check_problems"
  assert found["check: grow"].held["reference"] == 0 < found["evaluate: grow"].held["reference"]


@pytest.mark.parametrize("algorithm", ["chain", "tree", "grpo"])
def test_what_lies_beside_a_program_that_scores(algorithm):
  """The copy of the parameters that samples, until trees are whole; what chains continue from."""
  found = programs_of(
    f"algorithm={algorithm}", "rollout.recompute_logprobs=true", "model.compute_dtype=bfloat16",
    "spo.branch_factors=[2,2]", "spo.segment_tokens=8", "rollout.questions=4",
    "rollout.samples=2", "train.batch_rows=4", "train.micro_batch_rows=4",
  )  # fmt: skip
  update, score = found["update"], found["score"]
  copied = score.held["parameters"] - update.held["parameters"]
  kept = score.held["kv_cache"]
  assert score.beside == update.held["optimiser"] + copied + kept
  share = 0 if algorithm == "tree" else 0.5
  assert copied == pytest.approx(share * update.held["parameters"], rel=0.01)
  assert (kept > 0) == (algorithm == "chain")


def test_an_extrapolated_model_is_nearly_the_compiled_one():
  """Peak bytes of a prefill of 6 layers, from 2 and 4, for the CPU."""
  deep = ModelConfig(vocab_size=64, num_layers=6, hidden_size=32, intermediate_size=64)
  config, mesh = load(ROOT / "configs" / "laptop_tree.yaml"), sharding.make_mesh(MeshConfig())
  program = next(p for p in Programs(config, deep, mesh).listed() if p.name == "prefill")
  estimate, exact = (Compiler(exact).measure(program, 6) for exact in (False, True))
  assert (estimate.compiled, exact.compiled) == ((2, 4), (6,))
  assert estimate.peak == pytest.approx(exact.peak, rel=0.02)


TREE_PROGRAMS = ("grow level 3", "update")
TREE = """
algorithm: tree
model:
  {qkv_bias: true, compute_dtype: bfloat16, num_kv_heads: 2, vocab_size: 2048,
   max_position: 2048}
spo: {branch_factors: [6, 6, 6], edges_per_iteration: 512}
rollout: {questions: 16, rows: 864}
train: {micro_batch_rows: 16, remat: layer, kl: {coefficient: 1.0e-4}}
mesh: {data: 1, fsdp: -1}
"""
QWEN = {"num_layers": 2, "hidden_size": 1536, "intermediate_size": 8960, "num_heads": 12}
NARROW = {"num_layers": 1, "hidden_size": 256, "intermediate_size": 512, "num_heads": 2}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
  ("shape", "tokens"),
  [(NARROW, 512), pytest.param(QWEN, 2048, marks=pytest.mark.devices)],
  ids=["narrow", "1.5B"],
)
def test_the_tpu_compiler_compiles_a_tree_run(tmp_path, shape, tokens):
  """For 16 chips; two layers of the width of Qwen-1.5B take two minutes, a narrow one seconds."""
  file = tmp_path / "tree.yaml"
  file.write_text(TREE)
  settings = [f"model.{key}={value}" for key, value in shape.items()]
  done = command(
    "--config", file, "--topology", "v5e:4x4", "--json", "--only", *TREE_PROGRAMS, "--set",
    *settings, f"rollout.max_prompt_tokens={tokens // 4}", f"spo.segment_tokens={tokens // 8}",
    f"rollout.max_response_tokens={tokens * 3 // 4}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert result["chips"] == 16 and "v5" in result["device"] and result["limit"] == 15.75 * 2**30
  grow, update = result["as_configured"]["programs"]
  # A chip has a tree: its prompt, 6 and 36 inner nodes, 54 slots; and 1/16 of the parameters in
  # float32, all of them in bfloat16 while it samples.
  row = shape["num_layers"] * 2 * 2 * 128 * tokens * 2
  assert grow["bytes"]["kv_cache"] == (1 / 4 + (6 + 36) / 8 + 54) * row
  count = result["model"]["parameters"]
  parameters = 4 * count / 16
  assert grow["bytes"]["parameters"] == pytest.approx(parameters + 2 * count, rel=0.05)
  assert update["bytes"]["parameters"] == pytest.approx(parameters, rel=0.05)  # norms are whole
  assert update["bytes"]["peak"] > 4 * parameters
  assert not grow["collective_bytes"].get("all-gather") and update["collective_bytes"]["all-gather"]
  assert not grow["refused_by_compiler"] and not update["refused_by_compiler"]
  for program in (grow, update):
    assert program["seconds"]["roofline"] > 0 and program["tokens_per_second"] > 0


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_an_axis_may_take_a_part_of_a_side_of_a_slice(tiny):
  """8 chips are two sides of 4x4x4, of which one is taken in part."""
  done = command(
    "--config", tiny, "--topology", "v5p:4x4x4", "--only", "prefill", "--json", "--no-search",
    "--set", "mesh.data=1", "mesh.fsdp=-1", "mesh.tensor=8",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  plan = json.loads(done.stdout)["as_configured"]
  assert plan["mesh"] == {"data": 1, "fsdp": 8, "tensor": 8}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(("topology", "chips"), [("v5e:1x1", 1), ("v6e:1x1", 1), ("v4:2x2x1", 4)])
def test_every_chip_of_a_slice_is_one_device(tiny, topology, chips):
  done = command("--config", tiny, "--topology", topology, "--only", "prefill", "--json")
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)["chips"] == chips


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_kernel_of_tpus_may_be_asked_for(tiny):
  """Parameters are counted and laid out for the chips too, not for the CPU that plans."""
  done = command(
    "--config", tiny, "--topology", "v5e:2x2", "--only", "prefill", "--json",
    "--set", "model.attention=splash",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
