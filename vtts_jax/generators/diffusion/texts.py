"""How a text-to-image pipeline reads its prompts: text models with their tokenizers.

A pipeline of diffusers keeps text models in the folders `text_encoder`, `text_encoder_2` .. and
their tokenizers in `tokenizer`, `tokenizer_2` .. A `TextModel` stands for one such pair.
`PromptedGenerator` is a `SizedLatentGenerator` with some of them: its author lists them in
`text_models` and reads the ids `[B, C, W]` that `tokenize` gives for each.

Letters: B prompts, C streams, W tokens that a text model reads.
"""

import dataclasses
import os
import re

import numpy as np

from vtts_jax import core
from vtts_jax.checkpoints.source import name_pipeline_part
from vtts_jax.data import tokenizers
from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion.latents import SizedLatentGenerator
from vtts_jax.models.pretrained import Pretrained


@dataclasses.dataclass(frozen=True)
class TextModel:
  """A text model and how long its texts are.

  Attributes:
    model: the network; random weights have no tokenizer, and their words are hashed.
    length: W.
    vocab: the size of its vocabulary.
    setting: the user's setting that says W, for errors.
    place: folder or repository of the tokenizer; '' for one beside the weights.
  """

  model: Pretrained
  length: int
  vocab: int
  setting: str = 'the length'
  place: str = ''

  @property
  def tokenizer(self) -> str:
    """Folder or repository of the tokenizer, '' for random weights: `place`, the pipeline's folder
    of the same number, or else the place of the weights."""
    place, at, revision = self.model.weights, '', ''
    if self.model.is_random or self.place:
      return self.place
    # a local path may hold an '@'
    if not os.path.exists(place):
      place, at, revision = place.partition('@')
    place = place.rstrip('/')
    if place.endswith('.safetensors'):
      place = os.path.dirname(place)
    place = re.sub(r'(^|/)text_encoder(_\d)?$', r'\1tokenizer\2', place)
    return f'{place}{at}{revision}'

  def tokenize(self, texts) -> np.ndarray:
    """Ids `[B, W]` int32 of B texts, cut and padded as diffusers does; masks are not read."""
    ids, _ = tokenizers.tokenize_texts(
      texts, self.tokenizer, self.length, self.vocab, allow_empty=True, setting=self.setting
    )
    return ids


@dataclasses.dataclass(frozen=True)
class PromptedGenerator(SizedLatentGenerator):
  """See the head of the file."""

  def text_models(self) -> dict[str, TextModel]:
    """The text models by the names that they have among `model_parts`."""
    raise NotImplementedError

  def pipeline_text(self, family: str, setting: str, number: str = '') -> Pretrained:
    """The text model that the setting names, or `text_encoder<number>` of the pipeline."""
    weights = getattr(self, setting) or name_pipeline_part(self.weights, f'text_encoder{number}')
    # a search reads no pictures
    part = 'text' if family == 'clip' else ''
    return Pretrained(family, weights, self.dtype, part, f'generator.{setting}')

  def tokenize(self, prompts):
    """{name of a text model: ids `[B, C, W]`}; raises `ConfigError` on a prompt without a text."""
    texts = core.texts_of(prompts)
    empty = [place for place, text in enumerate(texts) if not text.strip()]
    if empty:
      raise ConfigError(f'prompts: prompt {empty[0]} is empty; a text generator must have words')
    # guidance compares with the empty text
    by_stream = {'prompt': texts, 'null': [''] * len(texts)}
    return {
      name: np.stack([text.tokenize(by_stream[s]) for s in self.guidance_streams], axis=1)
      for name, text in self.text_models().items()
    }
