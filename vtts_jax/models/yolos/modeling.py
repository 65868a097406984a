"""YOLOS: a plain ViT that finds COCO's objects with a hundred extra tokens.

Fang et al. 2021 (arXiv 2106.00666). Class token, patches and detection tokens go through one
pre-norm trunk. Each detection token then predicts a class, or none, and a box. Positions are
learned on a wide grid and resized to the picture's grid; the larger models add such positions after
every block too. Checked against transformers (`YolosForObjectDetection`; tests/parity).

Letters: R images · P patch side · N patches · K detection tokens · T = 1 + N + K · D width ·
L layers · C classes in COCO's numbering (0 .. 90), then no object.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.errors import ConfigError
from vtts_jax.media.preprocess import normalize_channels, resize_images
from vtts_jax.models import vit
from vtts_jax.models.stacked import scan_blocks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LONGEST = 1333  # the longer side has at most so many pixels


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes.

  Attributes:
    trunk: the ViT's blocks.
    size: (height, width) in pixels of the grid on which positions were learned.
    shortest: the released processor resizes the shorter side to so many pixels.
    middle: whether every block but the last is followed by positions of its own.
    patch: P.
    tokens: K.
    classes: C, with no object.

  Raises:
    ConfigError: a size smaller than a patch.
  """

  trunk: vit.Config
  size: tuple[int, int]
  shortest: int = 800
  middle: bool = True
  patch: int = 16
  tokens: int = 100
  classes: int = 92

  def __post_init__(self):
    if min(self.size) < self.patch or self.shortest < self.patch:
      raise ConfigError(
        f'size={self.size}, shortest={self.shortest}: must be at least a patch of {self.patch}'
      )

  @property
  def grid(self):
    """(rows, columns) of patches on which positions were learned."""
    return self.size[0] // self.patch, self.size[1] // self.patch


def _make_trunk(width, heads):
  return vit.Config(width, layers=12, heads=heads, hidden=4 * width, eps=1e-12)


_TINY = vit.Config(width=16, layers=2, heads=2, hidden=24)
SIZES = {
  'tiny': Config(_TINY, size=(32, 48), shortest=32, tokens=20),
  # hustvl/yolos-tiny, -small, -base
  'yolos_tiny': Config(_make_trunk(192, heads=3), size=(800, 1333), shortest=512, middle=False),
  'yolos_small': Config(_make_trunk(384, heads=6), size=(512, 864)),
  'yolos_base': Config(_make_trunk(768, heads=12), size=(800, 1344)),
}


class Head(nnx.Module):
  """Three layers with ReLU between them, `[..., D]` -> `[..., out]`."""

  def __init__(self, width, out, *, rngs):
    self.first, self.second = (nnx.Linear(width, width, rngs=rngs) for _ in range(2))
    self.last = nnx.Linear(width, out, rngs=rngs)

  def __call__(self, x):
    return self.last(jax.nn.relu(self.second(jax.nn.relu(self.first(x)))))


