"""FLOPs and bytes of one call by formula, per chip: the compiler counts loop bodies once.

FLOPs are those that the programs do at most: rows are at their longest, and every token of a row
is trained on (the head looks at those of the probability mask alone). Bytes between HBM and the
chip are a lower bound: each array that must be in HBM is written and read once per use, as if
everything else were fused.
"""

from __future__ import annotations

from dataclasses import dataclass

from spo_jax.config import ModelConfig
from spo_jax.model import head_width

MASTER_BYTES = 4  # parameters, gradients, moments, scores and logits are float32


@dataclass(frozen=True)
class Cost:
  flops: float = 0.0  # per chip
  bytes: float = 0.0  # to and from HBM, per chip

  def __add__(self, other: Cost) -> Cost:
    return Cost(self.flops + other.flops, self.bytes + other.bytes)

  def __mul__(self, times: float) -> Cost:
    return Cost(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Split:
  """How work is shared out: chips among which rows are, and among which heads and channels are;
  and whether a kernel keeps scores of attention on the chip and skips what is masked."""

  rows: int = 1  # mesh.data * mesh.fsdp
  parameters: int = 1  # mesh.fsdp * mesh.tensor
  tensor: int = 1
  fused: bool = False

  def rows_per_chip(self, rows: int) -> int:
    """Rows that do not divide are computed by every chip, as sharding.py lays them out."""
    return rows // self.rows if rows % self.rows == 0 else rows


def layer_weights(c: ModelConfig) -> int:
  """Weights of the matrices of one layer: W = E (N + 2 K) H + N H E + 3 E F."""
  width = head_width(c)
  attention = c.hidden_size * (2 * c.num_heads + 2 * c.num_kv_heads) * width
  return attention + 3 * c.hidden_size * c.intermediate_size


def item_bytes(c: ModelConfig) -> int:
  return 2 if c.compute_dtype == "bfloat16" else 4


def forward(c: ModelConfig, rows: int, length: int, split: Split, keys: int = 0) -> Cost:
  """Full forward of i32[rows, length] to hidden states: projections and `attention`.

    FLOPs = tokens * layers * 2 W

  Bytes: weights once; per token and layer 2 (6 E + (2 N + 2 K) H + 3 F) elements of activations.
  """
  width, item = head_width(c), item_bytes(c)
  tokens = split.rows_per_chip(rows) * length
  inside = (2 * c.num_heads + 2 * c.num_kv_heads) * width + 3 * c.intermediate_size
  activations = 2 * item * tokens * (6 * c.hidden_size + inside / split.tensor)
  weights = item * layer_weights(c) / split.tensor
  layer = Cost(2 * layer_weights(c) * tokens / split.tensor, weights + activations)
  return layer * c.num_layers + attention(c, rows, length, split, keys)


def attention(c: ModelConfig, rows: int, length: int, split: Split, keys: int = 0) -> Cost:
  """Both products with every pair of slots of a row, or with the half of them that is seen.

  `xla` leaves out most others too, which is not counted.

    FLOPs = layers * rows * length^2 * 4 N H

  Bytes: each score is written and read in float32 and once more in the compute dtype, unless
  it stays on the chip.

  Args:
    keys: of a pack, those that a query is compared with; 0: a row, all of its slots.
  """
  pairs = split.rows_per_chip(rows) * length * (keys or length) * c.num_heads / split.tensor
  if split.fused and not keys:
    return Cost(2 * pairs * head_width(c)) * c.num_layers
  return Cost(4 * pairs * head_width(c), 2 * (MASTER_BYTES + item_bytes(c)) * pairs) * c.num_layers


def head(c: ModelConfig, rows: int, length: int, split: Split) -> Cost:
  """Logits of every token and what is read from them: 2 E V FLOPs; logits written, read twice."""
  tokens = split.rows_per_chip(rows) * length
  words = c.vocab_size / split.tensor
  weights = item_bytes(c) * c.hidden_size * words
  return Cost(2 * tokens * c.hidden_size * words, weights + 3 * MASTER_BYTES * tokens * words)


def prefill(c: ModelConfig, rows: int, length: int, split: Split) -> Cost:
  return forward(c, rows, length, split)


def score(c: ModelConfig, rows: int, length: int, split: Split) -> Cost:
  return forward(c, rows, length, split) + head(c, rows, length, split)


def decode(c: ModelConfig, rows: int, slots: int, steps: int, split: Split) -> Cost:
  """`steps` tokens for each row, from caches of which every slot is read at every step.

    FLOPs = steps * rows * (layers * (2 W + 4 N H slots) + 2 E V)
  """
  width, item = head_width(c), item_bytes(c)
  own = split.rows_per_chip(rows)
  per_layer = 2 * layer_weights(c) + 4 * c.num_heads * width * slots
  cache = 2 * item * own * slots * c.num_kv_heads * width
  layers = Cost(own * per_layer, item * layer_weights(c) + cache) * (c.num_layers / split.tensor)
  return (layers + head(c, rows, 1, split)) * steps


def update(
  c: ModelConfig, parameters: int, micro_batches: int, rows: int, length: int, reference: bool,
  remat: str, split: Split, keys: int = 0,
) -> Cost:  # fmt: skip
  """Gradients over micro-batches of i32[rows, length], one step of AdamW.

  A backward pass is two forwards, and what `remat` computes again: all of the layers, or their
  attention alone, as packs (`keys`, see `attention`) always do. The head is computed once more as
  well, because its logits are not kept. The gradient is written, added to the sum and read
  (4 bytes, 4 times); the step reads parameter, gradient and both moments and writes all but the
  gradient.
  """
  body, logits = forward(c, rows, length, split, keys), head(c, rows, length, split)
  scores = attention(c, rows, length, split, keys)
  again = {"none": Cost(), "dots": scores, "layer": body}[remat]
  if keys:
    again += scores
  one = body * 3 + again + logits * 4
  if reference:
    one += body + logits
  own = MASTER_BYTES * parameters / split.parameters
  return (one + Cost(bytes=4 * own)) * micro_batches + Cost(bytes=7 * own)


def kept_per_layer(
  c: ModelConfig, rows: int, length: int, remat: str, split: Split, keys: int = 0
) -> float:
  """Bytes that one more layer adds to an update at least: its gradient, and what its forward
  leaves for its backward pass.

  Per token: its input (layer), the outputs of its projections too (dots), or also what stands
  between them (none), scores of attention included unless they stay on the chip or, in packs
  (`keys`), are computed again.
  """
  width, item = head_width(c), item_bytes(c)
  tokens = split.rows_per_chip(rows) * length
  heads = (c.num_heads + 2 * c.num_kv_heads) * width
  elements = float(c.hidden_size)
  if remat != "layer":
    elements += 2 * c.hidden_size + (heads + 2 * c.intermediate_size) / split.tensor
  scores = 0.0
  if remat == "none":
    inside = c.num_heads * width + 2 * c.intermediate_size
    elements += 2 * c.hidden_size + inside / split.tensor
    if not split.fused and not keys:
      scores = (MASTER_BYTES + item) * tokens * length * c.num_heads / split.tensor
  gradient = MASTER_BYTES * layer_weights(c) / split.parameters
  return gradient + item * tokens * elements + scores
