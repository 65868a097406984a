"""SANA and SANA-1.5: pictures from a text by a flow over the latents of DC-AE.

`models.gemma2` reads the prompt behind an instruction, `models.sana` goes from noise to latents,
`models.dcae` decodes them. SANA-1.5 takes the best of 2048 such pictures (Xie et al. 2024, arXiv
2410.10629; 2025, 2501.18427). Prompts, times and steps are those of diffusers' `SanaPipeline`
(tests/parity). Sprint is `generators.sana_sprint`.

Letters: B prompts, N candidates, C streams, R rows, W tokens that Gemma reads, S of them that the
network reads, D width of the network.
"""

import dataclasses
import functools
import os
import pathlib

import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.data import tokenizers
from vtts_jax.data.prompts import read_lines
from vtts_jax.errors import ConfigError
from vtts_jax.generators.diffusion import schedules, steppers
from vtts_jax.generators.diffusion.base import flatten_rows
from vtts_jax.generators.diffusion.texts import PromptedGenerator, TextModel
from vtts_jax.models.dcae import modeling as dcae
from vtts_jax.models.gemma2 import modeling as gemma2
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.sana import modeling

RELEASES = {  # settings of the released models of 1024 x 1024 pixels
  '600m': {'weights': 'Efficient-Large-Model/Sana_600M_1024px_diffusers'},
  '1600m': {'weights': 'Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers'},
  '1.5_1600m': {'weights': 'Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers'},
  '1.5_4800m': {'weights': 'Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers'},
}
# settings that read no file
TINY = {'weights': 'random:tiny', 'height': 8, 'width': 8, 'words': 8, 'instruction': ''}
PUBLISHED = 'published'  # the instruction of the release
PUBLISHED_FILE = pathlib.Path(modeling.__file__).with_name('instruction.txt')
LONGEST = 2048  # tokens of an instruction
SAMPLERS = ('dpm', 'euler')


@dataclasses.dataclass(frozen=True)
class SanaGenerator(PromptedGenerator):
  """What SANA and Sprint share: the models and how a prompt is read.

  Attributes:
    weights: a pipeline of diffusers (a repository or a folder), or the network's own folder; see
      `models.pretrained`.
    vae_weights, text_weights: DC-AE and Gemma-2; '' takes those of the pipeline. The tokenizer
      lies with Gemma.
    instruction: what Gemma reads before the prompt: 'published' is the text of the release, ''
      none, anything else a text file. The empty text that guidance compares with has none.
    words: S, tokens that the network reads, with padding; the end of a longer prompt is cut off.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'.
  """

  text_weights: str = ''
  instruction: str = PUBLISHED
  words: int = 300
  dtype: str = 'bfloat16'

  published_guidance = 4.5
  vae_family = 'dcae'
  is_distilled = False  # whether the network reads its guidance scale as an input

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.words, int) or self.words < 2:
      raise ConfigError(f'generator.words={self.words!r}: must be an integer >= 2')
    if self.instruction not in ('', PUBLISHED) and not os.path.isfile(self.instruction):
      raise ConfigError(
        f"generator.instruction={self.instruction!r}: must be a text file, {PUBLISHED!r} or ''"
      )
    self.model_parts()  # raises on weights that are not given and on an unknown random size

  # ------------------------------------------------------------------------------------- the facts

  def model_parts(self):
    return {
      'network': Pretrained('sana', self.weights, self.dtype, setting='generator.weights'),
      'vae': self.vae,
      'text': self.pipeline_text('gemma2', 'text_weights'),
    }

  def text_models(self):
    text = self.model_parts()['text']
    return {'text': TextModel(text, self.words, text.config.vocab_size, 'generator.words')}

  @property
  def latent_channels(self):
    return self.part_config('network').in_channels

  @property
  def patch_cells(self):
    return self.part_config('network').patch_size

  @property
  def decode_flops(self):
    return dcae.count_flops(self.part_config('vae'), 'decode', *self.latent_sides)

  def check(self):
    """Raises `ConfigError` if the models do not fit each other or this generator."""
    network, text = self.part_config('network'), self.part_config('text')
    if network.guidance_embeds != self.is_distilled:
      # a distilled network is not guided by a second stream, and the others need one
      what = 'is distilled: it reads its guidance scale as an input, and must be run by '
      what += 'generators.sana_sprint'
      if self.is_distilled:
        what = 'reads no guidance scale, and must be run by generators.sana'
      raise ConfigError(f'generator.weights={self.weights!r}: the network {what}')
    for setting, what, have, want in (
      ('weights', 'out_channels', network.out_channels, network.in_channels),
      ('text_weights', 'hidden_size', text.hidden_size, network.caption_channels),
    ):
      if have != want:
        raise ConfigError(f'generator.{setting}: has {what}={have}, the network wants {want}')
    super().check()

  # ---------------------------------------------------------------------------------------- prompts

  @property
  def text_width(self) -> int:
    """W: the instruction and S tokens, two of which the instruction has as well: the first one of
    every text, and its own last one, which may go on into the prompt's first word."""
    if not self.instruction:
      return self.words
    text = self.text_models()['text']
    own = _count_tokens(read_instruction(self.instruction), text.tokenizer, text.vocab)
    return own + self.words - 2

  def tokenize(self, prompts):
    """{'ids', 'mask': `[B, C, W]` int32}; raises `ConfigError` on a prompt without a text."""
    texts = core.texts_of(prompts)
    empty = [place for place, text in enumerate(texts) if not text.strip()]
    if empty:
      raise ConfigError(f'prompts: prompt {empty[0]} is empty; a text generator must have words')
    before, reader = read_instruction(self.instruction), self.text_models()['text']
    # lower case, as the pipeline has it
    texts = [before + text.lower().strip() for text in texts]
    by_stream = {'prompt': texts, 'null': [''] * len(texts)}

    def read_rows(stream):
      return pad_right(*tokenizers.tokenize_texts(
        by_stream[stream], reader.tokenizer, self.text_width, reader.vocab, allow_empty=True,
        setting=reader.setting,
      ))  # fmt: skip

    rows = [np.stack(pair, 1) for pair in zip(*(read_rows(s) for s in self.guidance_streams))]
    return dict(zip(('ids', 'mask'), rows))

  def encode(self, params, prompt):
    """{'caption': `[B, C, S, D]`, 'mask': `[B, C, S]`}: what the network reads of a text."""
    flat = {name: rows.reshape(-1, rows.shape[-1]) for name, rows in prompt.items()}
    states = self.bind_part(params, 'text')(flat['ids'], flat['mask'])  # [R, W, .]
    states = states.reshape(*prompt['ids'].shape, -1)
    kept, mask = (
      jnp.stack([x[:, c, self._kept_tokens(s)] for c, s in enumerate(self.guidance_streams)], 1)
      for x in (states, prompt['mask'])
    )
    caption = self.bind_part(params, 'network').caption(kept.reshape(-1, *kept.shape[2:]))
    return {'caption': caption.reshape(*kept.shape[:3], -1), 'mask': mask}

  def _kept_tokens(self, stream):
    """The places of the S tokens whose states the network reads."""
    if stream == 'null':
      return np.arange(self.words)
    # the first token and the last S - 1: the instruction has done its work by then
    last = np.arange(self.text_width - self.words + 1, self.text_width)
    return np.append(0, last)

  # ------------------------------------------------------------------------------------ the network

  def count_flops(self, op):
    network, streams = self.part_config('network'), len(self.guidance_streams)
    if op == 'decode':
      return self.decode_flops
    if op == 'encode':
      text = gemma2.count_flops(self.part_config('text'), self.text_width)
      return streams * (text + modeling.count_flops(network, 'caption', words=self.words))
    return streams * modeling.count_flops(network, 'predict', *self.latent_sides, self.words)


