"""DINO and DINOv2: image encoders that turn pictures into a class token and patch tokens.

DINO is of Caron et al. (2021, arXiv 2104.14294), DINOv2 of Oquab et al. (2023, 2304.07193), its
registers of Darcet et al. (2023, 2309.16588). All are one vision transformer: patches, a class
token, learned positions resized to the grid at hand, then the registers, pre-norm blocks (DINOv2
has layer scale, the giant SwiGLU) and a final norm. The linear ImageNet head reads the class token
and the mean of the patches. Checked against `transformers` (`ViTModel`, `Dinov2Model`,
`Dinov2WithRegistersModel` and their classifiers) and, for the positions of the original code,
against `torch.nn.functional.interpolate` (tests/parity).

Letters: R pictures · H W their sides · P side of a patch · G side of the grid of positions ·
N patches · T tokens, the class first, then registers, then patches · D width · C classes.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.media.preprocess import Preprocessing, normalize_channels
from vtts_jax.models import vit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Both published evaluations (facebookresearch/dino, facebookresearch/dinov2) are torchvision's:
# the shorter side to 256 by the bicubic filter, then the middle 224. The files beside the copies of
# transformers say otherwise (DINO's squash to 224 bilinearly) and are not what was published.
SIDE, PREPROCESSING = 224, Preprocessing(MEAN, STD, size=256)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and options.

  Attributes:
    hidden: inner width of the feed-forward layer; with SwiGLU that of each half.
    patch: P.
    grid: G.
    act, eps, layer_scale: options of the blocks (`vit.Config`).
    registers: number of registers.
    antialias: whether positions are resized with antialiasing (in the models with registers).
    offset: added to the size of the grid before positions are resized. The original code adds 0.1,
      an old guard against rounding that shifts positions a little; transformers adds nothing.
    embed_norm: whether a norm follows the positions, as in CLIP's tower.
    project: width of a projection of the class token, as in CLIP's tower; 0 for none.
    classes: C of the linear head; 0 for none.
  """

  width: int = 768
  layers: int = 12
  heads: int = 12
  hidden: int = 3072
  patch: int = 16
  grid: int = 14
  act: str = 'gelu'
  eps: float = 1e-6
  layer_scale: bool = False
  registers: int = 0
  antialias: bool = False
  offset: float = 0.0
  embed_norm: bool = False
  project: int = 0
  classes: int = 0

  def __post_init__(self):
    _ = self.trunk  # `vit.Config` refuses what the blocks do not know

  @property
  def trunk(self) -> vit.Config:
    return vit.Config(
      self.width, self.layers, self.heads, self.hidden, self.act, self.eps, self.layer_scale
    )


def _small_config(**options):
  return Config(width=384, layers=12, heads=6, hidden=1536, **options)


def _released_sizes():
  """Returns the released models by their names on the hub under facebook/, with _ for -."""
  second = {'patch': 14, 'grid': 37, 'layer_scale': True}
  second = {
    'small': _small_config(**second),
    'base': Config(width=768, layers=12, heads=12, hidden=3072, **second),
    'large': Config(width=1024, layers=24, heads=16, hidden=4096, **second),
    'giant': Config(width=1536, layers=40, heads=24, hidden=4096, act='swiglu', **second),
  }
  # each size also comes with registers, and each of those with a linear head
  found = {f'dinov2_{size}': c for size, c in second.items()} | {
    f'dinov2_with_registers_{size}': dataclasses.replace(c, registers=4, antialias=True)
    for size, c in second.items()
  }
  found |= {
    f'{name}_imagenet1k_1_layer': dataclasses.replace(c, classes=1000) for name, c in found.items()
  }
  return {
    'dino_vits16': _small_config(patch=16, grid=14, eps=1e-12),
    'dino_vits8': _small_config(patch=8, grid=28, eps=1e-12),
    'dino_vitb16': Config(patch=16, grid=14, eps=1e-12),
    'dino_vitb8': Config(patch=8, grid=28, eps=1e-12),
    **found,
  }


SIZES = {
  'tiny': Config(width=16, layers=2, heads=2, hidden=32, patch=32, grid=5, classes=10),
  **_released_sizes(),
}
PARTS = ('encoder',)


def part_of(c: Config, part: str) -> Config:
  """Returns the config of the encoder alone, without the linear head."""
  del part
  return dataclasses.replace(c, classes=0)


# ------------------------------------------------------------------------------------ the positions


def _cubic_kernel(x, a):
  x = abs(x)
  if x < 1:
    return ((a + 2) * x - (a + 3)) * x * x + 1
  return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


@functools.cache
def resize_matrix(old: int, new: int, offset: float = 0.0, antialias: bool = False) -> np.ndarray:
  """Returns the matrix `[old, new]` by which torch's bicubic `interpolate` resizes one axis.

  Without antialiasing the cubic has a = -0.75, and the border value continues past the border. With
  antialiasing it has a = -0.5, the filter widens where the axis shrinks, and nothing past the
  border counts.
  """
  # the offset changes the scale, not the number of positions
  scale, table = old / (new + offset), np.zeros((old, new))
  stretch = max(scale, 1.0) if antialias else 1.0
  for i in range(new):
    centre = (i + 0.5) * scale - 0.5
    for j in range(math.ceil(centre - 2 * stretch), math.floor(centre + 2 * stretch) + 1):
      weight = _cubic_kernel((j - centre) / stretch, -0.5 if antialias else -0.75)
      if not antialias or 0 <= j < old:
        table[min(max(j, 0), old - 1), i] += weight
  return (table / table.sum(0)).astype(np.float32)


