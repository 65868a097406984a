"""TiTok (Yu et al. 2024, arXiv 2406.07550): a picture as a short sequence of tokens without places.

The encoder is a ViT with latent tokens behind the patches; what stands there at its end is
quantised. The decoder is a ViT with mask tokens in the patches' places. The first models
(`legacy`) predict the tokens of MaskGIT's tokenizer (`models.maskgit_vq`) and decode the mean of
its codes under that prediction; the later ones predict pixels. The tokens have no order from coarse
to fine. Checked against the PyTorch reference by the golden files `titok*.npz` (replay.py).

Letters: R pictures · S side of a picture · P side of a patch · g side of the grid of patches ·
K latent tokens · E channels of a code · V codes · D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.models import vit
from vtts_jax.models.llamagen_vq.modeling import unit_codes
from vtts_jax.models.maskgit_vq import modeling as maskgit_vq

EPS = 1e-5
_MASKGIT = maskgit_vq.Config(encoder=False)


def _trunk(name):
  width, layers, heads = {
    'small': (512, 8, 8), 'base': (768, 12, 12), 'large': (1024, 24, 16),
  }[name]  # fmt: skip
  return vit.Config(width, layers, heads, 4 * width, 'gelu', EPS)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and options.

  Attributes:
    encoder_trunk, decoder_trunk: the two ViTs.
    tokens: K.
    token_size: E.
    codes: V.
    unit_sphere: whether latents and codes are scaled to length 1.
    legacy: the first models; see `Encoder` and `Decoder`.
    pixels: MaskGIT's tokenizer of a legacy model, without its encoder; None otherwise.
    encoder: False leaves the encoder out.

  Raises:
    ConfigError: patches do not divide the picture; a legacy model without `pixels`, or `pixels`
      whose grid is another one.
  """

  encoder_trunk: vit.Config
  decoder_trunk: vit.Config
  size: int = 256
  patch: int = 16
  tokens: int = 32
  token_size: int = 12
  codes: int = 4096
  unit_sphere: bool = True
  legacy: bool = True
  pixels: maskgit_vq.Config | None = _MASKGIT
  encoder: bool = True

  def __post_init__(self):
    if self.size % self.patch:
      raise ConfigError(f'size={self.size}: must be a multiple of patch={self.patch}')
    if self.legacy != (self.pixels is not None):
      raise ConfigError(f'legacy={self.legacy}: only a legacy model, and every one, has pixels')
    if self.pixels is not None and self.pixels.downscale != self.patch:
      raise ConfigError(
        f'patch={self.patch}: must be the side of a token of pixels, {self.pixels.downscale}'
      )

  @property
  def grid(self) -> int:
    return self.size // self.patch


def _legacy(encoder, tokens, decoder):
  return Config(_trunk(encoder), _trunk(decoder), tokens=tokens)


def _later(encoder, tokens):
  return Config(_trunk(encoder), _trunk('large'), tokens=tokens, token_size=64, codes=8192,
                unit_sphere=False, legacy=False, pixels=None)  # fmt: skip


_TINY = vit.Config(16, 2, 2, 32, 'gelu', EPS)
SIZES = {
  'tiny': Config(
    _TINY, _TINY, size=8, patch=2, tokens=4, token_size=4, codes=16,
    pixels=dataclasses.replace(maskgit_vq.SIZES['tiny'], encoder=False),
  ),
  # yucornetto/tokenizer_titok_*_imagenet
  'titok_l32': _legacy('large', 32, 'large'),
  'titok_b64': _legacy('base', 64, 'base'),
  'titok_s128': _legacy('small', 128, 'small'),
  # ..._vq8k_imagenet
  'titok_bl64_vq8k': _later('base', 64),
  'titok_bl128_vq8k': _later('base', 128),
  'titok_sl256_vq8k': _later('small', 256),
}  # fmt: skip
PARTS = ('decoder',)


def part_of(c: Config, part: str) -> Config:
  """Returns the config without the encoder: a search only decodes."""
  del part
  return dataclasses.replace(c, encoder=False)


class Trunk(nnx.Module):
  """What the two ViTs share: class token, positions, latent positions, norms, blocks."""

  def __init__(self, c, t: vit.Config, *, rngs):
    self.token = vit.random_table(rngs, t.width)
    self.positions = vit.random_table(rngs, c.grid**2 + 1, t.width)
    self.latent_positions = vit.random_table(rngs, c.tokens, t.width)
    self.norm_before, self.norm_after = vit.LayerNorm(t.width, t.eps), vit.LayerNorm(t.width, t.eps)
    self.trunk = vit.Trunk(t, rngs=rngs)

  def __call__(self, patches, latents):
    """`[R, g g, D]` and `[R, K, D]`, without positions -> `[R, 1 + g g + K, D]`."""
    first = jnp.broadcast_to(self.token[...], (len(patches), 1, patches.shape[-1]))
    seen = jnp.concatenate([first, patches], 1) + self.positions[...]
    # a prefix of the latents decodes, too
    latents = latents + self.latent_positions[...][: latents.shape[1]]
    return self.trunk(self.norm_before(jnp.concatenate([seen, latents], 1)))


