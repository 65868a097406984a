"""VQAScore: how sure CLIP-FlanT5 is that the picture shows the prompt, in 0 .. 1.

The backbone is part of the score's name (`vqa_score_clip_flant5_xl`). As published, the score is
exp of the mean log-probability of the answer's tokens, "Yes" and the end token. That is the square
root of P(Yes) P(end | Yes). Lin et al. (2024), arXiv 2404.01291; models/clip_flant5.

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
BEFORE = (  # the text before the picture
  'A chat between a curious user and an artificial intelligence assistant. The assistant gives '
  "helpful, detailed, and polite answers to the user's questions. USER: "
)
AFTER = '\n{} ASSISTANT: '
MAX_LENGTH = 2048  # of the published code


@dataclasses.dataclass(frozen=True)
class VqaScore(core.Verifier):
  """CLIP-FlanT5 answers whether the picture shows the prompt.

  Attributes:
    weights: as in `models.pretrained`. The published file is a pickle; models/clip_flant5/README.md
      has the two lines that convert it. If the checkpoint lacks its image tower, name it together
      with the CLIP that has it: 'LANGUAGE+VISION' (published: `openai/clip-vit-large-patch14-336`).
    tokenizer: folder or repository with T5's tokenizer; random weights hash the words instead.
    dtype: dtype of the weights, 'float32' or 'bfloat16'; the published numbers used bfloat16.
    question: the question; '{}' stands for the prompt.
    answer: the answer whose likelihood is the score.
    length: tokens that a question is padded to. The published code pads to the longest question
      (at most 2048). The end of a longer prompt is cut off.
  """

  weights: str = 'zhiqiulin/clip-flant5-xl'
  tokenizer: str = 'google/flan-t5-xl'
  dtype: str = 'bfloat16'
  question: str = QUESTION
  answer: str = 'Yes'
  length: int = 256

  gives = frozenset({'gradient'})

  def __post_init__(self):
    _ = self.model_part  # raises on unknown settings
    check_question(self.question)
    if not self.answer.strip():
      raise ConfigError(f'verifier.answer={self.answer!r}: must have words')
    if not 1 <= self.length <= MAX_LENGTH:
      raise ConfigError(f'verifier.length={self.length}: must be in 1 .. {MAX_LENGTH}')

  @property
  def model_part(self) -> Pretrained:
    """CLIP-FlanT5."""
    return Pretrained('clip_flant5', self.weights, self.dtype)

  @property
  def names(self):
    return (f'vqa_score_{self.model_part.name}',)

  def check(self):
    _ = self.model_part.config

  def load(self):
    return self.model_part.load()

  def shardings(self, mesh):
    return self.model_part.shardings(mesh)

  def tokenize(self, prompts):
    """Token ids of the text before the picture `[B, .]`, after it `[B, length]`, and of the answer
    `[B, A]`."""
    template = AFTER.replace('{}', self.question)
    ids, mask = self._token_ids(core.texts_of(prompts), self.length, template)
    # the same for every prompt, but arrays need the prompt axis
    before, answer = (np.tile(row, (len(ids), 1)) for row in self._fixed_ids())
    return {'before': before, 'after': ids, 'mask': mask, 'answer': answer}

  def _fixed_ids(self):
    """Ids of the text before the picture and of the answer, without padding."""
    found = (self._token_ids([text], 512, '{}') for text in (BEFORE, self.answer))
    return [ids[0][mask[0] > 0] for ids, mask in found]

  def _token_ids(self, texts, length, template):
    place = '' if self.model_part.is_random else self.tokenizer
    return tokenizers.tokenize_texts(texts, place, length, self.model_part.config.words, template)

  def encode(self, params, prompt):
    """Embeddings of the words; all other computation depends on the picture."""
    # T5 reads text and picture patches together, so its encoder cannot run per prompt
    embed = self.model_part.bind(params).encoder.embed
    words = {name: embed(prompt[name]) for name in ('before', 'after')}
    return {**words, 'mask': prompt['mask'], 'answer': prompt['answer']}

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    images, config = observed['image'], self.model_part.config
    model = self.model_part.bind(params)
    # one row of words for each candidate: T5 reads them together with its picture
    words = {name: jnp.repeat(value, images.shape[1], axis=0) for name, value in vctx.items()}

    def score_rows(rows):
      patches = model.embed_images(modeling.preprocess(config, rows))
      return model.answer_likelihood(image=patches, **words)

    return {self.names[0]: map_images(score_rows, images)}

  def cost(self, op):
    if op == 'encode':
      return core.Cost()
    before, answer = map(len, self._fixed_ids())
    flops = modeling.count_flops(self.model_part.config, before, self.length, answer)
    return core.Cost(verify=1, flops=flops)


def check_question(question: str) -> None:
  """Raises `ConfigError` unless the question contains '{}' exactly once."""
  # the template is filled by replacement: a second place would repeat the prompt
  if question.count('{}') != 1:
    raise ConfigError(f"verifier.question={question!r}: must have '{{}}' once, for the prompt")
