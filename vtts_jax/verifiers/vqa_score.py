"""VQAScore: how sure CLIP-FlanT5 is that the picture shows the prompt, in 0 .. 1.

The backbone is part of the score's name (`vqa_score_clip_flant5_xl`). As published the number is
exp of the mean log-probability of the answer's tokens, which are "Yes" and the end: the root of
P(Yes) P(end | Yes). Lin et al. (2024), arXiv 2404.01291; models/clip_flant5.

Letters: B prompts · M candidates · H W sides of an image · A tokens of the answer.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.data import tokenizers
from vtts_jax.errors import ConfigError
from vtts_jax.models.clip_flant5 import modeling
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.verifiers.parts.image_encoder import map_images

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
BEFORE = (  # the picture
  'A chat between a curious user and an artificial intelligence assistant. The assistant gives '
  "helpful, detailed, and polite answers to the user's questions. USER: "
)
AFTER = '\n{} ASSISTANT: '
MAX_LENGTH = 2048  # of the published code


@dataclasses.dataclass(frozen=True)
class VqaScore(core.Verifier):
  """CLIP-FlanT5 answers whether the picture shows the prompt.

  Attributes:
    weights: as in `models.pretrained`. The published file is a pickle: models/clip_flant5/README.md
      has the two lines that save it anew. A checkpoint without its image tower is named together
      with the CLIP that has it, 'LANGUAGE+VISION' (`openai/clip-vit-large-patch14-336` is the
      published one).
    tokenizer: folder or repository with the tokenizer of T5; random weights hash the words.
    dtype: of the weights, 'float32' or 'bfloat16', which the published numbers are made with.
    question: what is asked; '{}' is the prompt.
    answer: whose likelihood is the score.
    length: tokens of the question, padding among them; the published code pads to the longest
      (of up to 2048). Of a longer prompt the end is cut.
  """

  weights: str = 'zhiqiulin/clip-flant5-xl'
  tokenizer: str = 'google/flan-t5-xl'
  dtype: str = 'bfloat16'
  question: str = QUESTION
  answer: str = 'Yes'
  length: int = 256

  gives = frozenset({'gradient'})

  def __post_init__(self):
    _ = self.clip_flant5  # refuses what is unknown
    check_question(self.question)
    if not self.answer.strip():
      raise ConfigError(f'verifier.answer={self.answer!r}: must have words')
    if not 1 <= self.length <= MAX_LENGTH:
      raise ConfigError(f'verifier.length={self.length}: must be in 1 .. {MAX_LENGTH}')

  @property
  def clip_flant5(self) -> Pretrained:
    """The model."""
    return Pretrained('clip_flant5', self.weights, self.dtype)

  @property
  def names(self):
    return (f'vqa_score_{self.clip_flant5.name}',)

  def check(self):
    _ = self.clip_flant5.config

  def load(self):
    return self.clip_flant5.load()

  def shardings(self, mesh):
    return self.clip_flant5.shardings(mesh)

  def tokenize(self, prompts):
    """Ids of what stands before the picture `[B, .]`, after it `[B, length]`, of the answer `[B,
    A]`."""
    template = AFTER.replace('{}', self.question)
    ids, mask = self._token_ids(core.texts_of(prompts), self.length, template)
    before, answer = (np.tile(row, (len(ids), 1)) for row in self._fixed_ids())
    return {'before': before, 'after': ids, 'mask': mask, 'answer': answer}

  def _fixed_ids(self):
    """Ids before the picture and of the answer, each with its end."""
    found = (self._token_ids([text], 512, '{}') for text in (BEFORE, self.answer))
    return [ids[0][mask[0] > 0] for ids, mask in found]

  def _token_ids(self, texts, length, template):
    place = '' if self.clip_flant5.is_random else self.tokenizer
    return tokenizers.tokenize_texts(texts, place, length, self.clip_flant5.config.words, template)

  def encode(self, params, prompt):
    """The words' embeddings; all else depends on the picture."""
    embed = self.clip_flant5.bind(params).encoder.embed
    words = {name: embed(prompt[name]) for name in ('before', 'after')}
    return {**words, 'mask': prompt['mask'], 'answer': prompt['answer']}

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    images, config = observed['image'], self.clip_flant5.config
    model = self.clip_flant5.bind(params)
    words = {name: jnp.repeat(value, images.shape[1], axis=0) for name, value in vctx.items()}

    def likelihood(rows):
      patches = model.embed_images(modeling.preprocess(config, rows))
      return model.likelihood(image=patches, **words)

    return {self.names[0]: map_images(likelihood, images)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    before, answer = map(len, self._fixed_ids())
    flops = modeling.flops(self.clip_flant5.config, before, self.length, answer)
    return core.Cost(verify=1, flops=flops)


def check_question(question: str) -> None:
  """Raises `ConfigError` unless it has one place for the prompt."""
  if question.count('{}') != 1:
    raise ConfigError(f"verifier.question={question!r}: must have '{{}}' once, for the prompt")
