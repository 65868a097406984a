"""What generators with models in them share: model parts by name, and classifier-free guidance.

Guidance (Ho & Salimans 2022, arXiv 2207.12598) runs a network on up to two *streams*, with the
prompt and without it, and extrapolates from the second to the first.

Letters: C streams.
"""

import dataclasses

import jax

from vtts_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class GuidedModels:
  """A part of the bases `token.TokenGenerator` and `diffusion.DiffusionGenerator`.

  A family with several models names them in `model_parts`; loading, placement on a mesh and binding
  follow from that. A family that holds its parameters otherwise overrides `load`, `shardings` and
  `bind_part`.

  Attributes:
    guidance: classifier-free guidance scale >= 0; 1 runs a single stream, 0 ignores the prompt, -1
      is the scale that the model was published with (`published_guidance`).
  """

  guidance: float = -1.0

  published_guidance = 1.0  # no setting: a family says here, or in a property, what -1 stands for

  def __post_init__(self):
    if not (self.guidance >= 0 or self.guidance == -1):
      raise ConfigError(f'generator.guidance={self.guidance}: must be >= 0, or -1 (as published)')

  # ---------------------------------------------------------------------------------- model parts

  def model_parts(self) -> dict:
    """{name: `models.pretrained.Pretrained`}, or anything that has its `load(mesh)`, `bind(params)`
    and `shardings(mesh)`; only the parts that the settings need."""
    return {}

  def load(self):
    return {name: part.load() for name, part in self.model_parts().items()}

  def shardings(self, mesh: jax.sharding.Mesh):
    return {name: part.shardings(mesh) for name, part in self.model_parts().items()}

  def bind_part(self, params, name: str):
    """The module of a part with its parameters; free inside `jax.jit`."""
    return self.model_parts()[name].bind(params[name])

  # -------------------------------------------------------------------------------------- guidance

  @property
  def guidance_scale(self) -> float:
    """The guidance scale in force."""
    return float(self.guidance if self.guidance >= 0 else self.published_guidance)

  @property
  def streams(self) -> tuple[str, ...]:
    """Which conditionings run, in the order of the axis C: 'prompt', 'null', or both."""
    return {0.0: ('null',), 1.0: ('prompt',)}.get(self.guidance_scale, ('prompt', 'null'))

  def flops(self, op: str) -> float:
    """Floating-point operations of one call for one candidate (of 'encode': for one prompt), all
    streams together; the bases say which calls they ask for."""
    raise NotImplementedError
