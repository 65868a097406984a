"""Counts the FLOPs of a traced function, to compare with the bills of `models/`."""

import numpy as np


def count_traced_flops(jaxpr):
  """FLOPs of the products of a traced function: loops in full, of branches the costliest."""
  total = 0
  for eqn in jaxpr.eqns:
    out = np.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive.name == 'dot_general':
      shape, axes = eqn.invars[0].aval.shape, eqn.params['dimension_numbers'][0][0]
      total += 2 * out * np.prod([shape[a] for a in axes])
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel, spec = eqn.invars[1].aval, eqn.params['dimension_numbers'].rhs_spec
      total += 2 * out * kernel.size / kernel.shape[spec[0]]
    inner = [x for v in eqn.params.values() for x in (v if isinstance(v, tuple) else (v,))]
    inner = [getattr(x, 'jaxpr', x) for x in inner if hasattr(getattr(x, 'jaxpr', x), 'eqns')]
    if inner:
      total += eqn.params.get('length', 1) * max(map(count_traced_flops, inner))
  return int(total)
