"""Zero-shot CLIP as a classifier: how surely it sees the class that a prompt asks for.

Prompts have a label, or their text is a class number or name. A class is represented by the mean of
the unit embeddings of its name in several templates, normalised again (Radford et al. 2021, section
3.1.4; open_clip's zero_shot_classifier.py). The score, `clip_b16_class_logit` or
`clip_b16_class_log_prob`, is the class's logit or its log-probability among all classes, as in Ma
et al. (2025), arXiv 2501.09732. Texts are cleaned and pictures cut as in open_clip and in OpenAI's
code (torchvision's centre crop), or as the checkpoint's own files say. models/clip, models/siglip.

Letters: B prompts · M pictures of a prompt · H W their sides · C classes · E width of the joint
space.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vtts_jax import core
from vtts_jax.data import classes
from vtts_jax.errors import ConfigError
from vtts_jax.models.clip.modeling import unit_vectors
from vtts_jax.verifiers.parts.dual_encoder import DualEncoder

OUTPUTS = ('logit', 'log_prob')
TEMPLATES = (  # the seven that OpenAI's ImageNet notebook selects at its end
  'itap of a {}.', 'a bad photo of the {}.', 'a origami {}.', 'a photo of the large {}.',
  'a {} in a video game.', 'art of the {}.', 'a photo of the small {}.',
)  # fmt: skip
CHUNK = 64  # classes of one call of the text tower


@dataclasses.dataclass(frozen=True)
class ClipClassifier(DualEncoder):
  """CLIP or SigLIP; `DualEncoder` has the other settings.

  Attributes:
    class_names: text file with one class name per line, in the order of the class numbers. With
      random weights '' stands for ten classes named '0' to '9'.
    templates: sentences about a class, with '{}' for its name.
    output: 'logit' or 'log_prob'.
  """

  weights: str = 'openai/clip-vit-base-patch16'
  class_names: str = ''
  templates: tuple[str, ...] = TEMPLATES
  output: str = 'logit'

  def __post_init__(self):
    super().__post_init__()
    if self.output not in OUTPUTS:
      allowed = ', '.join(map(repr, OUTPUTS))
      raise ConfigError(f'verifier.output={self.output!r}: must be one of {allowed}')
    # a template without '{}' would say the same of every class
    odd = [t for t in self.templates if t.count('{}') != 1]
    if odd or not self.templates:
      raise ConfigError(
        f"verifier.templates={odd or self.templates!r}: must be texts with '{{}}' for the class"
      )
    if not self.class_names and not self._is_random:
      raise ConfigError(
        "verifier.class_names='': must be a text file with the name of a class on each line"
      )

  @property
  def names(self):
    return (f'{self.backbone_name}_class_{self.output}',)

  @property
  def known_classes(self) -> tuple[str, ...]:
    """The names of all classes."""
    if not self.class_names:
      return tuple(map(str, range(10)))
    return classes.read_class_names(self.class_names, 'verifier.class_names')

  def check(self):
    super().check()
    _ = self.known_classes  # raises if the file cannot be read

  def load(self):
    """The model, and the unit embeddings `[C, E]` of all classes. Only this method runs the text
    tower."""
    model = super().load()
    embed_texts = jax.jit(lambda ids: self.model_part.bind(model).embed_texts(ids))
    names, rows = list(self.known_classes), []
    for start in range(0, len(names), CHUNK):
      # repeat names to fill the last chunk, so that one compiled program serves all chunks
      some = (names[start : start + CHUNK] * CHUNK)[: min(CHUNK, len(names))]
      ids = self.token_ids([t.format(name) for name in some for t in self.templates])
      each = embed_texts(ids).reshape(len(some), len(self.templates), -1)
      rows.append(each.mean(1)[: len(names) - start])
    return {'model': model, 'classes': unit_vectors(jnp.concatenate(rows))}

  def shardings(self, mesh):
    # the table of classes is small and read by every device: replicate it
    return {'model': super().shardings(mesh), 'classes': core.Verifier.shardings(self, mesh)}

  def tokenize(self, prompts):
    """Class numbers `{'label': [B]}`; raises the errors of `class_labels`."""
    names = self.known_classes
    return {'label': classes.class_labels(prompts, len(names), 'verifier.class_names', names)}

  def encode(self, params, prompt):
    """Unit embeddings `[B, E]` of the prompts' classes."""
    return params['classes'][prompt['label']]

  def embed_images(self, params, images):
    return super().embed_images(params['model'], images)

  def score(self, params, vctx, observed):
    """Images `[B, M, H, W, 3]` -> `{name: [B, M]}`."""
    found = self.embed_images(params, observed['image'])
    logits = self.model_part.bind(params['model']).pair_logits
    # both are unit vectors: the sum of products is their cosine
    own = logits(jnp.sum(found * vctx[:, None], -1))
    if self.output == 'log_prob':
      # only the log-probability needs the logits of the other classes
      every = jnp.einsum('bme,ce->bmc', found, params['classes'], precision='highest')
      own = own - jax.nn.logsumexp(logits(every), -1)
    return {self.names[0]: own}

  def cost(self, op):
    """Cost of scoring; a prompt costs nothing, because `load` has encoded all classes."""
    if op == 'encode':
      return core.Cost()
    every = len(self.known_classes) if self.output == 'log_prob' else 0
    return super().cost(op) + core.Cost(flops=2 * every * self.model_part.config.projection)
