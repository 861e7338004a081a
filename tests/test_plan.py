"""What the planner counts, against numbers worked out by hand, and which setting it changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from spo_jax.config import (
  Config,
  ConfigError,
  MeshConfig,
  ModelConfig,
  RolloutMeshConfig,
  load,
)
from spo_jax.model import count_params
from spo_jax.plan import costs
from spo_jax.plan.chips import CHIPS, parse_topology
from spo_jax.plan.collectives import collective_bytes
from spo_jax.plan.compiling import Measured, assigned_bytes, extrapolate
from spo_jax.plan.costs import Split
from spo_jax.plan.fitting import Line, Plan, Planner, next_change, share_out, with_settings
from spo_jax.plan.programs import Program
from spo_jax.plan.shapes import HUB_NAMES, SHAPES, model_shape

ROOT = Path(__file__).parents[1]

# Per layer: W = 8 * (2 * 2 + 2 * 1) * 4 + 3 * 8 * 16 = 576 weights.
SMALL = ModelConfig(
  vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=3, num_heads=2, num_kv_heads=1,
)  # fmt: skip


def test_flops_of_a_forward_by_hand():
  """2 rows of 10: 20 tokens * 3 layers * (2 * 576 + 4 * 2 heads * 4 wide * 10 slots)."""
  assert costs.layer_weights(SMALL) == 576
  assert costs.forward(SMALL, 2, 10, Split()).flops == 20 * 3 * (1152 + 320)


def test_bytes_of_a_forward_by_hand():
  """Weights 576 * 4; 20 tokens * 2 * 4 * (48 + 24 + 48); scores 20 * 10 * 2 * 2 * 8."""
  assert costs.forward(SMALL, 2, 10, Split()).bytes == 3 * (2304 + 19200 + 6400)
  half = dataclasses.replace(SMALL, compute_dtype="bfloat16")
  assert costs.forward(half, 2, 10, Split()).bytes == 3 * (1152 + 9600 + 4800)


def test_cost_of_decoding_by_hand():
  """2 rows, 5 steps, 10 slots: every step reads all weights and both whole caches."""
  cost = costs.decode(SMALL, 2, 10, 5, Split())
  assert cost.flops == 5 * 2 * (3 * (1152 + 320) + 2 * 8 * 32)
  cache = 2 * 4 * 2 * 10 * 1 * 4
  assert cost.bytes == 5 * (3 * (2304 + cache) + 4 * 8 * 32 + 3 * 4 * 2 * 32)


def test_cost_of_an_update_by_hand():
  """3 forwards of the layers and 4 heads a micro-batch, and one of each for the reference."""
  body, head = costs.forward(SMALL, 2, 10, Split()), costs.head(SMALL, 2, 10, Split())
  assert head.flops == 20 * 2 * 8 * 32
  plain = costs.update(SMALL, 1000, 4, 2, 10, False, "none", Split())
  assert plain.flops == 4 * (3 * body.flops + 4 * head.flops)
  assert plain.bytes == 4 * (3 * body.bytes + 4 * head.bytes + 16 * 1000) + 28 * 1000
  compared = costs.update(SMALL, 1000, 4, 2, 10, True, "none", Split())
  assert compared.flops - plain.flops == 4 * (body.flops + head.flops)


def test_what_is_computed_again_costs_flops():
  """Layers once more in each of 4 micro-batches, or their attention: 3 * 200 pairs * 4 * 8."""
  plain, dots, layer = (
    costs.update(SMALL, 1000, 4, 2, 10, False, remat, Split()).flops
    for remat in ("none", "dots", "layer")
  )
  assert layer - plain == 4 * costs.forward(SMALL, 2, 10, Split()).flops
  assert dots - plain == 4 * 3 * 200 * 4 * 8


def test_work_is_shared_out_by_rows_and_by_heads():
  whole = costs.score(SMALL, 4, 10, Split()).flops
  assert costs.score(SMALL, 4, 10, Split(rows=4)).flops == whole / 4
  assert costs.score(SMALL, 4, 10, Split(rows=2, tensor=2)).flops == whole / 4
  assert costs.score(SMALL, 4, 10, Split(rows=3)).flops == whole  # as sharding.py lays them out
  fused, plain = (costs.forward(SMALL, 4, 10, Split(fused=fused)) for fused in (True, False))
  assert plain.flops - fused.flops == 3 * 2 * 400 * 2 * 4  # half of the pairs of 2 heads
  assert plain.bytes - fused.bytes == 3 * 16 * 800  # and none of their scores
  sharded = costs.update(SMALL, 1000, 1, 4, 10, False, "none", Split(parameters=4)).bytes
  alone = costs.update(SMALL, 1000, 1, 4, 10, False, "none", Split()).bytes
  assert alone - sharded == 0.75 * 1000 * (16 + 28)


def test_built_in_shapes_have_the_published_number_of_parameters():
  """Counted with 1 and 2 layers: all the others are like the second."""
  published = {
    "rho-1.1b": 1_100_048_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "r1-qwen-1.5b": 1_777_088_000,
    "deepseekmath-7b": 6_910_365_696,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
  }

  def parameters(shape):
    one, two = (count_params(dataclasses.replace(shape, num_layers=n)) for n in (1, 2))
    return one + (shape.num_layers - 1) * (two - one)

  assert {name: parameters(shape) for name, shape in SHAPES.items()} == published


def test_every_shipped_config_has_a_shape_without_the_hub():
  for path in sorted((ROOT / "configs").glob("*.yaml")):
    config = load(path)
    assert config.model.path is None or config.model.path in HUB_NAMES, path.name
    shape, _ = model_shape(config, None, None)
    assert shape.vocab_size > 0 and shape.compute_dtype == config.model.compute_dtype


def test_shape_of_a_config_json_or_of_a_name_stands_for_the_models_own(tmp_path):
  file = tmp_path / "config.json"
  file.write_text(json.dumps({
    "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10,
    "intermediate_size": 16, "num_hidden_layers": 3, "max_position_embeddings": 4096,
  }))  # fmt: skip
  config = load(ROOT / "configs" / "qwen1.5b_math_tree.yaml")
  shape, source = model_shape(config, str(file), None)
  assert (shape.num_layers, shape.compute_dtype, source) == (3, "bfloat16", str(file))
  asked = with_settings(config, {"model.attention": "xla"})
  assert model_shape(asked, str(file), None)[0].attention == "xla"
  assert model_shape(config, "qwen2.5-7b", None)[0].hidden_size == 3584


@pytest.mark.parametrize(
  ("model_config", "vocab_size", "said"),
  [
    ("no.json", None, "no.json is no file and none of rho"),
    (None, 0, "--vocab-size 0"),
    ("qwen2.5-7b", 10, "qwen2.5-7b has its own"),
  ],
)
def test_a_shape_that_is_none_is_refused(model_config, vocab_size, said):
  with pytest.raises(ConfigError, match=said):
    model_shape(Config(), model_config, vocab_size)


def test_topologies():
  assert parse_topology("v5e:4x4").devices == 16
  assert parse_topology("v5p:4x4x4").devices == 64
  assert parse_topology("v6e:16x16").hbm_bytes == 32 * 2**30
  assert (parse_topology("cpu:1024").devices, parse_topology("local").hbm_bytes) == (1024, None)


@pytest.mark.parametrize("text", ["v5e", "v5e:4", "v9:4x4", "cpu:0", "cpu:1025", "cpu:9999", ""])
def test_other_topologies_are_refused(text):
  with pytest.raises(ConfigError, match="is not a slice of v4, v5e, v5p, v6e"):
    parse_topology(text)


@pytest.mark.parametrize("text", ["v5e:1x1", "v6e:16x16", "v5p:2x2x1", "v4:2x4x4", "v5p:8x8x16"])
def test_slices_that_exist(text):
  assert parse_topology(text).name == text


@pytest.mark.parametrize(
  "text",
  ["v5e:4x4x4", "v5e:32x32", "v5e:1000x1000", "v5e:2x16", "v5e:2x2x4", "v6e:4x2", "v5p:4x4",
   "v5p:1x1x1", "v5p:4x2x2", "v4:6x6x6", "v5p:8x4x4", "v5p:32x32x32",
   "v5p:4x4x1000000"],
)  # fmt: skip
def test_slices_that_do_not_exist_are_refused(text):
  with pytest.raises(ConfigError, match=f"--topology {text} is no slice of v.*Give one of .*2x2"):
    parse_topology(text)


HLO = """HloModule jit_f, is_scheduled=true

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %gathered = bf16[32]{0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %x)
}

