"""Training of the embedded scene models. Each script is run by its own module, for instance
`python -m vtts_jax.scenes.train.flow`; the cards in `scenes/assets` say with which settings."""

from vtts_jax.scenes.models import ASSETS
from vtts_jax.train import loop


def build_parser(steps, **more):
  """The command line of every script here: that of `loop`, writing into the shipped assets."""
  return loop.build_parser(steps, out=str(ASSETS), **more)