# ---------------------------------------------------------------------------------------- the model


class Dino(nnx.Module):
  """`__call__(images [R, H, W, 3])`, normalised -> tokens `[R, T, D]` after the last norm."""

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    table = functools.partial(vit.random_table, rngs)
    self.patch = nnx.Linear(3 * c.patch**2, c.width, rngs=rngs)
    # the released checkpoints keep a leading axis of one for the batch
    self.cls, self.positions = table(1, 1, c.width), table(1, 1 + c.grid**2, c.width)
    self.registers = table(1, c.registers, c.width) if c.registers else None
    self.embed_norm = vit.LayerNorm(c.width, c.eps) if c.embed_norm else None
    self.trunk = vit.Trunk(c.trunk, rngs=rngs)
    self.norm = vit.LayerNorm(c.width, c.eps)
    self.project = table(c.width, c.project) if c.project else None
    self.head = nnx.Linear(2 * c.width, c.classes, rngs=rngs) if c.classes else None

  def __call__(self, images):
    return self.norm(self.trunk(self.embed_patches(images)))

  def embed_patches(self, images):
    """Images `[R, H, W, 3]` -> the first block's input `[R, T, D]`."""
    c = self.config
    rows, columns = images.shape[1] // c.patch, images.shape[2] // c.patch
    x = self.patch(vit.split_patches(images.astype(self.cls.dtype), c.patch))
    cls = jnp.broadcast_to(self.cls[...], (len(x), 1, c.width))
    x = jnp.concatenate([cls, x], 1) + self.resized_positions(rows, columns).astype(x.dtype)
    if self.embed_norm is not None:
      x = self.embed_norm(x)
    if self.registers is None:
      return x
    # registers come after the positions are added: they have none
    registers = jnp.broadcast_to(self.registers[...], (len(x), c.registers, c.width))
    return jnp.concatenate([x[:, :1], registers, x[:, 1:]], 1)

  def resized_positions(self, rows, columns):
    """Returns the positions `[1, 1 + rows columns, D]` float32 of a grid."""
    # float32 even in a bfloat16 model, as the reference
    c, known = self.config, self.positions[...].astype(jnp.float32)
    # resizing to the same grid is not the identity where the original code adds its offset, but it
    # skips this case too
    if rows == columns == c.grid:
      return known
    table = known[:, 1:].reshape(c.grid, c.grid, c.width)
    by = [resize_matrix(c.grid, new, c.offset, c.antialias) for new in (rows, columns)]
    table = jnp.einsum('ghd,gr,hc->rcd', table, *by)
    return jnp.concatenate([known[:, :1], table.reshape(1, -1, c.width)], 1)

  def image_features(self, images):
    """Images -> the class token, float32 `[R, D]` or as wide as `project`."""
    # norm and projection act on each token alone, so only the class token goes through them
    x = self.norm(self.trunk(self.embed_patches(images))[:, 0])
    return (x if self.project is None else x @ self.project[...]).astype(jnp.float32)

  def embed_images(self, images):
    """Images -> unit vectors `[R, D]` float32: `image_features` scaled to length 1."""
    x = self.image_features(images)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

  def class_logits(self, images):
    """Images -> logits of the linear head, `[R, C]` float32."""
    x = self(images)
    # the mean over patches is summed in float32: bfloat16 sums of 256 lose their last digits
    patches = x[:, 1 + self.config.registers :].astype(jnp.float32).mean(1).astype(x.dtype)
    return self.head(jnp.concatenate([x[:, 0], patches], -1)).astype(jnp.float32)


def build_model(config: Config, seed=0) -> Dino:
  """Builds a random encoder; inside `modules.abstract_module` it uses no memory."""
  return Dino(config, rngs=nnx.Rngs(seed))


def fitting_of(c: Config) -> tuple[Preprocessing, int]:
  """Returns how pictures are resized and cut, and the side of the square that is left."""
  del c
  return PREPROCESSING, SIDE


def preprocess(c: Config, images, fitted: bool = False):
  """Pictures `[..., H, W, 3]` in [0, 1] -> `[..., 224, 224, 3]`, as both published evaluations.

  PIL's bicubic resizes the shorter side to 256, torchvision's centre crop takes the middle 224, and
  channels are normalised, for models of every size. Pictures that are `fitted` are 224 x 224
  already.
  """
  del c
  if not fitted:
    images = PREPROCESSING.fit_images(images, SIDE)
  return normalize_channels(images, MEAN, STD)


def count_flops(c: Config, op: str = 'image', side: int = SIDE) -> int:
  """Matmul FLOPs of the encoder, with projection or head, for one picture of side `side`."""
  del op  # the only one is 'image'
  patches = (side // c.patch) ** 2
  # the head reads the class token and the mean of the patches: 2 D wide
  own = 2 * patches * 3 * c.patch**2 * c.width + 2 * c.width * c.project
  return own + vit.count_flops(c.trunk, 1 + c.registers + patches) + 4 * c.width * c.classes
