from __future__ import annotations

import dataclasses
from operator import attrgetter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spo_jax.config import (
  Config,
  ConfigError,
  changed_keys,
  config_at,
  known_keys,
  load,
  to_yaml,
)

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def write(tmp_path_factory):
  folder = tmp_path_factory.mktemp("configs")

  def write(text, name="run.yaml"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name

  return write


def complaint(path, *overrides):
  """The one line with which this configuration is refused."""
  with pytest.raises(ConfigError) as refused:
    load(path, overrides)
  message = str(refused.value)
  assert len(message.splitlines()) == 1, message
  return message


# Reading.


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
  assert isinstance(load(path), Config)


def test_an_empty_file_is_the_default_configuration(write):
  assert load(write("")) == Config() == load(write("# nothing but a comment\n"))


def test_a_file_and_overrides_change_only_what_they_name(write):
  path = write("seed: 3\ntrain:\n  kl: {kind: k1}\n")
  config = load(path, ["train.kl.coefficient=1e-4", "spo.branch_factors=[4, 3]", "seed=5"])
  kl = dataclasses.replace(Config().train.kl, kind="k1", coefficient=1e-4)
  assert config == dataclasses.replace(
    Config(),
    seed=5,
    train=dataclasses.replace(Config().train, kl=kl),
    spo=dataclasses.replace(Config().spo, branch_factors=(4, 3)),
  )
  hash(config)  # sections are static arguments of programs


def test_a_later_override_wins(write):
  assert load(write("seed: 1"), ["seed=2", "seed=3"]).seed == 3


def test_dotted_keys_in_a_file_mean_the_same_as_nested_ones(write):
  dotted = load(write("train.kl.kind: k2\nmodel: {hidden_size: 64}"))
  assert dotted == load(write("train:\n  kl:\n    kind: k2\nmodel.hidden_size: 64"))


@pytest.mark.parametrize(
  ("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("2.0e-3", 2e-3), ("1", 1.0), ("'3'", 3.0)]
)
def test_numbers_as_people_write_them_are_floats(write, text, value):
  in_file = load(write(f"optimizer: {{learning_rate: {text}}}"))
  in_override = load(write(""), [f"optimizer.learning_rate={text}"])
  assert in_file.optimizer.learning_rate == in_override.optimizer.learning_rate == value
  assert type(in_file.optimizer.learning_rate) is float


# YAML that looks like something else must come back as the string it was.
texts = st.text(max_size=8).filter(lambda x: x.isprintable() and "${" not in x and "???" not in x)


@given(
  seed=st.integers(0, 2**31 - 1),
  rate=st.floats(0, 1e3),
  factors=st.lists(st.integers(1, 6), max_size=3),
  name=texts,
  path=st.none() | texts | st.sampled_from(["null", "~", "1e-4", "yes", "0x1f", "01", "[1]", "#"]),
  flag=st.booleans(),
)
@settings(max_examples=25)
def test_to_yaml_is_read_back_to_an_equal_config(write, seed, rate, factors, name, path, flag):
  config = Config(
    seed=seed,
    task=dataclasses.replace(Config().task, name=name, path=path),
    spo=dataclasses.replace(Config().spo, branch_factors=tuple(factors)),
    optimizer=dataclasses.replace(Config().optimizer, learning_rate=rate),
    log=dataclasses.replace(Config().log, wandb=flag),
  )
  again = load(write(to_yaml(config)))
  assert again == config
  assert changed_keys(config, again) == []
  assert type(again.spo.branch_factors) is tuple


# Files on top of files.


def test_a_file_changes_its_base_which_may_have_a_base_too(write):
  write("seed: 1\nmodel: {hidden_size: 64, num_layers: 3}\n", "first.yaml")
  write("base: first.yaml\nmodel: {hidden_size: 32}\n", "second.yaml")
  config = load(write("base: second.yaml\nseed: 2\n"))
  assert (config.seed, config.model.hidden_size, config.model.num_layers) == (2, 32, 3)


def test_a_base_is_found_next_to_its_file_from_any_directory(write, monkeypatch, tmp_path):
  path = write("base: near.yaml\n")
  write("seed: 7\n", "near.yaml")
  monkeypatch.chdir(tmp_path)
  assert load(path).seed == 7


def test_a_missing_base_is_named(write):
  assert "nowhere.yaml does not exist" in complaint(write("base: nowhere.yaml"))


@pytest.mark.parametrize("base", ["3", "[a.yaml]", "{a: b}", "true"])
def test_a_base_that_is_no_file_name_is_named(write, base):
  assert "base" in complaint(write(f"base: {base}"))


def test_bases_in_a_circle_are_refused(write):
  write("base: two.yaml", "one.yaml")
  assert "circle" in complaint(write("base: one.yaml", "two.yaml"))
  assert "circle" in complaint(write("base: self.yaml", "self.yaml"))


# Refusals: one line with the value and what to do.


@pytest.mark.parametrize(
  ("key", "near"),
  [
    ("sed", "seed"),
    ("modle", "model"),
    ("learning_rate", "optimizer.learning_rate"),
    ("rollout.sampels", "rollout.samples"),
    ("train.kl.coeficient", "train.kl.coefficient"),
    ("sft.optimiser.learning_rate", "sft.optimizer"),
  ],
)
def test_an_unknown_key_is_answered_with_the_nearest_known_one(write, key, near):
  nested = "".join("  " * i + f"{name}:\n" for i, name in enumerate(key.split("."))).rstrip()
  for message in (complaint(write(f"{nested} 3")), complaint(write(""), f"{key}=3")):
    assert "unknown configuration key" in message
    assert f"did you mean {near}" in message


def test_a_key_like_no_other_points_to_the_list(write):
  assert "--dry-run" in complaint(write(""), "zzz.qqq=3")


WRONG_TYPES = [
  ("seed", ["1.5", "true", "abc", "null", "[1]", "{a: 1}", "1e3"], "int"),
  ("optimizer.b1", ["true", "abc", "null", "[0.9]", "1-e4", "9" * 400], "float"),
  ("train.whiten", ["maybe", "1.5", "null", "[true]", "''"], "bool"),
  ("algorithm", ["null", "[chain]", "{a: 1}"], "str"),
  ("spo.branch_factors", ["3", "null", "[1.5]", "[a]", "[null]", "[[1]]", "{a: 1}", "a"], "tuple"),
]


@pytest.mark.parametrize(
  ("key", "text", "kind"), [(key, text, kind) for key, many, kind in WRONG_TYPES for text in many]
)
def test_a_wrong_type_is_named_with_its_key_and_the_right_one(write, key, text, kind):
  *sections, name = key.split(".")
  nested = "".join(f"{section}:\n  " for section in sections)
  in_file = complaint(write(f"{nested}{name}: {text}"))
  for message in (in_file, complaint(write(""), f"{key}={text}")):
    assert key in message
    assert f"expected {kind}" in message


@pytest.mark.parametrize("text", ["3", "null", "[1]", "k1", "${seed}", "???"])
@pytest.mark.parametrize("key", ["model", "train.kl"])
def test_a_section_is_not_a_value(write, key, text):
  assert f"{key} is a section" in complaint(write(f"{key}: {text}"))
  assert f"{key} is a section" in complaint(write(""), f"{key}={text}")


@pytest.mark.parametrize("text", ["${seed}", "${nowhere}", "${oc.env:HOME}", "???", "a${b}"])
@pytest.mark.parametrize("key", ["seed", "task.name", "spo.branch_factors", "eval.top_p"])
def test_references_and_missing_marks_are_refused_as_values(write, key, text):
  assert f"{key}={text}" in complaint(write(""), f"{key}='{text}'")


@pytest.mark.parametrize("override", ["", "=", "=3", "seed", "seed=[", "seed='", "seed=a: b: c"])
def test_a_malformed_override_is_quoted(write, override):
  assert complaint(write(""), override).startswith(f"--set {override}")


@pytest.mark.parametrize(
  "text",
  ["seed: 1\nseed: 2", "seed: [", "\t- x", "a: 'open", "{", "a: b: c", "seed: 1\n---\nseed: 2",
   "&a [*a]", "seed: *a", "seed: !!python/object:os.system x", "null: 3", "? [a]\n: 3", "3"],
)  # fmt: skip
def test_a_file_that_is_not_yaml_is_named(write, text):
  message = complaint(write(text))
  assert "run.yaml" in message
  assert "not valid YAML" in message


def test_bytes_that_are_no_text_are_refused(write):
  path = write("")
  path.write_bytes(b"\xff\xfe\x00seed")
  assert "not valid YAML" in complaint(path)


def test_a_list_is_not_a_configuration(write):
  assert "expected `key: value`" in complaint(write("- seed\n- 3\n"))


def test_a_file_that_is_not_there_is_named(tmp_path):
  assert "nowhere.yaml does not exist" in complaint(tmp_path / "nowhere.yaml")
  assert "does not exist" in complaint(tmp_path / ("long" * 2000))
  assert "does not exist" in complaint("null\0byte")
  assert f"{tmp_path} is a directory" in complaint(tmp_path)


def test_line_breaks_in_a_value_do_not_break_the_line(write):
  assert "a b" in complaint(write('algorithm: "a\\nb"'))
  assert "unknown" in complaint(write('"a\\r\\nb": 3'))


def test_a_schedule_sets_keys_from_an_iteration_on(write):
  stages = '["3: spo.interval=4", "7: rollout.max_response_tokens=900", "9: spo.interval=2"]'
  config = load(write(f"schedule: {stages}"))
  at = {i: config_at(config, i) for i in (0, 2, 3, 6, 7, 8, 9, 99)}
  assert {i: at[i].spo.interval for i in at} == {0: 5, 2: 5, 3: 4, 6: 4, 7: 4, 8: 4, 9: 2, 99: 2}
  assert {i: at[i].rollout.max_response_tokens for i in (6, 7, 99)} == {6: 768, 7: 900, 99: 900}
  assert dataclasses.replace(at[99], spo=config.spo, rollout=config.rollout) == config


def test_a_schedule_goes_by_iterations_in_whatever_order_it_is_written(write):
  config = load(write('schedule: ["9: spo.interval=2", "3: spo.interval=4"]'))
  assert [config_at(config, i).spo.interval for i in (2, 3, 8, 9)] == [5, 4, 4, 2]


def test_without_a_file_there_are_defaults_and_overrides():
  assert load(None, ["seed=3"]) == dataclasses.replace(Config(), seed=3)


# Values that no run can have. Each line: what is set, and what the message must hold.

IMPOSSIBLE = [
  ("train.batch_rows=10 train.micro_batch_rows=4", "train.batch_rows=10 train.micro_batch_rows=4"),
  ("train.pack_tokens=1023", "train.pack_tokens=1023 1024"),
  ("train.pack_tokens=4096 train.official=true", "train.pack_tokens=4096 train.official"),
  ("train.pack_tokens=-1", "train.pack_tokens=-1"),
  ('train.pack_tokens=1100 schedule=["5:rollout.max_response_tokens=900"]', "1100 1156"),
  ("algorithm=tree rollout.rows=100 spo.branch_factors=[6,6,6]", "216 rollout.rows=100"),
  ("algorithm=tree spo.branch_factors=[]", "spo.branch_factors=[]"),
  ("algorithm=tree spo.branch_factors=[2,0]", "spo.branch_factors=[2,"),
  ("algorithm=tree spo.branch_factors=[-2,-2]", "spo.branch_factors=[-2,"),
  ("algorithm=tree spo.segment_tokens=384", "spo.segment_tokens=384 768"),
  ("rollout.max_prompt_tokens=1281", "max_prompt_tokens=1281 max_response_tokens=768 2049"),
  ("rollout.samples=257", "rollout.samples=257 rollout.rows=256"),
  ("algorithm=grpo rollout.samples=1", "algorithm=grpo rollout.samples=1"),
  ("algorithm=rloo rollout.samples=1", "algorithm=rloo rollout.samples=1"),
  ("algorithm=gpro", "algorithm=gpro grpo"),
  ("spo.baseline=men", "spo.baseline=men mean"),
  ("train.kl.kind=k4", "train.kl.kind=k4 k3"),
  ("train.kl.aggregation=mean", "train.kl.aggregation=mean token_mean"),
  ("model.compute_dtype=float16", "model.compute_dtype=float16 bfloat16"),
  ("model.num_heads=4 model.num_kv_heads=3", "model.num_heads=4 model.num_kv_heads=3"),
  ("model.hidden_size=130", "model.hidden_size=130 model.num_heads=4"),
  ("model.head_dim=5", "model.head_dim=5 even"),
  ("model.family=lama", "model.family=lama llama"),
  ("model.rope_scaling.kind=yarn", "model.rope_scaling.kind=yarn linear"),
  ("model.rope_scaling.kind=llama3 model.rope_scaling.low_freq_factor=4",
   "high_freq_factor=4.0 low_freq_factor=4.0"),
  ("mesh.tensor=0", "mesh.tensor=0"),
  ("mesh.data=-2", "mesh.data=-2"),
  ("model.attention=flash", "model.attention=flash auto xla cudnn splash"),
  ("train.remat=layers", "train.remat=layers (did you mean layer?)"),
  ("rollout.mesh.fsdp=-2", "rollout.mesh.fsdp=-2"),
  ("sft.batch_rows=10 sft.micro_batch_rows=4", "sft.batch_rows=10 sft.micro_batch_rows=4"),
  ('schedule=["5"]', "schedule 5"),
  ('schedule=["-1:spo.interval=2"]', "schedule -1:spo.interval=2"),
  ('schedule=["5:seed=1"]', "schedule 5:seed=1 spo.interval"),
  ('schedule=["5:spo.interval=0"]', "spo.interval=0"),
  ('schedule=["5:spo.interval=x"]', "spo.interval=x int"),
  ('schedule=["5:rollout.max_response_tokens=9"]', "768 9 5"),
  ('schedule=["5:rollout.max_response_tokens=9000"]', "9000 model.max_position=2048"),
  ('algorithm=tree schedule=["5:spo.segment_tokens=500"]', "spo.segment_tokens=500"),
  ("model.rope_theta=0", "model.rope_theta=0"),
  ("rollout.temperature=0", "rollout.temperature=0"),
  ("optimizer.b1=1", "optimizer.b1=1"),
  ("sft.optimizer.b2=-0.1", "sft.optimizer.b2=-0.1"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "parts"), IMPOSSIBLE)
def test_an_impossible_combination_is_named_with_its_values(write, overrides, parts):
  message = complaint(write(""), *overrides.split())
  assert all(part in message for part in parts.split()), message


@pytest.mark.parametrize(
  "override",
  ["algorithm=chain", "algorithm=tree", "rollout.rows=216", "spo.segment_tokens=383",
   "rollout.max_prompt_tokens=1280", "rollout.samples=256", "train.batch_rows=64"],
)  # fmt: skip
def test_the_last_possible_value_is_accepted(write, override):
  algorithm = [] if "samples" in override else ["algorithm=tree"]
  load(write(""), [*algorithm, override])


DEFAULTS = {key: attrgetter(key)(Config()) for key in known_keys()}
FLOATS = [key for key, value in DEFAULTS.items() if type(value) is float]
NUMBERS = [key for key, value in DEFAULTS.items() if type(value) in (int, float)]


@pytest.mark.parametrize("text", [".nan", ".inf", "9" * 50])
@pytest.mark.parametrize("key", FLOATS)
def test_a_number_that_is_not_finite_or_huge_is_named(write, key, text):
  assert key in complaint(write(""), f"{key}={text}")


@pytest.mark.parametrize("key", NUMBERS)
def test_a_negative_number_is_named(write, key):
  assert f"{key}=-2" in complaint(write(""), f"{key}=-2")


@pytest.mark.parametrize("key", ["rollout.top_p", "eval.top_p", "spo.threshold"])
@pytest.mark.parametrize("value", ["0", "1.01"])
def test_a_share_lies_above_0_and_at_most_at_1(write, key, value):
  assert f"{key}={float(value)}" in complaint(write(""), f"{key}={value}")
  load(write(""), [f"{key}=1"])


def test_a_whole_number_has_to_fit_into_32_bits(write):
  assert "seed" in complaint(write(""), f"seed={2**31}")
  assert "rollout.questions" in complaint(write(""), "rollout.questions=" + "9" * 400)


# Comparing.


def test_changed_keys_names_single_values_and_no_sections():
  kl = dataclasses.replace(Config().train.kl, coefficient=0.5)
  new = dataclasses.replace(Config(), seed=9, train=dataclasses.replace(Config().train, kl=kl))
  assert changed_keys(Config(), new) == ["seed", "train.kl.coefficient"]
  assert changed_keys(new, new) == []


# Whatever else somebody writes.

odd_values = st.sampled_from(
  ["", "1", "-1", "0", "1.5", ".nan", "true", "null", "[]", "[1, 2]", "{a: 1}", "${seed}", "${",
   "???", "'", '"', "!!binary aGVsbG8=", "!!set {a}", "!!int x", "&a [*a]", "<<: 3", "é☃", "9" * 99,
   "9" * 5000, "2001-01-01", "a: b", "|", "@", "%", "\\", "\0", "\ud800", "\u2028", "a\nb"]
) | st.text(max_size=6)  # fmt: skip
odd_keys = st.sampled_from(
  [*known_keys(), "base", "", ".", "a b", " seed", "seed.x", "model.", "model..path", "<<", "null",
   "spo.branch_factors[0]", "model[hidden_size]", "\u2028", "__class__", "_target_"]
) | st.text(max_size=6)  # fmt: skip


def loads_or_complains(path, overrides):
  try:
    config = load(path, overrides)
  except ConfigError as error:
    assert len(str(error).splitlines()) == 1
  else:
    assert isinstance(config, Config)


@given(st.lists(st.builds("{}={}".format, odd_keys, odd_values), max_size=2))
@example(["optimizer.b1=" + "9" * 400])
@example(["seed=${seed}"])
@settings(max_examples=60)
def test_any_override_gives_a_config_or_one_line(write, overrides):
  loads_or_complains(write(""), overrides)


@given(odd_keys, odd_values, st.sampled_from(["{}: {}", "spo: {{{}: {}}}", "{}\n  {}", "- {}: {}"]))
@settings(max_examples=60)
def test_any_file_gives_a_config_or_one_line(write, key, value, layout):
  path = write("")
  path.write_bytes(layout.format(key, value).encode("utf-8", "surrogatepass"))
  loads_or_complains(path, [])
