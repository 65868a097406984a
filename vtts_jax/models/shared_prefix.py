"""Attention of candidates to a prefix that the candidates of a prompt share and to their own cache.

A prompt's keys and values exist once, however many candidates read them: a search with hundreds of
candidates holds and reads one copy.

Letters: B prompts · N candidates · C streams of guidance · Q queries · S slots of a cache ·
W slots of a prefix · L layers · h heads · d channels of a head · D = h d.
"""

import jax
import jax.numpy as jnp


def attend_shared(q, cache, visible, prefix=None, prefix_visible=True):
  """Attention with scale 1 / sqrt d; softmax in float32.

  Args:
    q: `[B, N, Q, C, h, d]`.
    cache: (k, v), each `[B, N, C, S, D]`.
    visible: bool, broadcasts to `[B, N, Q, S]`; with a prefix a query may see no slot.
    prefix: (k, v), each `[B, C, W, D]`, or None.
    prefix_visible: bool, broadcasts to `[B, C, W]`.

  Returns:
    `[B, N, Q, C, D]`.
  """
  heads, width = q.shape[-2:]
  split = lambda x: x.reshape(*x.shape[:-1], heads, width)
  k, v = map(split, cache)
  S = k.shape[3]
  s = jnp.einsum('bnqchd,bncshd->bnqchs', q, k, preferred_element_type=jnp.float32)
  s = jnp.where(jnp.asarray(visible)[..., None, None, :], s, -jnp.inf)
  if prefix is not None:
    prefix_k, prefix_v = map(split, prefix)
    shared = jnp.einsum('bnqchd,bcwhd->bnqchw', q, prefix_k, preferred_element_type=jnp.float32)
    seen = jnp.broadcast_to(prefix_visible, (*prefix_k.shape[:3],))[:, None, None, :, None]
    s = jnp.concatenate([s, jnp.where(seen, shared, -jnp.inf)], -1)
  # one softmax over both: the parts are weighed against each other
  a = jax.nn.softmax(s * width**-0.5, -1).astype(v.dtype)
  x = jnp.einsum('bnqchs,bncshd->bnqchd', a[..., :S], v)
  if prefix is not None:
    x = x + jnp.einsum('bnqchw,bcwhd->bnqchd', a[..., S:], prefix_v)
  return x.reshape(*x.shape[:-2], -1)


def write_cache(cache, new, layer, slot):
  """Writes keys or values into a cache of all layers.

  Args:
    cache: `[B, N, C, L, S, D]`.
    new: `[B, N, Q, C, D]`.
    layer: a scalar.
    slot: of the first query, the others behind it; a scalar, or `[B, N]`.
  """
  new = new.swapaxes(2, 3)[:, :, :, None].astype(cache.dtype)  # [B, N, C, 1, Q, D]
  # the same slots for all candidates are one contiguous write
  if jnp.ndim(slot) == 0:
    return jax.lax.dynamic_update_slice(cache, new, (0, 0, 0, layer, slot, 0))

  def write_row(cache, new, slot):
    return jax.lax.dynamic_update_slice(cache, new, (0, layer, slot, 0))

  # candidates at different positions write to different slots
  return jax.vmap(jax.vmap(write_row))(cache, new, slot)


def read_layer(cache, layer):
  """Keys or values of one layer: `[B, N, C, L, S, D]` -> `[B, N, C, S, D]`."""
  return jax.lax.dynamic_index_in_dim(cache, layer, 3, keepdims=False)