class Encoder(nnx.Module):
  """`__call__(images [R, S, S, 3])` -> latents `[R, K, E]`."""

  def __init__(self, c, *, rngs):
    width, self.config = c.encoder_trunk.width, c
    self.embed = nnx.Linear(3 * c.patch**2, width, rngs=rngs)
    self.latents = vit.random_table(rngs, c.tokens, width)
    self.body = Trunk(c, c.encoder_trunk, rngs=rngs)
    self.out = nnx.Linear(width, c.token_size, rngs=rngs)

  def __call__(self, images):
    patches = self.embed(vit.split_patches(images.astype(self.latents.dtype), self.config.patch))
    latents = jnp.broadcast_to(self.latents[...], (len(images), *self.latents.shape))
    # patches have told the latents what they hold, and are dropped
    x = self.body.norm_after(self.body(patches, latents)[:, 1 + patches.shape[1] :])
    # legacy models read the memory of [K, D] as [D, K] before the last layer: the weights were
    # trained with it
    x = x.reshape(len(x), x.shape[2], x.shape[1]).swapaxes(1, 2) if self.config.legacy else x
    return self.out(x)


class Decoder(nnx.Module):
  """`__call__(codes [R, K, E])` -> logits of MaskGIT's codes `[R, g, g, V']` of a legacy model, or
  pictures `[R, S, S, 3]`."""

  def __init__(self, c, *, rngs):
    width, self.config = c.decoder_trunk.width, c
    self.embed = nnx.Linear(c.token_size, width, rngs=rngs)
    self.mask = vit.random_table(rngs, width)
    self.body = Trunk(c, c.decoder_trunk, rngs=rngs)
    if c.legacy:
      self.up = nnx.Linear(width, 2 * width, rngs=rngs)
      self.down = nnx.Linear(2 * width, c.pixels.num_embeddings, rngs=rngs)
    else:
      self.to_pixels = nnx.Linear(width, 3 * c.patch**2, rngs=rngs)
      self.smooth = nnx.Conv(3, 3, (3, 3), padding=1, rngs=rngs)

  def __call__(self, codes):
    c, g = self.config, self.config.grid
    patches = jnp.broadcast_to(self.mask[...], (len(codes), g * g, self.mask.shape[0]))
    x = self.body.norm_after(self.body(patches, self.embed(codes))[:, 1 : 1 + g * g])
    if c.legacy:
      return self.down(jnp.tanh(self.up(x))).reshape(len(x), g, g, -1)
    # a patch is (row, column, colour), and the convolution smooths the seams between patches
    x = self.to_pixels(x).reshape(len(x), g, g, c.patch, c.patch, 3)
    return self.smooth(x.swapaxes(2, 3).reshape(len(x), c.size, c.size, 3))


class TiTok(nnx.Module):
  """Pictures `[R, S, S, 3]` in 0..1 and ids `[R, K]`."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    self.encoder = Encoder(c, rngs=rngs) if c.encoder else None
    self.decoder = Decoder(c, rngs=rngs)
    self.codebook = nnx.Param(jax.random.normal(rngs.params(), (c.codes, c.token_size)))
    self.pixels = None if c.pixels is None else maskgit_vq.Tokenizer(c.pixels, rngs=rngs)

  def _scale(self, x):
    return unit_codes(x) if self.config.unit_sphere else x

  def code_distances(self, latents):
    """Squared distances `[R, K, V]` of latents `[R, K, E]` to all codes."""
    return maskgit_vq.code_distances(self._scale(latents), self._scale(self.codebook[...]))

  def encode(self, images):
    """`[R, S, S, 3]` -> ids `[R, K]` int32; ties go to the lowest index."""
    return jnp.argmin(self.code_distances(self.encoder(images)), -1).astype(jnp.int32)

  def look_up(self, ids):
    """Ids `[...]` -> codes `[..., E]`."""
    # scaled at use: the stored codes have other lengths
    return self._scale(self.codebook[...][ids]).astype(self.codebook.dtype)

  def mix_codes(self, logits):
    """Logits over MaskGIT's codes `[R, g, g, V']` -> their mean code `[R, g, g, E']`."""
    # the mean, not the most probable one: the decoder was trained on it
    weights = jax.nn.softmax(logits.astype(jnp.float32), -1)
    codes = self.pixels.codebook[...]
    return (weights @ codes.astype(jnp.float32)).astype(codes.dtype)

  def decode_latents(self, codes):
    """Codes `[R, K, E]` -> pictures `[R, S, S, 3]` float32, not clipped."""
    x = self.decoder(codes)
    if self.pixels is not None:
      x = self.pixels.decode_latents(self.mix_codes(x))
    return x.astype(jnp.float32)

  def decode(self, ids):
    """Ids `[R, K]` -> pictures `[R, S, S, 3]` float32 in 0..1."""
    return jnp.clip(self.decode_latents(self.look_up(ids)), 0, 1)


def build_model(config: Config, seed=0) -> TiTok:
  """Builds a random model; inside `modules.abstract_module` it uses no memory."""
  return TiTok(config, rngs=nnx.Rngs(seed))


def count_decode_flops(c: Config) -> int:
  """FLOPs of the matmuls and convolutions of `decode` for one picture."""
  width, patches = c.decoder_trunk.width, c.grid**2
  # the class token and the latents go through the trunk with the patches
  total = vit.count_flops(c.decoder_trunk, 1 + patches + c.tokens)
  total += 2 * c.tokens * c.token_size * width
  if c.pixels is None:
    return total + 2 * patches * width * 3 * c.patch**2 + 2 * 81 * c.size**2
  codes, channels = c.pixels.num_embeddings, c.pixels.z_channels
  total += 4 * patches * width**2 + 4 * patches * width * codes + 2 * patches * codes * channels
  return total + maskgit_vq.count_decode_flops(c.pixels, c.grid)
