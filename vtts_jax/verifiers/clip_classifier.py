"""Zero-shot CLIP as the classifier of a class-conditional generator: how surely it sees the class.

Prompts are classes, by number or by name. A class is the mean of the unit embeddings of its name in
several templates, of length one again (Radford et al. 2021, section 3.1.4; open_clip's
zero_shot_classifier.py). The score, `clip_b16_class_logit` or `clip_b16_class_log_prob`, is the
class's logit or its log-probability among all classes, as in Ma et al. (2025), arXiv 2501.09732.
models/clip, models/siglip.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.components import build_dataclass
from vtts_jax.errors import ConfigError
from vtts_jax.models.clip.modeling import unit
from vtts_jax.verifiers.parts.dual_encoder import Dual

SCORES = ('logit', 'log_prob')
TEMPLATES = (  # the seven that OpenAI's notebook of ImageNet ends with
  'itap of a {}.', 'a bad photo of the {}.', 'a origami {}.', 'a photo of the large {}.',
  'a {} in a video game.', 'art of the {}.', 'a photo of the small {}.',
)  # fmt: skip
CHUNK = 64  # classes that go through the text tower at once


@dataclasses.dataclass(frozen=True)
class ClipClassifier(Dual):
  """CLIP or SigLIP; `Dual` has the other settings.

  Attributes:
    classes: text file with the name of a class on each line, in the order of their numbers; with
      random weights '' makes ten classes that are called by their numbers.
    templates: what is said of a class, with '{}' for its name.
    value: 'logit' or 'log_prob'.
  """

  model_from: str = 'openai/clip-vit-base-patch16'
  classes: str = ''
  templates: tuple[str, ...] = TEMPLATES
  value: str = 'logit'

  def __post_init__(self):
    super().__post_init__()
    if self.value not in SCORES:
      allowed = ', '.join(map(repr, SCORES))
      raise ConfigError(f'verifier.value={self.value!r}: must be one of {allowed}')
    odd = [t for t in self.templates if t.count('{}') != 1]
    if odd or not self.templates:
      raise ConfigError(
        f"verifier.templates={odd or self.templates!r}: must be texts with '{{}}' for the class"
      )
    if not self.classes and not self.random:
      raise ConfigError(
        "verifier.classes='': must be a text file with the name of a class on each line"
      )
    _ = self.known

  @property
  def names(self):
    return (f'{self.backbone}_class_{self.value}',)

  @property
  def known(self) -> tuple[str, ...]:
    """The names of the classes."""
    return _read(self.classes) if self.classes else tuple(map(str, range(10)))

  def load(self):
    """The model, and the unit embeddings of all classes `[C, E]`: the text tower runs here and
    never again."""
    model = super().load()
    embed = jax.jit(lambda ids: self.merge(model).embed_text(ids))
    names, rows = list(self.known), []
    for start in range(0, len(names), CHUNK):
      some = (names[start : start + CHUNK] * CHUNK)[: min(CHUNK, len(names))]  # of one shape
      ids = self.ids([t.format(name) for name in some for t in self.templates])
      each = embed(ids).reshape(len(some), len(self.templates), -1)
      rows.append(each.mean(1)[: len(names) - start])
    return {'model': model, 'classes': unit(jnp.concatenate(rows))}

  def tokenize(self, prompts):
    return {'label': np.array([self._label(text.strip()) for text in prompts], np.int32)}

  def _label(self, text):
    known = self.known
    if known.count(text) == 1:
      return known.index(text)
    if text not in known and text.isdecimal() and int(text) < len(known):
      return int(text)
    where = f' that stands once in {self.classes}' if self.classes else ''
    raise ConfigError(
      f'prompts: {text!r} is no class; must be a number in 0 .. {len(known) - 1} or a name{where}'
    )

  def encode(self, params, prompt):
    """Labels `[B]`, and the unit embeddings of their classes `[B, E]`."""
    label = prompt['label']
    return {'label': label, 'text': params['classes'][label]}

  def features(self, params, images):
    return super().features(params['model'], images)

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    shown = self.features(params, images)
    logits = self.merge(params['model']).logits
    own = logits(jnp.sum(shown * vctx['text'][:, None], -1))
    if self.value == 'log_prob':
      every = jnp.einsum('bme,ce->bmc', shown, params['classes'], precision='highest')
      own = own - jax.nn.logsumexp(logits(every), -1)
    return {self.names[0]: own}

  def cost(self, op):
    """No text is encoded for a prompt; `load` has done it."""
    if op == 'encode':
      return core.Cost()
    every = len(self.known) if self.value == 'log_prob' else 0
    return super().cost(op) + core.Cost(flops=2 * every * self.config.projection)


@functools.cache
def _read(path):
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8')
  except OSError as error:
    raise ConfigError(f'verifier.classes={path!r}: cannot be read ({error})') from error
  names = tuple(line.strip() for line in text.splitlines() if line.strip())
  if len(names) < 2:
    raise ConfigError(f'verifier.classes={path!r}: must name two classes or more')
  return names


def build(**given):
  return build_dataclass(ClipClassifier, **given)
