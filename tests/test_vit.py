"""Attention of the shared trunk: the forms of a CPU and of a TPU against jax.nn's."""

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
  choose = lambda *args, cpu, tpu, default: default(*args)
  monkeypatch.setattr(jax.lax, 'platform_dependent', choose)
  np.testing.assert_array_equal(vit.multi_head_attention(q, k, v, 3, bias), want.reshape(q.shape))


@pytest.mark.parametrize('scores', [1 << 20, 40, 100])  # one piece of queries, many, an odd number
@pytest.mark.parametrize('split', [1, 2])
def test_attention_head_by_head(monkeypatch, scores, split):
  """What long sequences get on a TPU, with heads on one device and on two."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(2, t, 16)), jnp.float32) for t in (21, 7, 7))
  heads = lambda x: x.reshape(*x.shape[:2], 4, 4)
  want = jax.nn.dot_product_attention(heads(q), heads(k), heads(v)).reshape(q.shape)
  monkeypatch.setattr(vit, 'TPU_SCORES', scores)
  mesh = jax.sharding.AbstractMesh((1, split), ('data', 'model'))
  monkeypatch.setattr(jax.sharding, 'get_abstract_mesh', lambda: mesh)
  np.testing.assert_allclose(vit._attend_by_head(q, k, v, 4), want, atol=2e-6)


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
