"""The decode kernel of GPUs means what the definition means, and reads nothing it should not."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import printed_on_eight_devices
from test_attention import on

from spo_jax import attention
from spo_jax.flash_decode import flash_decode

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


def inputs(rows, heads, kv_heads, width, capacity, dtype, seed=0):
  """q, keys, values and positions: the first slot, the last, past the end, and any."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(2 * rng.normal(size=shape), dtype)

  positions = rng.integers(0, capacity, (rows, 1)).astype(np.int32)
  positions[:3, 0] = 0, capacity - 1, capacity + 5
  cached = (rows, kv_heads, capacity, width)
  return normal(rows, 1, heads, width), normal(*cached), normal(*cached), positions


def defined(*arguments):
  exact = [x.astype(jnp.float32) for x in arguments[:3]]
  return attention.cache_attention(*exact, arguments[3], "xla")


SHAPES = [(12, 2, 128, 96), (14, 2, 64, 100), (4, 4, 16, 7), (34, 2, 32, 65), (8, 1, 64, 32)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention_over_what_is_filled(shape):
  """One to 17 queries for each head of keys, capacities that blocks divide and do not."""
  for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.02)):
    arguments = inputs(5, *shape, dtype)
    actual = flash_decode(*arguments, interpret=True)
    assert actual.dtype == dtype
    expected = defined(*arguments)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, 0, tolerance * 4)


def test_slots_behind_a_row_are_not_looked_at():
  q, keys, values, positions = inputs(5, 4, 2, 16, 70, "float32")
  behind = (np.arange(70) > positions)[:, None, :, None]
  poisoned = (jnp.where(behind, jnp.nan, x) for x in (keys, values))
  actual = flash_decode(q, *poisoned, positions, interpret=True)
  np.testing.assert_allclose(actual, defined(q, keys, values, positions), 0, 1e-5)


@pytest.mark.parametrize(
  ("platform", "asked", "dtype", "width", "mesh", "is_kernel"),
  [
    ("gpu", "auto", "bfloat16", 64, (1, 1, 1), True),
    ("gpu", "cudnn", "bfloat16", 64, (1, 1, 1), True),
    ("gpu", "auto", "bfloat16", 64, (2, 1, 2), True),
    ("gpu", "auto", "bfloat16", 64, (1, 1, 4), False),  # 2 heads of keys
    ("gpu", "xla", "bfloat16", 64, (1, 1, 1), False),
    ("gpu", "auto", "float32", 64, (1, 1, 1), False),
    ("gpu", "auto", "bfloat16", 80, (1, 1, 1), False),  # no power of two
    ("tpu", "auto", "bfloat16", 64, (1, 1, 1), False),
    ("cpu", "auto", "bfloat16", 64, (1, 1, 1), False),
  ],
)
def test_where_it_runs(platform, asked, dtype, width, mesh, is_kernel):
  arguments = inputs(4, 8, 2, width, 32, dtype)
  with on(platform, mesh):
    jaxpr = jax.make_jaxpr(partial(attention.cache_attention, asked=asked))(*arguments)
  assert ("flash_decode" in str(jaxpr)) == is_kernel


@pytest.mark.devices
def test_every_device_decodes_its_own_rows_and_heads():
  assert printed_on_eight_devices("test_flash_decode") == ["8x1x1", "1x4x2", "2x2x2"]


def check_meshes():
  from spo_jax import sharding
  from spo_jax.config import MeshConfig

  arguments = inputs(8, 4, 2, 16, 40, "float32")
  expected = defined(*arguments)
  names = ("heads", "cache", "cache", "rows")
  for shape in ((8, 1, 1), (1, 4, 2), (2, 2, 2)):
    mesh = sharding.make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
      placed = [
        jax.device_put(x, sharding.activation(name, x.shape, mesh))
        for x, name in zip(arguments, names)
      ]
      kernel = partial(flash_decode, interpret=True)
      program = jax.jit(partial(attention._on_every_device, kernel)).lower(*placed).compile()
      np.testing.assert_allclose(program(*placed), expected, 0, 1e-5)
      text = program.as_text()
      assert "all-gather" not in text and "all-to-all" not in text, text
    print("x".join(map(str, shape)))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("shape", [(12, 2, 128, 1088), (14, 2, 64, 700), (4, 4, 16, 7)])
def test_on_a_gpu_it_is_the_same(shape):
  arguments = inputs(9, *shape, "bfloat16")
  actual = jax.jit(attention.cache_attention)(*arguments)
  np.testing.assert_allclose(actual.astype(jnp.float32), defined(*arguments), 0, 0.08)
