"""VQAScore: how sure CLIP-FlanT5 is that the picture shows the prompt, in 0 .. 1.

The backbone is part of the score's name (`vqa_score_clip_flant5_xl`). As published the number is
exp of the mean log-probability of the answer's tokens, which are "Yes" and the end: the root of
P(Yes) P(end | Yes). Lin et al. (2024), arXiv 2404.01291; models/clip_flant5.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.checkpoints import source as source_files
from vtts_jax.components import build_dataclass
from vtts_jax.data import tokenizers as texts
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.clip_flant5 import convert, modeling
from vtts_jax.verifiers.parts.image_encoder import check_dtype, short_name

SIZES = {'tiny': modeling.TINY, **modeling.RELEASED}
QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
BEFORE = (  # the picture
  'A chat between a curious user and an artificial intelligence assistant. The assistant gives '
  "helpful, detailed, and polite answers to the user's questions. USER: "
)
AFTER = '\n{} ASSISTANT: '


@dataclasses.dataclass(frozen=True)
class VqaScore(core.Verifier):
  """CLIP-FlanT5 as the judge.

  Attributes:
    model_from: a safetensors file, a folder or a repository `owner/name@revision` of the hub. The
      published file is a pickle: models/clip_flant5/README.md has the two lines that save it anew.
    vision_from: another CLIP (`openai/clip-vit-large-patch14-336` is the published one) for a
      checkpoint without its tower; '' takes that inside.
    tokenizer_from: folder or repository with the tokenizer of T5.
    random: '' loads; 'tiny' or a released size makes random weights, which read no file and hash
      the words.
    dtype: of the weights, 'float32' or 'bfloat16', which the published numbers are made with.
    question: what is asked; '{}' is the prompt.
    answer: whose likelihood is the score.
    length: tokens of the question, padding among them; the published code pads to the longest
      (of up to 2048). Of a longer prompt the end is cut.
  """

  model_from: str = 'zhiqiulin/clip-flant5-xl'
  vision_from: str = ''
  tokenizer_from: str = 'google/flan-t5-xl'
  random: str = ''
  dtype: str = 'bfloat16'
  question: str = QUESTION
  answer: str = 'Yes'
  length: int = 256

  def __post_init__(self):
    if self.random and self.random not in SIZES:
      raise ConfigError(
        f"verifier.random={self.random!r}: must be '' or one of {', '.join(SIZES)}"
      )
    check_dtype(self.dtype)
    check_question(self.question)
    if not self.answer.strip():
      raise ConfigError(f'verifier.answer={self.answer!r}: must have words')
    if not 1 <= self.length <= 2048:
      raise ConfigError(f'verifier.length={self.length}: must be in 1 .. 2048')

  @property
  def names(self):
    return (f'vqa_score_{self.random or short_name(self.model_from)}',)

  @property
  def config(self) -> modeling.Config:
    """Sizes; of a checkpoint, its headers are read."""
    if self.random:
      return SIZES[self.random]
    return _config(self.model_from, self.vision_from)

  def load(self):
    if not self.random:
      return convert.load(*_sources(self.model_from, self.vision_from), self.dtype)[1]
    return modules.drawn(modeling.build, self.config, self.dtype)

  def tokenize(self, prompts):
    """Ids of what stands before the picture `[B, .]`, after it `[B, length]`, of the answer `[B,
    A]`."""
    template = AFTER.replace('{}', self.question)
    ids, mask = self._tokens(prompts, self.length, template)
    before, answer = (np.tile(row, (len(ids), 1)) for row in self._fixed)
    return {'before': before, 'after': ids, 'mask': mask, 'answer': answer}

  @property
  def _fixed(self):
    """Ids before the picture and of the answer, each with its end."""
    found = (self._tokens([text], 512, '{}') for text in (BEFORE, self.answer))
    return [ids[0][mask[0] > 0] for ids, mask in found]

  def _tokens(self, prompts, length, template):
    place = '' if self.random else self.tokenizer_from
    return texts.tokens(prompts, place, length, self.config.words, template)

  def encode(self, params, prompt):
    """The words' embeddings; all else depends on the picture."""
    embed = modules.model(modeling.build, self.config, params).encoder.embed
    words = {k: embed(prompt[k]) for k in ('before', 'after')}
    return {**words, 'mask': prompt['mask'], 'answer': prompt['answer']}

  def score(self, params, vctx, images, **signals):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    model = modules.model(modeling.build, self.config, params)
    b, m = images.shape[:2]
    pixels = modeling.preprocess(self.config, images.reshape(b * m, *images.shape[2:]))
    rows = {name: jnp.repeat(value, m, axis=0) for name, value in vctx.items()}
    found = model.likelihood(shown=model.look(pixels), **rows)
    return {self.names[0]: found.reshape(b, m)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    before, answer = map(len, self._fixed)
    return core.Cost(verify=1, flops=modeling.flops(self.config, before, self.length, answer))

  def check(self):
    _ = self.config


def check_question(question: str) -> None:
  """Raises `ConfigError` unless it has one place for the prompt."""
  if question.count('{}') != 1:
    raise ConfigError(f"verifier.question={question!r}: must have '{{}}' once, for the prompt")


def _sources(place, vision):
  return source_files.open_source(place), source_files.open_source(vision) if vision else None


@functools.cache
def _config(place, vision):
  return convert.config_of(convert.whole(*_sources(place, vision)))


def build(**given):
  return build_dataclass(VqaScore, **given)
