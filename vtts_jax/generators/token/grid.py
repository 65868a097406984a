"""The base of generators whose tokens are the cells of a picture's grid.

On top of `TokenGenerator` an author writes `decode_cells(params, tokens)`, and these cases share
the rest: a prefix decodes to a picture whose other cells hold token 0, as the published searches
show it; a prompt may be a class.

Letters: B prompts · N candidates · T tokens · R rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.data import classes
from vtts_jax.generators.token.base import TokenGenerator


@dataclasses.dataclass(frozen=True)
class GridGenerator(TokenGenerator):
  """See the head of the file.

  Attributes:
    class_names: a text file whose line i names class i; '' if prompts are class numbers. Models of
      texts do not use it.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'.
    guidance, temperature, top_k, top_p: see `TokenGenerator`.
  """

  class_names: str = ''
  dtype: str = 'float32'

  def decode_cells(self, params, tokens) -> jax.Array:
    """Tokens `[R, T]` row by row -> pictures `[R, H, W, 3]` in about 0..1."""
    raise NotImplementedError

  def arrange_cells(self, state, tokens) -> jax.Array:
    """Tokens `[B, N, T]` in the order of the stages -> row by row."""
    return tokens

  def tokenize_classes(self, prompts, count: int) -> dict[str, np.ndarray]:
    """{'labels': `[B]`}; raises `ConfigError` on a prompt that is none of `count` classes."""
    setting = 'generator.class_names'
    names = classes.read_class_names(self.class_names, setting) if self.class_names else ()
    return {'labels': classes.class_labels(prompts, count, 'generator', names)}

  def stream_labels(self, labels) -> jax.Array:
    """Labels `[B]` -> those of the streams of guidance `[B, C]`, -1 for the null class."""
    streams = {'prompt': labels, 'null': jnp.full_like(labels, -1)}
    return jnp.stack([streams[name] for name in self.guidance_streams], axis=1)

  def decode(self, params, ctx, state, stage):
    tokens = jnp.where(self._drawn_positions(stage), state.tokens, 0)
    tokens = self.arrange_cells(state, tokens)
    images = self.decode_cells(params, tokens.reshape(-1, tokens.shape[-1]))
    images = images.reshape(*tokens.shape[:2], *images.shape[1:])
    # saved as bytes by rounding, these are the pictures of the reference's FID script, which cuts
    # 127.5 x + 128 to integers
    return jnp.clip(images, 0, 1)
