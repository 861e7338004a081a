"""Every kernel of attention means the same, and each platform gets its own."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from programs import printed_on_eight_devices

from spo_jax import attention, model
from spo_jax.config import ConfigError

interpreted = partial(attention.splash, interpret=True)


def inputs(rows, length, heads, kv_heads, width, dtype="float32", seed=0):
  """q, keys, values, and which slots hold tokens: rows of different lengths, the first one full."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(2 * rng.normal(size=shape), dtype)

  q = normal(rows, length, heads, width)
  keys, values = (normal(rows, kv_heads, length, width) for _ in range(2))
  lengths = rng.integers(1, length, rows)
  lengths[0] = length
  return (q, keys, values), np.arange(length) < lengths[:, None]


def with_gradients(function, arguments, is_token, seed=1):
  """What comes out at tokens, and the gradients of a random sum of that."""
  weights = np.random.default_rng(seed).normal(size=arguments[0].shape)
  weights = jnp.asarray(np.where(is_token[..., None, None], weights, 0), jnp.float32)

  def loss(*arguments):
    out = function(*arguments)
    return jnp.sum(weights * out), out

  (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arguments)
  assert np.isfinite(out).all()
  return [np.asarray(x, np.float32) for x in (jnp.where(weights != 0, out, 0), *gradients)]


def defined(is_token):
  return partial(attention.causal_attention, is_token=is_token, asked="xla")


def assert_close(actual, expected, tolerance):
  for one, other in zip(actual, expected, strict=True):
    assert np.abs(other).max() > 1
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


# Splash attention against the definition.


@pytest.mark.parametrize(
  ("length", "heads", "kv_heads", "width"), [(7, 2, 2, 8), (130, 6, 2, 64), (600, 2, 1, 8)]
)
def test_splash_attention_is_attention_with_the_same_gradients(length, heads, kv_heads, width):
  """Grouped heads, lengths that no block divides, one block and several, padding."""
  arguments, is_token = inputs(2, length, heads, kv_heads, width)
  actual = with_gradients(interpreted, arguments, is_token)
  assert_close(actual, with_gradients(defined(is_token), arguments, is_token), 1e-5)


def test_splash_attention_in_bfloat16_is_near_the_definition_in_float32():
  """The softmax is in float32: rounded scores of size 10 would be 2% off."""
  arguments, is_token = inputs(2, 200, 2, 1, 64, "bfloat16")
  actual = with_gradients(interpreted, arguments, is_token)
  exact = [x.astype(jnp.float32) for x in arguments]
  assert_close(actual, with_gradients(defined(is_token), exact, is_token), 0.02)


def test_a_model_on_splash_attention_has_the_same_logits_and_cache(monkeypatch):
  kernels = {"auto": "splash", "xla": "xla"}
  monkeypatch.setattr(attention, "kernel_for", lambda asked, *_: kernels[asked])
  monkeypatch.setattr(attention, "splash", interpreted)
  ours = dataclasses.replace(tiny.QWEN3, rope_theta=50.0)  # traced nowhere else
  theirs = dataclasses.replace(ours, attention="xla")
  prompts, params = tiny.prompts(4), tiny.params(tiny.QWEN3)
  is_token = np.arange(tiny.PROMPT_WIDTH) < prompts.lengths[:, None]
  logits, expected = (
    np.asarray(tiny.logits(c, params, prompts.tokens, is_token)) for c in (ours, theirs)
  )
  assert not np.array_equal(logits, expected)  # which two equal programs would be
  np.testing.assert_allclose(logits[is_token], expected[is_token], atol=1e-4)
  (keys, values), (their_keys, their_values) = (
    model.prefill(c, params, prompts.tokens, prompts.lengths) for c in (ours, theirs)
  )
  seen = is_token[:, None, :, None]
  for one, other in zip(keys + values, their_keys + their_values, strict=True):
    np.testing.assert_allclose(np.where(seen, one, 0), np.where(seen, other, 0), atol=1e-5)


# Which kernel runs where.


def on(platform, shape=(1, 1, 1)):
  """A mesh of devices that are only described."""
  device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform=platform)
  return use_abstract_mesh(
    AbstractMesh(shape, ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, abstract_device=device)
  )


