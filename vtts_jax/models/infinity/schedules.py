"""Infinity's grids: which scales a picture of a given area and aspect has.

The numbers are those of the public code (`infinity/utils/dynamic_resolution.py`), in tokens of 16
pixels; a picture of fewer pixels stops at an earlier scale of the same list.
"""

import math
from typing import NamedTuple

from vtts_jax.errors import ConfigError

# height over width -> grids; a wide picture has those of the tall one, turned
TALL = {
  1.0: '1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64',
  1.25: '1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56',
  1.333: '1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54',
  1.5: '1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52',
  1.75: '1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48',
  2.0: '1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45',
  2.5: '1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40',
  3.0: '1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37',
}
AREAS = {'0.06M': 7, '0.25M': 10, '0.60M': 12, '1M': 13}  # pixels -> number of scales


class Schedule(NamedTuple):
  """The grids of a picture.

  Attributes:
    grids: (height, width) of every scale.
    frame: the grid on which positions are counted: that of the largest picture of this aspect, also
      where `grids` end before it.
  """

  grids: tuple[tuple[int, int], ...]
  frame: tuple[int, int]


def schedule_of(area: str, aspect: float = 1.0) -> Schedule:
  """Returns the released schedule of an area and of the aspect (height over width) next to it.

  Raises:
    ConfigError: an unknown area, or an aspect that is not positive.
  """
  if area not in AREAS:
    raise ConfigError(f'area={area!r}: must be one of {", ".join(AREAS)}')
  if not aspect > 0:
    raise ConfigError(f'aspect={aspect}: must be above 0')
  tall = max(aspect, 1 / aspect)
  # by the logarithm, so that a tall and a wide picture of one shape get the same grids
  nearest = min(TALL, key=lambda ratio: abs(math.log(ratio / tall)))
  grids = [tuple(map(int, grid.split('x'))) for grid in TALL[nearest].split()]
  grids = [grid if aspect >= 1 else grid[::-1] for grid in grids]
  return Schedule(tuple(grids[: AREAS[area]]), grids[-1])
