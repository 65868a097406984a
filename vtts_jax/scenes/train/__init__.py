"""Training of the scene models. Each module is a script, for instance
`python -m vtts_jax.scenes.train.flow`; the cards in `scenes/assets` record the settings used."""

from vtts_jax.scenes.models import ASSETS
from vtts_jax.train import loop


def build_parser(steps, **more):
  """The command line of every script: that of `loop`, with the shipped assets as output folder."""
  return loop.build_parser(steps, out=str(ASSETS), **more)
