"""A verifier on the host that measures how dark a picture is."""

import dataclasses

import numpy as np

from vtts_jax import core


@dataclasses.dataclass(frozen=True)
class Darkness(core.Verifier):
  """One minus the mean brightness."""

  jittable = False

  @property
  def names(self):
    return ('darkness',)

  def score(self, params, vctx, observed):
    assert isinstance(observed['image'], np.ndarray)
    return {'darkness': 1 - observed['image'].mean((2, 3, 4))}
