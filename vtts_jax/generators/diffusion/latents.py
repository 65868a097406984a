"""The base of generators that denoise an autoencoder's latents.

The author of a family writes what `generators.diffusion.base` lists, except `decode`, `data_shape`
and `decoded_output`, and instead

  latent_channels    the channels of the latents that the network reads
  latent_sides       rows and columns of the latents; `SizedLatentGenerator` has them as settings

and puts the property `vae` under 'vae' among its `model_parts`. Another autoencoder than
`models.autoencoder_kl` is named by `vae_family`; its Config has `latent_channels`, `downscale` and
`scaling_factor`, its model `unscale_latents` and `decode`, and `decode_flops` is overridden.

Letters: B prompts, N candidates, h w latent cells.
"""

import dataclasses

import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.checkpoints.source import name_pipeline_part
from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion.base import DiffusionGenerator
from vtts_jax.models.autoencoder_kl import modeling as autoencoder_kl
from vtts_jax.models.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class LatentGenerator(DiffusionGenerator):
  """See the head of the file.

  Attributes:
    weights: the network, see `models.pretrained`.
    vae_weights: the autoencoder, likewise; '' takes the one in the network's pipeline or file.
    dtype: dtype of all parameters, 'float32' or 'bfloat16'; latents are always float32.
  """

  weights: str = ''
  vae_weights: str = ''
  dtype: str = 'float32'

  vae_family = 'autoencoder_kl'

  # ------------------------------------------------------------------------- what an author writes

  @property
  def latent_channels(self) -> int:
    """Channels of the latents that the network reads."""
    raise NotImplementedError

  @property
  def latent_sides(self) -> tuple[int, int]:
    """Rows and columns of the latents."""
    raise NotImplementedError

  # ------------------------------------------------------------------------------------- the facts

  @property
  def vae(self) -> Pretrained:
    """The decoder, for `model_parts`: a search never encodes pictures."""
    # a single file has nothing beside it, and may hold the autoencoder as well
    place = self.vae_weights or name_pipeline_part(self.weights, 'vae') or self.weights
    return Pretrained(self.vae_family, place, self.dtype, 'decoder', 'generator.vae_weights')

  @property
  def data_shape(self):
    return (*self.latent_sides, self.latent_channels)

  @property
  def decoded_output(self):
    cell = self.part_config('vae').downscale
    return core.Output('image', (*(side * cell for side in self.latent_sides), 3))

  @property
  def decode_flops(self) -> float:
    """Floating-point operations of decoding one picture."""
    return autoencoder_kl.count_decode_flops(self.part_config('vae'), *self.latent_sides)

  def check(self):
    """Raises `ConfigError` if the autoencoder does not fit the network."""
    vae = self.part_config('vae')
    if vae.latent_channels != self.latent_channels:
      raise ConfigError(
        f'generator.vae_weights: has latent_channels={vae.latent_channels}, the network wants '
        f'{self.latent_channels}'
      )
    # latents of a wrong scale would decode to a wrong picture
    if vae.scaling_factor is None:
      raise ConfigError(
        'generator.vae_weights: no scaling_factor; a config.json with it must be there'
      )
    super().check()

  def decode(self, params, x):
    """Latents `[B, N, h, w, C]` to pictures `[B, N, H, W, 3]` float32 in [0, 1]."""
    vae = self.bind_part(params, 'vae')
    rows = vae.unscale_latents(x.reshape(-1, *x.shape[2:]))
    images = vae.decode(rows.astype(self.dtype)).astype(jnp.float32)
    return jnp.clip(images.reshape(*x.shape[:2], *images.shape[1:]) * 0.5 + 0.5, 0, 1)


@dataclasses.dataclass(frozen=True)
class SizedLatentGenerator(LatentGenerator):
  """A `LatentGenerator` whose pictures may have any size that its networks divide.

  Attributes:
    height, width: of the picture, in pixels.
  """

  height: int = 1024
  width: int = 1024

  patch_cells = 1  # side of the network's patch, in latent cells; a family overrides it

  @property
  def latent_sides(self):
    cell = self.part_config('vae').downscale
    return (self.height // cell, self.width // cell)

  def check(self):
    """Raises `ConfigError` on a size that cannot be made, and as `LatentGenerator.check`."""
    multiple = self.part_config('vae').downscale * self.patch_cells
    for name in ('height', 'width'):
      side = getattr(self, name)
      if not isinstance(side, int) or side < multiple or side % multiple:
        raise ConfigError(f'generator.{name}={side!r}: must be a positive multiple of {multiple}')
    super().check()