%inner_cond (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %bound = s32[] constant(6)
  %j = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

%outer_body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %inner = (s32[], f32[8]{0}) while(%q), condition=%inner_cond, body=%inner_body, metadata={op_name="jit(f)/while/body/while"}
  %y = f32[8]{0} get-tuple-element(%inner), index=1
  %start = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %done = f32[8]{0} collective-permute-done(%start)
  %k = s32[] get-tuple-element(%inner), index=0
  ROOT %u = (s32[], f32[8]{0}) tuple(%k, %done)
}

%outer_cond (r: (s32[], f32[8])) -> pred[] {
  %r = (s32[], f32[8]{0}) parameter(0)
  %m = s32[] get-tuple-element(%r), index=0
  %limit = s32[] get-tuple-element(%r), index=0
  ROOT %below = pred[] compare(%m, %limit), direction=LT
}

%phase (z: f32[16]) -> f32[16] {
  %z = f32[16]{0} parameter(0)
  ROOT %summed = f32[16]{0} all-reduce(%z), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%outer_cond
}

ENTRY %main (a: (s32[], f32[8]), b: f32[16]) -> f32[16] {
  %a = (s32[], f32[8]{0}) parameter(0)
  %b = f32[16]{0} parameter(1)
  %loop = (s32[], f32[8]{0}) while(%a), condition=%outer_cond, body=%outer_body, metadata={op_name="jit(f)/while"}
  %first = f32[16]{0} fusion(%b), kind=kCustom, calls=%phase
  %second = f32[16]{0} fusion(%first), kind=kCustom, calls=%phase
  %scattered = f32[4]{0} reduce-scatter(%second), channel_id=4, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}
  ROOT %out = f32[16]{0} all-to-all(%second), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
}
"""  # noqa: E501


def test_collective_bytes_by_hand():
  """The outer loop is told to run 5 times; the inner one counts 0, 2, 4."""
  assert collective_bytes(HLO, {"f./while$": 5, "while": 9}) == {
    "all-gather": 5 * 3 * 64 * 3 / 4,
    "collective-permute": 5 * 32,
    "all-reduce": 2 * 64 * 3 / 4,  # two phases of one transfer
    "reduce-scatter": 16 * 3,
    "all-to-all": 64 * 7 / 8,
  }


def test_turns_that_the_program_states_are_believed():
  stated = HLO.replace(
    "body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"7"}}'
  )
  assert collective_bytes(stated, {"while": 5})["collective-permute"] == 7 * 32


def test_loops_inside_loops_are_told_their_own_turns():
  known, unknown = "%bound = s32[] constant(6)", "%bound = s32[] get-tuple-element(%p.1), index=0"
  unknown = HLO.replace(known, unknown)
  told = {"body/while$": 2, "while$": 5}
  assert collective_bytes(unknown, told)["all-gather"] == 5 * 2 * 64 * 3 / 4
  assert collective_bytes(unknown, {"f./while$": 5})["all-gather"] == 5 * 64 * 3 / 4


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    collective_bytes("nothing")


def line(peak, setting="train.micro_batch_rows", **changes):
  program = Program(
    "update", lambda layers: None, costs.Cost(2e12, 3e9), 1, 100, {}, setting, {}, 0
  )  # fmt: skip
  return Line(dataclasses.replace(program, **changes), Measured(peak), CHIPS["v5e"])


def plan_of(config, mesh, *lines):
  return Plan(config, list(lines), dict(zip(("data", "fsdp", "tensor"), mesh)), 100)


CONFIG = with_settings(Config(), {"train.micro_batch_rows": 32, "rollout.rows": 256})
TREE = dataclasses.replace(
  CONFIG, algorithm="tree", spo=dataclasses.replace(CONFIG.spo, branch_factors=(5, 4))
)


def test_parameters_are_shared_out_before_rows_are_fewer():
  assert next_change(plan_of(CONFIG, (8, 1, 1), line(101))) == {"mesh.data": 1, "mesh.fsdp": 8}


def test_rows_of_the_largest_program_are_halved():
  update, grow = line(101), line(102, "rollout.rows")
  assert next_change(plan_of(CONFIG, (1, 8, 1), update)) == {"train.micro_batch_rows": 16}
  assert next_change(plan_of(CONFIG, (1, 8, 1), update, grow)) == {"rollout.rows": 128}


def test_rows_hold_whole_trees_in_equal_shares():
  """Trees of 20 leaves on 8 chips: one takes 24 rows, two take 40."""
  rollouts = line(101, "rollout.rows")
  tree = with_settings(TREE, {"rollout.rows": 88})
  assert next_change(plan_of(tree, (1, 8, 1), rollouts)) == {"rollout.rows": 40}
  assert next_change(plan_of(with_settings(tree, {"rollout.rows": 56}), (1, 8, 1), rollouts)) == {
    "rollout.rows": 24
  }


def test_rollouts_share_out_rows_on_their_own_mesh():
  own = dataclasses.replace(TREE.rollout, rows=88, mesh=RolloutMeshConfig(-1, 1, 4))
  tree = dataclasses.replace(TREE, rollout=own)
  rollouts = line(101, "rollout.rows")
  assert next_change(plan_of(tree, (1, 8, 1), rollouts)) == {"rollout.rows": 40}
  assert next_change(plan_of(with_settings(tree, {"rollout.rows": 40}), (1, 8, 1), rollouts)) == {
    "rollout.rows": 20
  }


@pytest.mark.parametrize(("is_scored", "rows"), [(False, 60), (True, 40)])
def test_rows_that_are_scored_are_shared_out_by_training_too(is_scored, rows):
  """60 of three trees are 4 equal shares, as rollouts have them, and not 8, as updates."""
  own = RolloutMeshConfig(4, 1, 2)
  own = dataclasses.replace(TREE.rollout, rows=120, recompute_logprobs=is_scored, mesh=own)
  tree = dataclasses.replace(TREE, rollout=own)
  rollouts = line(101, "rollout.rows")
  assert next_change(plan_of(tree, (1, 8, 1), rollouts)) == {"rollout.rows": rows}


def test_held_out_questions_that_are_encoded_at_once_are_halved():
  questions = line(101, "eval.problems")
  many = with_settings(CONFIG, {"eval.problems": 1319})
  assert next_change(plan_of(many, (1, 8, 1), questions)) == {"eval.problems": 656}
  few = with_settings(many, {"eval.problems": 8})
  assert "rollout.mesh.fsdp" in next_change(plan_of(few, (1, 8, 1), questions))


def test_a_search_that_runs_into_what_was_asked_for_ends_without_settings():
  class Big:
    def measure(self, program, layers):
      return Measured(2**40)

  config = with_settings(CONFIG, {
    "model.vocab_size": 40, "rollout.mesh.data": 0, "mesh.data": 1,
  })  # fmt: skip
  planner = Planner(config.model, jax.devices()[:1], None, 2**20, Big(), ["grow"])
  first, said = planner.plan(config), []
  config = with_settings(config, {"rollout.mesh.fsdp": 3})  # what a change might lead to
  assert planner.search(config, first, said.append).plan is None
  assert "rollout.mesh" in said[-1]


def test_layers_are_computed_again_once_rows_cannot_be_fewer():
  least = with_settings(CONFIG, {"train.micro_batch_rows": 8})
  first = next_change(plan_of(least, (1, 8, 1), line(101)))
  assert first == {"train.remat": "dots"}
  again = with_settings(least, first)
  assert next_change(plan_of(again, (1, 8, 1), line(101))) == {"train.remat": "layer"}


def test_packs_are_fewer_only_down_to_one_for_each_chip():
  """Rows of 32 have the slots of 16 packs for 8 chips; rows of 16, of as many packs as chips."""
  packed = with_settings(CONFIG, {"train.pack_tokens": 2 * CONFIG.row_tokens})
  halved = next_change(plan_of(packed, (1, 8, 1), line(101)))
  assert halved == {"train.micro_batch_rows": 16}
  assert next_change(plan_of(with_settings(packed, halved), (1, 8, 1), line(101))) == {
    "train.remat": "dots"
  }


def test_chips_move_to_the_tensor_axis_until_none_is_left():
  least = with_settings(CONFIG, {"train.micro_batch_rows": 8, "train.remat": "layer"})
  assert next_change(plan_of(least, (1, 8, 1), line(101))) == {
    "mesh.fsdp": 4, "mesh.tensor": 2, "train.micro_batch_rows": 4,
  }  # fmt: skip
  least = with_settings(TREE, {"rollout.rows": 24})
  rollouts = line(101, "rollout.rows")
  gathered = next_change(plan_of(least, (1, 8, 1), rollouts))
  assert gathered == {f"rollout.mesh.{axis}": 0 for axis in ("data", "fsdp", "tensor")}
  least = with_settings(least, gathered)
  assert next_change(plan_of(least, (1, 8, 1), rollouts)) == {"mesh.fsdp": 4, "mesh.tensor": 2}
  one = with_settings(least, {"train.micro_batch_rows": 1, "train.remat": "layer"})
  assert next_change(plan_of(one, (1, 1, 8), line(101))) is None


def test_rows_that_chips_cannot_share_out_are_moved_to_the_nearest_that_they_can():
  published = load(ROOT / "configs" / "qwen1.5b_math_tree.yaml")  # 216 rows, 8 of a micro-batch
  assert share_out(published, 16) == {
    "mesh.data": 2, "mesh.fsdp": 8, "mesh.tensor": 1, "rollout.rows": 224,
    "train.micro_batch_rows": 16,
  }  # fmt: skip
  # Batches of 128 rows have no share for each of 256 chips.
  assert share_out(published, 256) == {
    "mesh.data": 16, "mesh.fsdp": 8, "mesh.tensor": 2, "rollout.rows": 256,
    "train.micro_batch_rows": 128,
  }  # fmt: skip


def test_settings_are_set_in_their_sections():
  config = with_settings(Config(), {"mesh.data": 1, "mesh.fsdp": 4})
  assert config.mesh == MeshConfig(1, 4, 1)


def test_time_at_best_is_that_of_the_scarcest_resource():
  shown = line(0).to_json()
  assert shown["seconds"]["compute"] == 2e12 / 197e12
  assert shown["seconds"]["memory"] == 3e9 / 819e9
  assert (shown["bound"], shown["seconds"]["roofline"]) == ("compute", 2e12 / 197e12)
  assert shown["tokens_per_second"] == pytest.approx(100 * 197 / 2)


def test_what_waits_on_the_chip_beside_a_program_counts():
  assert line(90, beside=11).peak == 101
  assert not plan_of(CONFIG, (1, 8, 1), line(90, beside=11)).fits


def test_temporaries_are_the_first_heap_of_the_last_program_that_libtpu_talks_of():
  """Behind it come those of other memories; what is no talk of buffers says nothing."""
  heap = "I1126 buffer_assignment.cc:2521] Result size from heap simulator: "
  other = f"] Assigning buffers to module jit_f\n{heap}1000\n"
  said = f"{other}] Assigning buffers to module jit_g\n{heap}2792095744\n{heap}176\n{heap}4096\n"
  assert assigned_bytes(said) == 2792095744
  assert assigned_bytes(other + "] Assigning buffers to module jit_g\n") == 0
  assert assigned_bytes("") == 0


def test_extrapolation_is_a_straight_line():
  low = Measured(10, 4, {"all-gather": 6.0}, 1, (2,))
  high = Measured(16, 5, {"all-gather": 8.0, "all-reduce": 2.0}, 2, (4,))
  found = extrapolate([low, high], 10)
  assert (found.peak, found.temporaries, found.seconds, found.compiled) == (34, 8, 3, (2, 4))
  assert found.collectives == {"all-gather": 14, "all-reduce": 8}


def test_temporaries_that_fall_are_taken_to_rise_by_what_a_layer_keeps():
  """7 and then 5 bytes: the larger, and 6 layers of 2 bytes; the other 6 and 11 on a line."""
  low, high = Measured(13, 7, {}, 1, (2,)), Measured(16, 5, {}, 2, (4,))
  found = extrapolate([low, high], 10, per_layer=2)
  assert (found.temporaries, found.peak) == (7 + 12, 26 + 19)
  low = Measured(10, 4, {}, 1, (2,))
  assert extrapolate([low, high], 10, per_layer=2).temporaries == 5 + 12


def test_bytes_that_a_layer_keeps_by_hand():
  """20 tokens in float32; 576 weights; q, k and v are 16 wide, gate and up 32."""
  kept = {
    remat: costs.kept_per_layer(SMALL, 2, 10, remat, Split())
    for remat in ("none", "dots", "layer")
  }
  assert kept["layer"] == 4 * 576 + 4 * 20 * 8
  assert kept["dots"] - kept["layer"] == 4 * 20 * (16 + 16 + 32)
  assert kept["none"] - kept["dots"] == 4 * 20 * (16 + 8 + 32) + 8 * 20 * 10 * 2
  assert costs.kept_per_layer(SMALL, 2, 10, "none", Split(fused=True)) == kept["none"] - 3200
