"""The part that all generators with networks share: models by name, classifier-free guidance.

Guidance (Ho & Salimans 2022, arXiv 2207.12598) runs a network on up to two *streams*, with the
prompt and without it, and extrapolates from the second to the first.

Letters: C streams.
"""

import dataclasses

import jax

from vtts_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class GuidedModels:
  """A mixin of `token.TokenGenerator` and `diffusion.DiffusionGenerator`.

  A family lists its models in `model_parts`; loading, placement on a mesh and binding follow from
  that list. A family that stores its parameters in another way overrides `load`, `shardings` and
  `bind_part`.

  Attributes:
    guidance: classifier-free guidance scale >= 0. 1 runs one stream only, 0 ignores the prompt, -1
      selects the scale that the model was published with (`published_guidance`).
  """

  guidance: float = -1.0

  published_guidance = 1.0  # not a setting: a family overrides it to define guidance = -1

  def __post_init__(self):
    if not (self.guidance >= 0 or self.guidance == -1):
      raise ConfigError(f'generator.guidance={self.guidance}: must be >= 0, or -1 (as published)')

  # ---------------------------------------------------------------------------------- model parts

  def model_parts(self) -> dict:
    """The models that these settings need: `{name: models.pretrained.Pretrained}`. Any object with
    `config`, `load()`, `bind(params)` and `shardings(mesh)` may stand for a `Pretrained`."""
    return {}

  def load(self):
    return {name: part.load() for name, part in self.model_parts().items()}

  def shardings(self, mesh: jax.sharding.Mesh):
    return {name: part.shardings(mesh) for name, part in self.model_parts().items()}

  def bind_part(self, params, name: str):
    """The module of one part with its parameters inserted; costs nothing inside `jax.jit`."""
    return self.model_parts()[name].bind(params[name])

  def part_config(self, name: str):
    """The sizes of one part."""
    return self.model_parts()[name].config

  # -------------------------------------------------------------------------------------- guidance

  @property
  def guidance_scale(self) -> float:
    """The guidance scale after -1 has been resolved."""
    return float(self.guidance if self.guidance >= 0 else self.published_guidance)

  @property
  def guidance_streams(self) -> tuple[str, ...]:
    """The network's inputs in the order of axis C: 'prompt', 'null' (no prompt), or both."""
    # scales 0 and 1 cancel one of the two terms, so one stream halves the cost
    return {0.0: ('null',), 1.0: ('prompt',)}.get(self.guidance_scale, ('prompt', 'null'))

  def count_flops(self, op: str) -> float:
    """Floating-point operations of one call, summed over the streams: for one candidate, and of
    'encode' for one prompt. Each base lists the values of `op` that it uses."""
    raise NotImplementedError
