"""Supervised training alone: python -m spo_jax.sft --config FILE

A training run without reinforcement learning: the warm start of `train`, with the same run
directory, checkpoints, resume and exported model.
"""

from __future__ import annotations

from collections.abc import Sequence

from spo_jax import distributed, train


def main(arguments: Sequence[str] | None = None) -> int:
  return train.main(
    arguments, "sft", "Train a model on a task's demonstrations.", ["train.iterations=0"],
    ["sft.max_steps"],
  )  # fmt: skip


if __name__ == "__main__":
  distributed.leave(main)
