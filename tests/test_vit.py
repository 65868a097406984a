"""Attention of the shared trunk: a CPU's form against jax.nn's, which every other platform gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax.models import vit


@pytest.mark.parametrize('scores', [1 << 30, 2 * 3 * 5 * 7, 1])  # all 6 rows, 2, 1 at a time
@pytest.mark.parametrize('shape', [None, (5, 7), (6, 1, 1, 7), (1, 3, 5, 7)])
def test_attention(monkeypatch, scores, shape):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(6, t, 12)), jnp.float32) for t in (5, 7, 7))
  bias = None if shape is None else jnp.asarray(rng.normal(size=shape), jnp.float32)
  if shape and shape[0] == 6:
    bias = jnp.where(bias > 1, -jnp.inf, bias)  # hidden keys
  split = lambda x: x.reshape(*x.shape[:2], 3, 4)
  whole = None if bias is None else jnp.broadcast_to(bias, (6, 3, 5, 7))
  want = jax.nn.dot_product_attention(split(q), split(k), split(v), bias=whole)
  monkeypatch.setattr(vit, 'SCORES', scores)
  have = vit.multi_head_attention(q, k, v, 3, bias)
  np.testing.assert_allclose(have, want.reshape(q.shape), atol=2e-6)
  monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, cpu, default: default(*args))
  np.testing.assert_array_equal(vit.multi_head_attention(q, k, v, 3, bias), want.reshape(q.shape))


@pytest.mark.parametrize('shape', [None, (5, 7), (6, 1, 1, 7)])
def test_a_tpu_gets_no_loop_over_rows(monkeypatch, shape):
  """The form that is tuned for a CPU is not in the program of another platform."""
  monkeypatch.setattr(vit, 'SCORES', 1)
  q, k, v = (jax.ShapeDtypeStruct((6, t, 12), jnp.float32) for t in (5, 7, 7))
  bias = None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)
  attend = jax.jit(lambda q, k, v, bias: vit.multi_head_attention(q, k, v, 3, bias))
  traced = attend.trace(q, k, v, bias)
  lowered = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ('cpu', 'tpu')}
  assert 'stablehlo.while' in lowered['cpu'] and 'stablehlo.while' not in lowered['tpu']
