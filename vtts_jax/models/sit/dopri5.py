"""Dormand and Prince's adaptive method with torchdiffeq's step control: SiT's default sampler.

For replaying the reference only. One step size serves the whole batch, so a sample depends on the
samples beside it, and the number of network calls is not known before: both rule it out for a
search, which takes Heun's method as the paper on search does. Runs on the host, call by call.
Source: Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, II.4 and II.5.
"""

import jax.numpy as jnp
import numpy as np

ORDER, SAFETY, FASTEST, SLOWEST = 5, 0.9, 10.0, 0.2
STAGES = (  # (time, weights of the slopes so far); the last row is the solution itself
  (1 / 5, (1 / 5,)),
  (3 / 10, (3 / 40, 9 / 40)),
  (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
  (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
  (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
  (1.0, (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
# the solution less that of an embedded method of order 4, and the solution in the middle of a step
ERROR = (35 / 384 - 1951 / 21600, 0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720,
         -2187 / 6784 + 12231 / 42400, 11 / 84 - 649 / 6300, -1 / 60)  # fmt: skip
MIDDLE = (6025192743 / 30085553152 / 2, 0, 51252292925 / 65400821598 / 2,
          -2691868925 / 45128329728 / 2, 187940372067 / 1594534317056 / 2,
          -1776094331 / 19743644256 / 2, 11237099 / 235043384 / 2)  # fmt: skip


def solve_ode(slope, y, start: float, end: float, rtol: float, atol: float):
  """y at `end`, of dy/dt = `slope(t, y)` from y at `start`; any shape."""
  size_of = lambda x, scale: float(jnp.sqrt(jnp.mean((x / scale) ** 2)))
  first = slope(start, y)
  t, step = start, _first_step(slope, start, y, first, rtol, atol, size_of)
  while True:
    slopes = [first]
    for time, weights in STAGES:
      new = y + step * _weighted(weights, slopes)
      slopes.append(slope(t + time * step, new))
    scale = atol + rtol * jnp.maximum(jnp.abs(y), jnp.abs(new))
    error = size_of(step * _weighted(ERROR, slopes), scale)
    accepted, taken = error <= 1, step
    # an accepted step never shrinks the next one
    slowest = 1.0 if error < 1 else SLOWEST
    factor = max(SAFETY / error ** (1 / ORDER), slowest) if error else FASTEST
    step *= min(FASTEST, factor)
    if not accepted:
      continue
    if t + taken >= end:  # the last step goes past the end, and is read by interpolation
      middle = y + taken * _weighted(MIDDLE, slopes)
      return _interpolate(y, new, middle, first, slopes[-1], taken, (end - t) / taken)
    t, y, first = t + taken, new, slopes[-1]


def _weighted(weights, slopes):
  return sum(float(np.float32(w)) * s for w, s in zip(weights, slopes) if w)


def _first_step(slope, t, y, first, rtol, atol, size_of):
  scale = atol + rtol * jnp.abs(y)
  value, speed = size_of(y, scale), size_of(first, scale)
  guess = 1e-6 if min(value, speed) < 1e-5 else 0.01 * value / speed
  bend = size_of(slope(t + guess, y + guess * first) - first, scale) / guess
  if max(speed, bend) <= 1e-15:
    return min(100 * guess, max(1e-6, guess * 1e-3))
  return min(100 * guess, (0.01 / max(speed, bend)) ** (1 / ORDER))


def _interpolate(y, new, middle, first, last, step, share):
  """The polynomial of degree 4 through both ends, their slopes and the middle."""
  a = 2 * step * (last - first) - 8 * (new + y) + 16 * middle
  b = step * (5 * first - 3 * last) + 18 * y + 14 * new - 32 * middle
  c = step * (last - 4 * first) - 11 * y - 5 * new + 16 * middle
  return y + share * (step * first + share * (c + share * (b + share * a)))
