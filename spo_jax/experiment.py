"""What a run is made of: task, tokenizer, model and engine, built from the configuration.

Every random choice is a function of the seed, a purpose and a counter, so resuming needs no
generator state.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spo_jax import hf, model, prompts, sharding, stops, tokenizer, validation
from spo_jax.attention import kernel_for
from spo_jax.config import Config, ConfigError, ModelConfig, check_context, config_at
from spo_jax.distributed import in_shares
from spo_jax.layout import behind_prompts, select
from spo_jax.rollouts import Engine, Grade
from spo_jax.structs import Prompts, Samples, Sampling
from spo_jax.tasks import Problem, Task, load_task, question_order

# Larger splits are generated on demand: only their first problems are looked at beforehand.
_LISTED = 2**22
_CHECKED = 512
_TOKENIZER_TEXTS = 20_000  # of which a tokenizer for a new model is trained


class Purpose(enum.IntEnum):
  """What a random stream is for; the numbers are part of what makes a run repeatable."""

  INIT = 0
  ROLLOUT = 1
  EVALUATE = 2
  DEMONSTRATE = 3
  SHUFFLE = 4
  DRAW = 5


@dataclass(frozen=True)
class Experiment:
  """See `build`. `left_out` counts questions per reason, filled as splits are first used."""

  config: Config
  model_config: ModelConfig
  task: Task
  tokenizer: Any
  template: str
  engine: Engine
  count_right: Grade  # rewards without penalties, which shape those of training
  mesh: Mesh
  left_out: dict[str, int] = field(default_factory=dict)
  _splits: dict[str, Sequence[Problem]] = field(default_factory=dict)
  _held_out: dict[tuple[str, int], Prompts] = field(default_factory=dict)

  def key(self, purpose: Purpose, count: int = 0) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(self.config.seed), int(purpose))
    return jax.random.fold_in(key, count)

  def rng(self, purpose: Purpose, count: int = 0) -> np.random.Generator:
    return np.random.default_rng([self.config.seed, int(purpose), count])

  def at(self, iteration: int) -> Experiment:
    """This experiment in one iteration; the engine and what it counts are shared."""
    config = config_at(self.config, iteration)
    self.engine.response_tokens = config.rollout.max_response_tokens
    return dataclasses.replace(self, config=config)

  def _examiner(self) -> Engine:
    return dataclasses.replace(self.engine, grade_fn=self.count_right)

  def init_params(self) -> model.Params:
    """Float32 parameters to start from, on the mesh: those of model.path, or fresh ones."""
    if self.config.model.path:
      return hf.load_pretrained(self.config.model.path, jnp.float32, self.mesh)[1]
    params = model.init_params(self.model_config, self.key(Purpose.INIT))
    return jax.device_put(params, sharding.placements(params, self.mesh))

  def split(self, name: str) -> Sequence[Problem]:
    """The problems of a split whose prompts fit into rollout.max_prompt_tokens."""
    if name not in self._splits:
      problems = self.task.split(name)
      if len(problems) <= _LISTED:
        limit = self.config.rollout.max_prompt_tokens
        fits = self._lengths(problems, self._prompt_ids) <= limit
        problems = self._keep(problems, fits, f"{name} questions of more than {limit} tokens")
      self._splits[name] = problems
    return self._splits[name]

  def _demonstrated(self) -> Sequence[Problem]:
    """The training problems with a demonstration that fits into a response."""
    if "demonstrated" not in self._splits:
      problems = self.split("train")
      if len(problems) <= _LISTED:
        room = self.config.rollout.max_response_tokens
        lengths = self._lengths(problems, self._demonstration_ids)
        if not lengths.any():
          raise ValueError(
            f"task.name={self.config.task.name}: its problems have no demonstrations to start from."
            " Set sft.max_steps=0."
          )
        fits = (lengths > 0) & (lengths < room)
        problems = self._keep(problems, fits, f"demonstrations of none or {room}+ tokens")
      self._splits["demonstrated"] = problems
    return self._splits["demonstrated"]

  def _lengths(
    self, problems: Sequence[Problem], ids: Callable[[list[Problem]], list[list[int]]]
  ) -> np.ndarray:
    """i32[B], tokens of each problem's text; every process counts those of its share."""

    def count(share: slice) -> np.ndarray:
      rows = ids([problems[i] for i in range(share.start, share.stop)])
      return np.array([len(row) for row in rows], np.int32)

    return in_shares(len(problems), count)

  def _keep(self, problems: Sequence[Problem], fits: np.ndarray, what: str) -> Sequence[Problem]:
    if not fits.any():
      raise ValueError(
        f"task.name={self.config.task.name}: all {len(fits)} are {what}. Raise "
        "rollout.max_prompt_tokens or rollout.max_response_tokens."
      )
    self.left_out[what] = int((~fits).sum())
    return [problem for problem, kept in zip(problems, fits, strict=True) if kept]

  def _fitting(
    self, what: str, problems: Sequence[Problem], order: np.ndarray, demonstrated: bool = False
  ) -> list[Problem]:
    """The problems at these indices.

    An endless split cannot be looked through beforehand: for one of its problems that does not fit
    another stands in, from far behind so that none comes twice. They are counted the first time.
    """
    chosen = [problems[int(i)] for i in order]
    if len(problems) <= _LISTED:
      return chosen
    rollout = self.config.rollout
    limit, room = rollout.max_prompt_tokens, rollout.max_response_tokens
    open_rows, stride = np.arange(len(chosen)), len(problems) // _CHECKED
    for step in range(1, _CHECKED):
      asked = [chosen[i] for i in open_rows]
      if demonstrated:  # by each process for rows of its own
        both = zip(self._prompt_ids(asked), self._demonstration_ids(asked))
        fits = np.array([len(ids) <= limit and 0 < len(own) < room for ids, own in both], bool)
      else:
        fits = self._lengths(asked, self._prompt_ids) <= limit
      open_rows = open_rows[~fits]
      if step == 1:
        where = f"of the first {len(chosen)} {what}, which do not fit; others stand in for them"
        self.left_out.setdefault(where, len(open_rows))
      for i in open_rows:
        chosen[i] = problems[(int(order[i]) + step * stride) % len(problems)]
      is_hopeless = len(open_rows) == len(chosen) and step * len(chosen) >= 8 * _CHECKED
      if is_hopeless or not len(open_rows):
        break
    return chosen

  def questions(self, cursor: int, count: int) -> Prompts:
    """The training questions at positions cursor .. cursor + count - 1 of the seeded order."""
    problems = self.split("train")
    order = question_order(len(problems), self.config.seed, cursor, count)
    return self._prompts(self._fitting("questions", problems, order))

  def held_out(self, split: str, count: int) -> Prompts:
    """The first `count` problems of a split, the same at every evaluation."""
    if (split, count) not in self._held_out:
      problems = self.split(split)
      order = np.arange(min(count, len(problems)))
      rows = self._fitting(f"{split} questions", problems, order)
      self._held_out[split, count] = self._prompts(rows)
    return self._held_out[split, count]

  def demonstrations(
    self, cursor: int, count: int, own: np.ndarray | slice = slice(None)
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows of the warm start: tokens, is_token and the mask of the response.

    Args:
      own: bool[count] or a slice, the rows of these that are made.
    """
    problems = self._demonstrated()
    order = question_order(
      len(problems), self.config.seed + int(Purpose.DEMONSTRATE), cursor, count
    )
    rows = self._fitting("demonstrations", problems, order[own], demonstrated=True)
    questions = self._prompts(rows, are_shared=False)
    end = self.engine.sampling.end_ids[0]
    responses = [[*ids, end] for ids in self._demonstration_ids(questions.problems)]
    room = self.config.rollout.max_response_tokens
    if (longest := max(map(len, responses))) > room:
      raise ValueError(
        f"a demonstration has {longest} tokens with its end, rollout.max_response_tokens={room} "
        f"cannot hold it. Raise it to {longest}."
      )
    lengths = np.array([len(row) for row in responses], np.int32)
    tokens = np.array([row + [end] * (room - len(row)) for row in responses], np.int32)
    self._assert_known("demonstration", tokens)
    return behind_prompts(questions, np.arange(len(responses)), tokens, lengths)

  def test_accuracies(
    self, params: model.Params, count: int
  ) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Held-out figures, and a few sampled texts with their rewards."""
    questions = self.held_out("test", count)
    settings = self.config.eval
    figures, sampled = validation.accuracies(
      self._examiner(), params, questions, settings.temperature, settings.top_p,
      self.key(Purpose.EVALUATE),
    )  # fmt: skip
    shown = select(sampled, slice(settings.texts))
    return figures, validation.texts(questions, shown, self.decode(shown.samples))

  def dev_accuracy(self, params: model.Params, count: int, temperature: float) -> float:
    """Accuracy on the validation split; greedy at temperature 0."""
    settings = self.config.eval
    responses = validation.respond(
      self._examiner(), params, self.held_out("validation", count), temperature, settings.top_p,
      self.key(Purpose.EVALUATE),
    )  # fmt: skip
    return validation.accuracy(responses)

  def decode(self, samples: Samples) -> list[str]:
    """Text of each response, without its end."""
    return tokenizer.decode_responses(
      self.tokenizer, samples.tokens, samples.lengths, self.engine.sampling.end_ids,
      self.config.rollout.stop,
    )  # fmt: skip

  def _prompts(self, problems: Sequence[Problem], are_shared: bool = True) -> Prompts:
    """The encoded problems; of those that all processes share each encodes some."""

    def encode(share: slice) -> tuple[np.ndarray, np.ndarray]:
      tokens, lengths = prompts.encode(
        self.tokenizer, self.template, [p.prompt for p in problems[share]],
        self.config.rollout.max_prompt_tokens, self.engine.sampling.pad_id,
      )  # fmt: skip
      self._assert_known("prompt", tokens)
      return tokens, lengths

    rows = in_shares(len(problems), encode) if are_shared else encode(slice(None))
    uids = np.array([p.uid for p in problems], np.int64)
    return Prompts(*rows, uids, tuple(problems))

  def _assert_known(self, what: str, tokens: np.ndarray) -> None:
    """Tokenizers may know more tokens than the model; only their use is a mistake."""
    if (highest := int(tokens.max(initial=0))) >= self.model_config.vocab_size:
      raise ValueError(
        f"model.path={self.config.model.path}: a {what} holds token {highest} of its tokenizer, "
        f"its model has {self.model_config.vocab_size}. Take the tokenizer of this model."
      )

  def _prompt_ids(self, problems: Sequence[Problem]) -> list[list[int]]:
    return prompts.token_ids(self.tokenizer, self.template, [p.prompt for p in problems])

  def _demonstration_ids(self, problems: Sequence[Problem]) -> list[list[int]]:
    texts = [problem.demonstration or "" for problem in problems]
    return tokenizer.token_ids(self.tokenizer, texts, add_special_tokens=False)


def build(config: Config, training: bool = True) -> Experiment:
  """Loads everything a run needs except parameters.

  Args:
    training: whether every split that training asks for must be there, and fit.
  Raises:
    ValueError: one line, where task, tokenizer and configuration do not fit together.
  """
  task = load_task(config.task, config.seed)
  tokens = _load_tokenizer(config, task)
  model_config = _model_config(config, tokens)
  if config.checkpoint.export:
    hf.export_family(model_config)  # raises now what would be raised after training
  path, rollout = config.model.path, config.rollout
  named = hf.end_ids(path, tokens) if path else tokenizer.eos_ids(tokens)
  ends = tuple(token for token in named if token < model_config.vocab_size)
  if not ends:
    raise ValueError(
      f"model.path={path}: responses end with token {named[0]} of its tokenizer, its model has "
      f"{model_config.vocab_size}. Take the tokenizer of this model."
    )

  def grade(
    problems: Sequence[Problem],
    rows: np.ndarray,
    lengths: np.ndarray,
    finished: np.ndarray,
    with_penalties: bool = True,
  ) -> np.ndarray:
    responses = tokenizer.decode_responses(tokens, rows, lengths, ends, rollout.stop)
    graded = task.grade_many(problems, responses, finished.tolist(), with_penalties)
    return np.array([grade.reward for grade in graded], np.float32)

  pad = tokens.pad_token_id  # which may be none of the model's tokens
  sampling = Sampling(
    temperature=rollout.temperature,
    top_p=rollout.top_p,
    end_ids=ends,
    pad_id=ends[0] if pad is None or pad >= model_config.vocab_size else int(pad),
    top_k=rollout.top_k,
    truncate=rollout.top_p < 1 or rollout.top_k > 0,
    stop_table=stops.table(tokens, rollout.stop, model_config.vocab_size) if rollout.stop else None,
  )
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    width = model.head_width(model_config)
    kernel_for(model_config.attention, model_config.compute_dtype, width)  # or says what is wrong
  rollout_mesh = sharding.make_rollout_mesh(rollout.mesh, mesh)
  check_rows(config, mesh, rollout_mesh, training)
  engine = Engine(
    model_config, sampling, rollout.rows, rollout.max_response_tokens, grade, rollout_mesh
  )
  template = task.prompt if config.task.prompt == "default" else config.task.prompt
  count_right = functools.partial(grade, with_penalties=False)
  experiment = Experiment(config, model_config, task, tokens, template, engine, count_right, mesh)
  if training:
    _check_lengths(experiment)
  return experiment


def _load_tokenizer(config: Config, task: Task) -> Any:
  """That of model.path; for a new model one of the task's characters, or a BPE of its texts."""
  if config.model.path:
    return tokenizer.load_tokenizer(config.model.path)
  has_spaces = task.charset is None or any(map(str.isspace, task.charset))
  if has_spaces and config.checkpoint.export and hf.export_family(config.model) == "qwen2":
    raise ValueError(
      f"task.name={config.task.name} makes a tokenizer, and transformers would read it as Qwen2's "
      "in an exported folder. Set model.qkv_bias=false, or checkpoint.export=false."
    )
  if task.charset is not None:
    return tokenizer.character_tokenizer(task.charset)
  return tokenizer.bpe_tokenizer(_texts(task.split("train")), config.model.tokenizer_tokens)


def _texts(problems: Sequence[Problem]) -> Iterator[str]:
  for i in range(min(len(problems), _TOKENIZER_TEXTS)):
    yield f"{problems[i].prompt}\n{problems[i].demonstration or ''}"


def _model_config(config: Config, tokens: Any) -> ModelConfig:
  if config.model.path:
    stored = hf.read_config(config.model.path)
    check_context(config_at(config, config.train.iterations), stored.max_position)
    own = config.model
    return dataclasses.replace(stored, compute_dtype=own.compute_dtype, attention=own.attention)
  if config.model.vocab_size not in (0, len(tokens)):
    raise ValueError(
      f"model.vocab_size={config.model.vocab_size}, but the tokenizer has {len(tokens)} tokens. "
      "Set model.vocab_size=0."
    )
  return dataclasses.replace(config.model, vocab_size=len(tokens))


def check_rows(config: Config, mesh: Mesh, rollout_mesh: Mesh, training: bool) -> None:
  """Raises ConfigError where rows cannot be shared out evenly."""
  own = "mesh" if rollout_mesh == mesh else "rollout.mesh"
  rows = [(own, rollout_mesh, "rollout.rows", config.rollout.rows)]
  if training:
    rows.append(("mesh", mesh, "train.micro_batch_rows", config.train.micro_batch_rows))
    if config.rollout.recompute_logprobs:
      rows.append(("mesh", mesh, "rollout.rows", config.rollout.rows))
  if config.sft.max_steps:
    sft_rows = config.sft.micro_batch_rows or config.sft.batch_rows
    rows.append(("mesh", mesh, "sft.micro_batch_rows", sft_rows))
  wrong = [
    f"{key}={count} cannot be shared out to {section}.data x {section}.fsdp = {shards} "
    f"devices. Set it to a multiple of {shards}."
    for section, of, key, count in rows if count % (shards := sharding.row_shards(of))
  ]  # fmt: skip
  if wrong:
    raise ConfigError(" ".join(dict.fromkeys(wrong)))


def _check_lengths(experiment: Experiment) -> None:
  """Raises ValueError for prompts and demonstrations that are longer than their rows."""
  config = experiment.config
  experiment.held_out("test", min(config.eval.problems, _CHECKED))
  experiment.questions(cursor=0, count=_CHECKED)
  if config.sft.max_steps or config.eval.validation_problems:
    wanted = max(config.sft.check_problems, config.eval.validation_problems)
    experiment.held_out("validation", min(wanted, _CHECKED))
  if config.sft.max_steps:
    count = -(-_CHECKED // jax.process_count()) * jax.process_count()  # all have some
    in_shares(count, lambda share: experiment.demonstrations(0, count, share))
