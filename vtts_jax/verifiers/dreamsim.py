"""Likeness to reference pictures as people see it: one minus the DreamSim distance.

Fu, Tamir et al. (2023, arXiv 2306.09344); models/dreamsim/README.md says what its files are. With
several references the mean over them. Letters: B prompts, M candidates, K references, H W image, E
width of an embedding.
"""

import dataclasses
import functools

import jax.numpy as jnp

from vtts_jax import components, core
from vtts_jax.data import references
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.dreamsim import convert, modeling
from vtts_jax.verifiers.parts import image_encoder as towers


@dataclasses.dataclass(frozen=True)
class DreamSim(core.Verifier):
  """Score `dreamsim_<model>`, a cosine, in [-1, 1].

  Attributes:
    references: a picture or a folder of pictures for every prompt, or a .jsonl of lines {"prompt":
      ..., "reference": picture, folder or list of these}.
    model: which released model `model_from` holds: 'ensemble', or the single 'dino_vitb16',
      'dinov2_vitb14', 'clip_vitb32', 'open_clip_vitb32'.
    model_from: folder of base weights and adapters, or one file with the adapters merged (see
      models/dreamsim/README.md; what is published are pickles, so nothing is downloaded).
    random: '' loads it; 'tiny' or one of the models by name is random weights of that size.
    dtype: of the parameters, 'float32' or 'bfloat16'.
  """

  references: str = ''
  model: str = 'ensemble'
  model_from: str = ''
  random: str = ''
  dtype: str = 'float32'

  def __post_init__(self):
    towers.check_dtype(self.dtype)
    if self.model not in modeling.MEMBERS:
      allowed = ', '.join(modeling.MEMBERS)
      raise ConfigError(f'verifier.model={self.model!r}: must be one of {allowed}')
    if self.random:
      modeling.released(self.random, 'verifier.random')

  @property
  def names(self):
    return (f'dreamsim_{self.random or self.model}',)

  @property
  def config(self):
    return _config(self.model, self.model_from, self.random)

  def check(self):
    if not self.random and not self.model_from:
      raise ConfigError(
        "verifier.model_from='': must be a folder or file of DreamSim's weights; "
        'models/dreamsim/README.md says how to make one'
      )
    references.index(self.references)

  def load(self):
    if self.random:
      return modules.drawn(modeling.build, self.config, self.dtype)
    branches = convert.open_branches(self.model_from, self.model)
    return convert.load(branches, self.config, dtype=self.dtype)[1]

  def tokenize(self, texts):
    return references.read(texts, self.references, modeling.SIDE)

  def encode(self, params, prompt):
    """Pictures `[B, K, S, S, 3]` -> the mean of their embeddings `[B, E]`."""
    model = modules.model(modeling.build, self.config, params)
    found = towers.flat(model, prompt['pictures'].astype(jnp.float32) / 255)
    return references.mean(found, prompt['mask'])

  def features(self, params, images):
    """Images `[B, M, H, W, 3]` -> unit embeddings `[B, M, E]`."""
    model = modules.model(modeling.build, self.config, params)
    return towers.flat(lambda x: model(modeling.prepare(x)), images)

  def score(self, params, vctx, images, **signals):
    found = self.features(params, images)
    return {self.names[0]: jnp.einsum('bme,be->bm', found, vctx)}

  def cost(self, op):
    flops = modeling.flops(self.config)
    if op == 'encode':
      return core.Cost(flops=references.most(self.references) * flops)
    return core.Cost(verify=1, flops=flops)


@functools.cache
def _config(model, place, random):
  if random:
    return modeling.released(random, 'verifier.random')
  return convert.config_of(convert.open_branches(place, model), model)


def build(**given):
  return components.build_dataclass(DreamSim, **given)
