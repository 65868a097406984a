"""LAION's aesthetic predictors: how much people would like a picture, whatever the prompt says.

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
from vtts_jax.checkpoints import convert as conversion
from vtts_jax.checkpoints import source as source_files
from vtts_jax.components import build_dataclass
from vtts_jax.errors import ConfigError
from vtts_jax.models.clip import modeling
from vtts_jax.verifiers.parts import dual_encoder as dual
from vtts_jax.verifiers.parts.image_encoder import short_name

HEADS = {  # name of a layer in the file, width that it puts out
  'mlp': (('layers.0', 1024), ('layers.2', 128), ('layers.4', 64), ('layers.6', 16),
          ('layers.7', 1)),
  'linear': (('', 1),),
}  # fmt: skip
PUBLISHED = 'shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE'


@dataclasses.dataclass(frozen=True)
class Aesthetic(dual.Dual):
  """An aesthetic predictor; `Dual` has the other settings, of which no tokenizer is needed.

  Attributes:
    model_from: CLIP as in `Dual`: L/14 of OpenAI, for a linear head the one that it was made for.
    head: 'mlp' (improved) or 'linear' (first).
    head_from: safetensors with the head under its published names; '' where it is in `model_from`.
      The published .pth files are pickles, which are never loaded: models/clip/README.md.
  """

  model_from: str = PUBLISHED
  head: str = 'mlp'
  head_from: str = ''

  towers = 'image'

  def __post_init__(self):
    super().__post_init__()
    if self.head not in HEADS:
      allowed = ', '.join(map(repr, HEADS))
      raise ConfigError(f'verifier.head={self.head!r}: must be one of {allowed}')
    if self.head == 'linear' and not self.head_from and not self.random:
      raise ConfigError(
        "verifier.head_from='': must be sa_0_4_vit_l_14_linear.pth or another head of LAION's "
        'aesthetic-predictor as safetensors; models/clip/README.md says how to convert it'
      )

  @property
  def names(self):
    lead = 'aesthetic' if self.head == 'mlp' else 'aesthetic_linear'
    if self.random:
      return (self.published(lead),)
    sizes = {dataclasses.replace(c, text=None): name for name, c in modeling.RELEASED.items()}
    shape = dataclasses.replace(self.config, text=None, eos=None)
    return (f'{lead}_{sizes.get(shape) or short_name(self.model_from).lower()}',)

  def load(self):
    model = super().load()
    shapes = _shapes(self.head, self.config.projection)
    if self.random:
      return {'model': model, 'head': _random(shapes)}
    return {'model': model, 'head': read_head(self.head_from, self.head, shapes, self.model_from)}

  def read(self, source):
    kept = {k: v for k, v in source.header.items() if not k.startswith('layers.')}
    return super().read(dataclasses.replace(source, header=kept))

  def tokenize(self, prompts):
    return {}

  def encode(self, params, prompt):
    """Nothing: no text is read."""
    return {}

  def features(self, params, images):
    return super().features(params['model'], images)

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    x = self.features(params, images)
    for i in range(len(params['head'])):
      layer = params['head'][str(i)]
      x = jnp.matmul(x, layer['kernel'], precision='highest') + layer['bias']
    return {self.names[0]: x[..., 0]}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    widths = [self.config.projection, *(out for _, out in HEADS[self.head])]
    return super().cost(op) + core.Cost(flops=2 * sum(a * b for a, b in zip(widths, widths[1:])))


def _shapes(head, width):
  """Of the layers: {number: {'kernel', 'bias'}}, in float32."""
  widths = [width, *(out for _, out in HEADS[head])]
  shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.float32)
  return {
    str(i): {'kernel': shape(a, b), 'bias': shape(b)}
    for i, (a, b) in enumerate(zip(widths, widths[1:]))
  }


def read_head(place, head, shapes, whole=''):
  """The layers in the safetensors at `place`, or else in those of the `whole` model."""
  rules = []
  for i, (name, _) in enumerate(HEADS[head]):
    lead = f'{name}.'.replace('.', r'\.') if name else ''
    rules += [(lead + 'weight', f'{i}.kernel', 'T'), (lead + 'bias', f'{i}.bias', '')]
  if not place:
    rules.append((r'(vision_model|visual|text_model|text|logit_scale).*', None, ''))
  try:
    return conversion.convert(source_files.open_source(place or whole), rules, shapes)
  except (FileNotFoundError, ValueError) as error:
    raise ConfigError(f'verifier.head_from={place!r}: {error}') from error


def _random(shapes):
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  drawn = [jax.random.normal(k, x.shape) * x.shape[0] ** -0.5 for k, x in zip(keys, leaves)]
  return jax.tree.unflatten(structure, drawn)


def build(**given):
  return build_dataclass(Aesthetic, **given)
