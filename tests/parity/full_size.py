"""Released sizes without their memory: sources of names and shapes, and key tables against them."""

import numpy as np

from vtts_jax.checkpoints.convert import AXIS_ORDERS, _match_rule
from vtts_jax.checkpoints.files import flatten_tree
from vtts_jax.checkpoints.source import Source


def header(model, options=None, also=()):
  """A `Source` over the state dict of a torch model on the meta device, `also` named buffers."""
  shapes = {k: (tuple(v.shape), 'float32') for k, v in model.state_dict().items()}
  shapes |= dict.fromkeys(also, ((1, 9), 'float32'))
  return Source(
    'meta', shapes, lambda name: np.broadcast_to(np.float32(0), shapes[name][0]), options or {}
  )


def check_table(source, rules, template):
  """Every tensor is read or knowingly left, every parameter is filled, every shape fits.

  Nothing is read: a rule's function is called on zeros that take no memory.
  """
  want, filled = flatten_tree(template), set()
  for name in source.tensor_names():
    target, op = _match_rule(name, rules)
    assert target != '', f'{name}: no rule knows it'
    if target is not None:
      zeros = np.broadcast_to(np.float32(0), source.shape_of(name))
      made = op(zeros) if callable(op) else np.transpose(zeros, AXIS_ORDERS[op])
      made = zeros if op == '' else made
      assert made.shape == tuple(want[target].shape), (name, made.shape, target)
      filled.add(target)
  assert filled == set(want), set(want) - filled
