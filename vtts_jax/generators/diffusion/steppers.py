"""Steppers: from one time to the next, given what the network believes in.

A stepper has `evaluations` (network calls a step), `is_stochastic`, and `step`; see `EulerStepper`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vtts_jax.generators.diffusion import paths


@dataclasses.dataclass(frozen=True)
class EulerStepper:
  """Data and noise are put together again at the next time.

  On the linear path that is Euler's step of the ODE, on others DDIM (Song et al. 2020, arXiv
  2010.02502). A share `eta` of the noise is drawn afresh: with 0 a candidate is its initial noise,
  above 0 candidates diverge on the way, as particle methods need. What is drawn has variance 1 and
  replaces predicted noise, which varies less; so `eta` is a way to explore, not an integrator of
  the reverse SDE (DDIM's own sigma gets smaller with the steps).
  """

  eta: float = 0.0

  evaluations = 1

  @property
  def is_stochastic(self) -> bool:
    return self.eta > 0

  def step(self, split, path, x: jax.Array, t, after, fresh) -> tuple[jax.Array, jax.Array]:
    """(x at the time `after`, the data predicted at t).

    Args:
      split: `(x, t) -> (data, noise)`, one evaluation.
      x: `[B, N, ...]`. t, after: times that broadcast against it.
      fresh: standard normal noise like x; None takes a step without randomness.
    """
    data, noise = split(x, t)
    if fresh is not None:
      noise = jnp.sqrt(1 - self.eta**2) * noise + self.eta * fresh
    return paths.mix(path, data, noise, after), data
