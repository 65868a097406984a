"""LAION's aesthetic predictors: how much people like a picture; the prompt is not read.

A linear head on CLIP's unit embedding, trained on ratings of 1 .. 10. `aesthetic_l14` is the
improved predictor (sac+logos+ava1, five linear layers without activations between them),
`aesthetic_linear_l14` and `_b32` are the first ones (sa_0_4, one layer). Schuhmann (2022),
github.com/christophschuhmann/improved-aesthetic-predictor, github.com/LAION-AI/aesthetic-predictor;
models/clip.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.source import open_source
from vtts_jax.errors import ConfigError
from vtts_jax.models.clip import modeling
from vtts_jax.models.pretrained import short_name
from vtts_jax.verifiers.parts.dual_encoder import DualEncoder

HEADS = {  # each layer: its name in the file, its output width
  'mlp': (('layers.0', 1024), ('layers.2', 128), ('layers.4', 64), ('layers.6', 16),
          ('layers.7', 1)),
  'linear': (('', 1),),
}  # fmt: skip
PUBLISHED = 'shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE'


@dataclasses.dataclass(frozen=True)
class Aesthetic(DualEncoder):
  """An aesthetic predictor; `DualEncoder` has the other settings. The tokenizer is not used.

  Attributes:
    weights: a CLIP as in `DualEncoder`: OpenAI's L/14, or the CLIP that a linear head was trained
      on.
    head: 'mlp' (the improved predictor) or 'linear' (the first one).
    head_weights: safetensors with the head under its published names; '' if `weights` contains it.
      The published .pth files are pickles, which this package never loads: models/clip/README.md
      shows how to convert them.
  """

  weights: str = PUBLISHED
  head: str = 'mlp'
  head_weights: str = ''

  # the prompt is not read, so the text tower is neither loaded nor needed in the file
  part = 'image'

  def __post_init__(self):
    super().__post_init__()
    if self.head not in HEADS:
      allowed = ', '.join(map(repr, HEADS))
      raise ConfigError(f'verifier.head={self.head!r}: must be one of {allowed}')
    # no repository has the first heads as safetensors, so the user must name a file
    if self.head == 'linear' and not self.head_weights and not self._is_random:
      raise ConfigError(
        "verifier.head_weights='': must be sa_0_4_vit_l_14_linear.pth or another head of LAION's "
        'aesthetic-predictor as safetensors; models/clip/README.md says how to convert it'
      )

  @property
  def names(self):
    lead = 'aesthetic' if self.head == 'mlp' else 'aesthetic_linear'
    if self._is_random:
      return (self.published_name(lead),)
    # a checkpoint is named by its sizes, because the published one names its head, not its CLIP
    sizes = {dataclasses.replace(c, text=None): name for name, c in modeling.SIZES.items()}
    shape = dataclasses.replace(self.model_part.config, text=None, eos=None)
    return (f'{lead}_{sizes.get(shape) or short_name(self.weights).lower()}',)

  def load(self):
    model, shapes = super().load(), self._head_shapes()
    head = _draw_head(shapes) if self._is_random else self._read_head(shapes)
    return {'model': model, 'head': head}

  def shardings(self, mesh):
    return {'model': super().shardings(mesh), 'head': core.Verifier.shardings(self, mesh)}

  def tokenize(self, prompts):
    return {}

  def encode(self, params, prompt):
    """Returns {}: the prompt is not read."""
    return {}

  def embed_images(self, params, images):
    return super().embed_images(params['model'], images)

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    x = self.embed_images(params, observed['image'])
    for i in range(len(params['head'])):
      layer = params['head'][str(i)]
      # as published: the layers are linear, and small enough for full precision
      x = jnp.matmul(x, layer['kernel'], precision='highest') + layer['bias']
    return {self.names[0]: x[..., 0]}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    shapes = [layer['kernel'].shape for layer in self._head_shapes().values()]
    return super().cost(op) + core.Cost(flops=2 * sum(a * b for a, b in shapes))

  def _head_shapes(self):
    """Shapes of the head's layers: {number: {'kernel', 'bias'}}, float32."""
    widths = [self.model_part.config.projection, *(out for _, out in HEADS[self.head])]
    shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.float32)
    pairs = enumerate(zip(widths, widths[1:]))
    return {str(i): {'kernel': shape(a, b), 'bias': shape(b)} for i, (a, b) in pairs}

  def _read_head(self, shapes):
    """Reads the layers from `head_weights`, or from the file of the whole model."""
    rules = []
    for i, (name, _) in enumerate(HEADS[self.head]):
      lead = f'{name}.'.replace('.', r'\.') if name else ''
      rules += [(lead + 'weight', f'{i}.kernel', 'T'), (lead + 'bias', f'{i}.bias', '')]
    if not self.head_weights:
      # in the file of the whole model, the other tensors belong to CLIP
      rules.append((r'(vision_model|visual|text_model|text|logit_scale).*', None, ''))
    try:
      source = open_source(self.head_weights or self.weights)
      return convert_weights(source, rules, shapes)
    except (FileNotFoundError, ValueError) as error:
      raise ConfigError(f'verifier.head_weights={self.head_weights!r}: {error}') from error


def _draw_head(shapes):
  """Random layers from a fixed seed."""
  # scaled by the fan-in, so that five layers neither shrink nor enlarge the score
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  drawn = [jax.random.normal(k, x.shape) * x.shape[0] ** -0.5 for k, x in zip(keys, leaves)]
  return jax.tree.unflatten(structure, drawn)