class Yolos(nnx.Module):
  """`__call__(images [R, H, W, 3])` of `preprocess` -> logits `[R, K, C]`, boxes `[R, K, 4]`.

  Boxes are centre x, y, width, height as shares of the picture; both are float32.
  """

  def __init__(self, config: Config, *, rngs):
    c = self.config = config
    width, places = c.trunk.width, 1 + c.grid[0] * c.grid[1] + c.tokens
    table = functools.partial(vit.random_table, rngs)
    self.embed = nnx.Linear(3 * c.patch**2, width, rngs=rngs)
    self.token, self.detectors = table(1, width), table(c.tokens, width)
    self.position = table(places, width)
    self.middle = table(c.trunk.layers - 1, places, width) if c.middle else None
    self.trunk = vit.Trunk(c.trunk, rngs=rngs)
    self.norm = vit.LayerNorm(width, c.trunk.eps)
    self.classes = Head(width, c.classes, rngs=rngs)
    self.box = Head(width, 4, rngs=rngs)

  def embed_patches(self, images):
    """Images `[R, H, W, 3]` -> the first block's input `[R, T, D]`."""
    x = self.embed(vit.split_patches(images, self.config.patch).astype(self.embed.kernel.dtype))
    first, last = (
      jnp.broadcast_to(y[...], (len(x), *y.shape)) for y in (self.token, self.detectors)
    )
    x = jnp.concatenate([first, x, last], 1)
    return x + self.resize_positions(self.position[...], images.shape[1:3])

  def resize_positions(self, learned, size):
    """Positions `[..., 1 + learned patches + K, D]` -> `[..., T, D]` for a picture of `size`."""
    # only the patches lie on a grid; class and detection tokens keep their positions
    patch, (rows, columns) = self.config.patch, self.config.grid
    first, last = learned[..., :1, :], learned[..., -self.config.tokens :, :]
    grid = learned[..., 1 : -self.config.tokens, :]
    grid = grid.reshape(*grid.shape[:-2], rows, columns, grid.shape[-1])
    down, across = (bicubic_matrix(old, new // patch) for old, new in zip((rows, columns), size))
    grid = jnp.einsum('...rcd,rx,cy->...xyd', grid, down, across)
    grid = grid.reshape(*grid.shape[:-3], -1, grid.shape[-1]).astype(learned.dtype)
    return jnp.concatenate([first, grid, last], -2)

  def hidden_states(self, images, every=False):
    """Returns the last block's output `[R, T, D]`, and with `every` all outputs `[L, R, T, D]`."""
    x, added = self.embed_patches(images), None
    if self.middle is not None:
      added = self.resize_positions(self.middle[...], images.shape[1:3])
      # zeros after the last block, so that all blocks are scanned alike
      added = jnp.pad(added, ((0, 1), (0, 0), (0, 0)))

    def run_block(block, x, extra):
      y = block(x)
      return y if extra is None else y + extra, y if every else None

    return scan_blocks(self.trunk.blocks, run_block, x, added)

  def __call__(self, images):
    # only detection tokens are read
    x = self.norm(self.hidden_states(images)[0][:, -self.config.tokens :])
    # float32, so that a bfloat16 box is not a pixel off
    boxes = jax.nn.sigmoid(self.box(x).astype(jnp.float32))
    return self.classes(x).astype(jnp.float32), boxes


def bicubic_matrix(old: int, new: int) -> np.ndarray:
  """Returns the matrix `[old, new]` of torch's bicubic `interpolate`.

  It has a = -0.75 and no antialiasing; the edges are repeated.
  """
  table, a = np.zeros((old, new)), -0.75
  for i in range(new):
    # pixels lie in the middle of their cells (align_corners=False)
    at = (i + 0.5) * old / new - 0.5
    for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
      x = abs(at - tap)
      near = ((a + 2) * x - (a + 3)) * x * x + 1
      weight = near if x <= 1 else ((x - 5) * x + 8) * x * a - 4 * a
      table[min(max(tap, 0), old - 1), i] += weight
  return table.astype(np.float32)


# ---------------------------------------------------------------------------------- preprocessing


def resized_sides(c: Config, height: int, width: int) -> tuple[int, int]:
  """Returns the (height, width) that a picture is resized to.

  The shorter side becomes `shortest`, or less if the longer side would exceed 1333. Both are cut to
  whole patches.
  """
  # the order of divisions and roundings is the processor's: any other gives a patch more or less
  short, long = min(height, width), max(height, width)
  limit = float(LONGEST * short) / long if long / short * c.shortest > LONGEST else None
  size = c.shortest if limit is None else round(limit)
  longer = int((size if limit is None else limit) * long / short)
  new = (size, longer) if height <= width else (longer, size)
  # the processor leaves such a picture as it is
  if height <= width and height == size:
    new = height, width
  return new[0] - new[0] % c.patch, new[1] - new[1] % c.patch


def preprocess(c: Config, images):
  """Pictures `[R, H, W, 3]` in [0, 1] -> pictures resized (8 bit, bilinear) and normalised.

  They are not padded: their size depends on their proportions.
  """
  x = resize_images(images, resized_sides(c, *images.shape[1:3]), 'bilinear')
  return normalize_channels(x, MEAN, STD)


def count_flops(c: Config, height: int, width: int) -> int:
  """Matmul FLOPs for one picture of that size before `preprocess`, without resizing positions."""
  # the number of patches follows from the resized picture, not from the one given
  rows, columns = (n // c.patch for n in resized_sides(c, height, width))
  d, places = c.trunk.width, rows * columns
  heads = c.tokens * (4 * d * d + d * (4 + c.classes))
  return vit.count_flops(c.trunk, 1 + places + c.tokens) + 2 * (places * 3 * c.patch**2 * d + heads)


def build_model(config: Config, seed=0) -> Yolos:
  """Builds a random detector; inside `modules.abstract_module` it uses no memory."""
  return Yolos(config, rngs=nnx.Rngs(seed))