@pytest.mark.parametrize(
  ("platform", "asked", "dtype", "width", "kernel"),
  [
    ("tpu", "auto", "bfloat16", 128, "splash"),
    ("tpu", "auto", "float32", 12, "splash"),
    ("tpu", "xla", "bfloat16", 128, "xla"),
    ("gpu", "auto", "bfloat16", 64, "cudnn"),
    ("gpu", "auto", "float32", 64, "xla"),
    ("gpu", "auto", "bfloat16", 12, "xla"),
    ("gpu", "auto", "bfloat16", 256, "xla"),
    ("gpu", "cudnn", "bfloat16", 128, "cudnn"),
    ("cpu", "auto", "bfloat16", 128, "xla"),
  ],
)
def test_the_platform_of_the_mesh_chooses_the_kernel(platform, asked, dtype, width, kernel):
  with on(platform):
    assert attention.kernel_for(asked, dtype, width) == kernel
  assert attention.kernel_for("auto", dtype, width) == "xla"  # that of this process


@pytest.mark.parametrize(
  ("platform", "asked", "dtype", "said"),
  [
    ("cpu", "splash", "bfloat16", "model.attention=splash runs on a tpu, .* are cpu"),
    ("tpu", "cudnn", "bfloat16", "model.attention=cudnn runs on a gpu, .* are tpu"),
    ("gpu", "cudnn", "float32", "model.attention=cudnn takes bfloat16 .*not float32"),
  ],
)
def test_a_kernel_that_cannot_run_is_refused(platform, asked, dtype, said):
  with on(platform), pytest.raises(ConfigError, match=said):
    attention.kernel_for(asked, dtype, 64)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(12, 2, 128), (14, 2, 64), (4, 4, 80)])
def test_a_tpu_program_makes_no_array_of_scores(heads, kv_heads, width):
  """The shapes of Qwen2.5-1.5B and 0.5B, and one that is odd, lowered for a TPU."""
  length = 1000
  arguments, is_token = inputs(2, length, heads, kv_heads, width, "bfloat16")

  def loss(*arguments):
    return jnp.sum(attention.causal_attention(*arguments, is_token).astype(jnp.float32))

  with on("tpu"):
    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arguments).lower(
      lowering_platforms=("tpu",)
    ).as_text()  # fmt: skip
  assert text.count("tpu_custom_call") >= 3  # forward, and backward to q and to keys and values
  assert "x1000x1000x" not in text and "x1024x1024x" not in text


@pytest.mark.devices
def test_every_device_runs_the_kernel_on_its_own_rows_and_heads():
  """On 8 virtual devices: values and gradients of one device, and nothing of q is gathered."""
  assert printed_on_eight_devices("test_attention") == ["8x1x1", "1x2x4", "2x2x2", "1x4x2"]


def check_meshes():
  """Keys of 2 heads: shared out by 2, copied for 4; and rows that 4 do not divide."""
  from spo_jax import sharding
  from spo_jax.config import MeshConfig

  for shape, rows in (((8, 1, 1), 8), ((1, 2, 4), 4), ((2, 2, 2), 4), ((1, 4, 2), 2)):
    arguments, is_token = inputs(rows, 130, 4, 2, 8)
    expected = with_gradients(defined(is_token), arguments, is_token)
    mesh = sharding.make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
      function = partial(attention._on_every_device, interpreted)
      placed = [
        jax.device_put(x, sharding.activation(name, x.shape, mesh))
        for x, name in zip(arguments, ("heads", "cache", "cache"))
      ]
      assert_close(with_gradients(function, placed, is_token), expected, 1e-5)
      text = jax.jit(function).lower(*placed).compile().as_text()
      assert "all-gather" not in text and "all-to-all" not in text, text
    print("x".join(map(str, shape)))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("length", [7, 130, 600])
def test_cudnn_attention_is_attention_with_the_same_gradients(length):
  arguments, is_token = inputs(2, length, 6, 2, 64, "bfloat16")
  actual = with_gradients(attention.cudnn, arguments, is_token)
  exact = [x.astype(jnp.float32) for x in arguments]
  assert_close(actual, with_gradients(defined(is_token), exact, is_token), 0.02)