@dataclasses.dataclass(frozen=True)
class Sana(SanaGenerator):
  """SANA and SANA-1.5; `RELEASES` has the settings of each model.

  Attributes:
    guidance: classifier-free guidance scale >= 0; 1 runs one stream only, 0 ignores the prompt, -1
      is the published 4.5.
    shift: moves the steps towards the noise.
    sampler: 'dpm' is DPM-Solver++ of order 2 on the flow's sigmas, as released; 'euler' is
      diffusers' FlowMatchEuler.
    steps, steps_per_stage, eta, early_at: see `generators.diffusion.base`. With 'dpm' and eta = 1
      the steps are those of SDE-DPM-Solver++.
    height, width: multiples of 32 pixels; the released networks were made for squares of the size
      in their name and for rectangles of that area.
    weights, vae_weights, text_weights, instruction, words, dtype: see `SanaGenerator`.
  """

  steps: int = 20
  weights: str = RELEASES['1600m']['weights']
  shift: float = 3.0
  sampler: str = 'dpm'

  def __post_init__(self):
    super().__post_init__()
    if self.sampler not in SAMPLERS:
      allowed = ', '.join(SAMPLERS)
      raise ConfigError(f'generator.sampler={self.sampler!r}: must be one of {allowed}')
    if not self.shift > 0:
      raise ConfigError(f'generator.shift={self.shift}: must be > 0')

  @property
  def stepper(self):
    if self.sampler == 'dpm':
      return steppers.AncestralStepper(self.eta, order=2)
    return steppers.EulerStepper(self.eta)

  @property
  def step_times(self):
    spaced = {'dpm': schedules.sana_times, 'euler': schedules.sd3_times}[self.sampler]
    return spaced(self.steps, self.shift)

  def predict(self, params, ctx, x, t):
    ctx, rows, times = flatten_rows(ctx, x, t)
    # diffusers' DPM-Solver++ tells the network a whole number
    told = schedules.floor_timestep(times) if self.sampler == 'dpm' else (1 - times) * 1000
    told = told * self.part_config('network').timestep_scale
    velocity = self.bind_part(params, 'network')(rows, told, ctx['caption'], ctx['mask'])
    # SANA's velocity points to the noise, ours to the data
    return -velocity.reshape(x.shape)


@functools.cache
def read_instruction(instruction: str) -> str:
  """The text before a prompt, see `SanaGenerator`."""
  if not instruction:
    return ''
  return '\n'.join(read_lines(PUBLISHED_FILE if instruction == PUBLISHED else instruction))


@functools.cache
def _count_tokens(text, place, vocab):
  """Tokens of an instruction, the first one of every text included."""
  _, mask = tokenizers.tokenize_texts(
    [text], place, LONGEST, vocab, longer='error', setting='generator.instruction'
  )
  return int(mask.sum())


def pad_right(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Moves the padding of ids and mask `[B, W]` to the end, where SANA's pipeline has it; Gemma's
  tokenizer puts it first."""
  order = np.argsort(mask == 0, axis=1, kind='stable')
  return np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)
