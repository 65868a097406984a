"""FlexTok AR: ordered picture tokens drawn from text or a class, every prefix of them a picture.

The generator of "(1D) Ordered Tokens Enable Efficient Test-Time Search" (arXiv 2604.15453): a
causal transformer (`models.flexar`) with T5 states or a class in front, FlexTok's flow decoder
(`models.flextok`) and a VAE (`models.autoencoder_kl`) behind. A stage is a token; the schedule (1,
2, 4 .. 256) is the algorithm's. The models are held to their references by golden files; here,
tests/test_flextok_ar.py holds the published beam, token by token, to a loop without a cache.

Prompts are encoded once. A candidate that branches at the last token costs one token: its caches
are its parent's until it is chosen. Guidance runs as a second stream in the same batch.
Letters: B prompts, N candidates, T tokens, V codes, C streams, W words, R rows, H latent side.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import core
from vtts_jax.data import classes, tokenizers
from vtts_jax.errors import ConfigError
from vtts_jax.generators.token import TokenGenerator
from vtts_jax.models.autoencoder_kl import modeling as autoencoder_kl
from vtts_jax.models.flexar import modeling as flexar
from vtts_jax.models.flextok import flow
from vtts_jax.models.flextok import modeling as flextok
from vtts_jax.models.pretrained import Pretrained
from vtts_jax.models.t5 import modeling as t5

TEXT_END = 1  # T5's end of text; the null prompt is this token alone
NOISE = 0x401E  # folded into a key for the seed of the decoder's noise
TINY = dict.fromkeys(
  ('prior_weights', 'tokenizer_weights', 'vae_weights', 'text_weights'), 'random:tiny'
)  # settings that need no file at all


@dataclasses.dataclass(frozen=True)
class FlexTokAR(TokenGenerator):
  """The FlexTok AR and GridTok AR family.

  Attributes:
    prior_weights, tokenizer_weights, vae_weights, text_weights: a file, a folder, a repository of
      the hub (`owner/name@revision`), or 'random:SIZE', see `models.pretrained`; with all four
      'random:tiny' (`TINY`) no file is read. `text_weights` is a T5 with its tokenizer beside it.
      Only what the other settings need is read.
    prior: 'ar', or 'uniform' for tokens drawn without a model, at no network evaluation.
    condition: 'text', 'class' (a prompt has a 'label', or its text is a number or a name of
      `class_names`) or 'none' (prompts are not read).
    class_names: a text file with the name of class i in line i; '' where prompts are numbers.
    words: W, to which texts are padded; a longer text is an error.
    guidance: classifier-free guidance scale >= 0 of the tokens; 1 runs a single stream, 0 ignores
      the prompt, -1 is the published scale: 3 for text, 1.5 for classes.
    temperature, top_k, top_p: see `token_sampling`; top_k 0 is off.
    decode_steps: Euler steps of the decoder, at least 1. The fewest that the verifier tolerates.
    decode_guidance: scale > 0 of the decoder's projected guidance; 1 halves its cost, -1 is the
      published scale: 7.5 for ordered tokens, 5 for grids.
    noise: 'prompt' for one decoder noise shared by the candidates that start together, 'candidate'
      for one each, which its children keep.
    dtype: of the parameters, 'float32' or 'bfloat16'.
  """

  prior_weights: str = 'EPFL-VILAB/FlexAR-3B-T2I'
  tokenizer_weights: str = 'EPFL-VILAB/flextok_d18_d28_dfn'
  vae_weights: str = 'EPFL-VILAB/flextok_vae_c16'
  text_weights: str = 'google/flan-t5-xl'
  prior: str = 'ar'
  condition: str = 'text'
  class_names: str = ''
  words: int = 128
  decode_steps: int = 20
  decode_guidance: float = -1.0
  noise: str = 'prompt'
  dtype: str = 'float32'

  def __post_init__(self):
    super().__post_init__()
    for name, allowed in (
      ('prior', ('ar', 'uniform')),
      ('condition', ('text', 'class', 'none')),
      ('noise', ('prompt', 'candidate')),
    ):
      if getattr(self, name) not in allowed:
        raise ConfigError(
          f'generator.{name}={getattr(self, name)!r}: must be one of {", ".join(allowed)}'
        )
    for name in ('words', 'decode_steps'):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f'generator.{name}={value!r}: must be an integer >= 1')
    if not (self.decode_guidance > 0 or self.decode_guidance == -1):
      raise ConfigError(
        f'generator.decode_guidance={self.decode_guidance}: must be > 0, or -1 (as published)'
      )
    for name in ('prior', 'tokenizer', 'vae', 'text'):
      self._part(name)  # refuses unknown sizes

  # ------------------------------------------------------------------------------------- the facts

  def _part(self, name) -> Pretrained:
    family, part = {
      'prior': ('flexar', ''),
      'tokenizer': ('flextok', 'decoder'),  # a search only decodes
      'vae': ('autoencoder_kl', 'decoder'),
      'text': ('t5', ''),
    }[name]
    setting = f'{name}_weights'
    return Pretrained(family, getattr(self, setting), self.dtype, part, f'generator.{setting}')

  def model_parts(self):
    """The parts that are needed; sizes of a checkpoint are read off its header once."""
    names = ['tokenizer', 'vae']
    if self.prior == 'ar':
      names += ['prior'] if self._part('prior').config.classes else ['prior', 'text']
    return {name: self._part(name) for name in names}

  def part_config(self, name):
    """Sizes of a part."""
    return self._part(name).config

  @property
  def num_stages(self):
    return self.part_config('tokenizer').tokens

  @property
  def vocab(self):
    return self.part_config('tokenizer').codes

  @property
  def decoded_output(self):
    side = self.part_config('tokenizer').size * self.part_config('vae').downscale
    return core.Output('image', (side, side, 3))

  @property
  def prefixes_are_samples(self):
    return self.part_config('tokenizer').registers > 0

  @property
  def published_guidance(self):
    return 1.5 if self.condition == 'class' else 3.0

  @property
  def decode_scale(self) -> float:
    """The guidance scale of the decoder in force."""
    if self.decode_guidance > 0:
      return float(self.decode_guidance)
    return 7.5 if self.prefixes_are_samples else 5.0

  @property
  def streams(self):
    if self.prior == 'uniform':
      return ()
    return ('null',) if self.condition == 'none' else super().streams

  def check(self):
    """Raises `ConfigError` where the parts do not belong together or do not take the condition."""
    parts = {name: part.config for name, part in self.model_parts().items()}
    pairs = [('tokenizer', 'channels', parts['vae'].latent_channels, 'vae')]
    if 'prior' in parts:
      wanted = 'class' if parts['prior'].classes else 'text'
      if self.condition not in (wanted, 'none'):
        raise ConfigError(
          f'generator.condition={self.condition!r}: the prior is a {wanted} model; allowed: '
          f"'{wanted}', 'none'"
        )
      pairs += [('tokenizer', what, getattr(parts['prior'], what), 'prior') for what in
                ('tokens', 'codes')]
    if 'text' in parts:
      pairs.append(('text', 'd_model', parts['prior'].text_width, 'prior'))
    for name, what, want, other in pairs:
      have = getattr(parts[name], what)
      if have != want:
        raise ConfigError(
          f'generator.{name}_weights: has {what}={have}, the {other} wants {want}'
        )
    if parts['vae'].scaling_factor is None:
      raise ConfigError(
        'generator.vae_weights: no scaling_factor; a config.json with it must be there'
      )
    super().check()

  # --------------------------------------------------------------------------------------- prompts

  def tokenize(self, prompts):
    """Prompt arrays: {'ids', 'mask': `[B, W]`, 'null': `[B, 1]`} of a text model, {'labels':
    `[B]`} of a class model, {'rows': `[B]`} without a prior.

    Raises:
      ConfigError: a text of more than `words` tokens, or a class that there is none of.
    """
    count = len(prompts)
    if not self.streams:
      return {'rows': np.zeros(count, np.int32)}
    number = self.part_config('prior').classes
    if number and self.condition == 'none':
      return {'labels': np.full(count, -1, np.int32)}
    if number:
      setting = 'generator.class_names'
      names = classes.read_class_names(self.class_names, setting) if self.class_names else ()
      return {'labels': classes.class_labels(prompts, number, 'generator.condition', names)}
    null = np.full((count, 1), TEXT_END, np.int32)
    if self.condition == 'none':
      return {'null': null}
    text = self._part('text')
    ids, mask = tokenizers.tokenize_texts(
      core.texts_of(prompts),
      '' if text.is_random else text.weights,
      self.words,
      text.config.vocab_size,
      longer='error',
      allow_empty=True,
      setting='generator.words',
    )
    return {'ids': ids, 'mask': mask, 'null': null}

  def encode(self, params, prompt):
    """The context of `models.flexar`, whose leaves are `[B, C, ...]`; T5 runs here only."""
    if not self.streams:
      return prompt
    prior = self.bind_part(params, 'prior')
    if 'labels' in prompt:
      labels = {'prompt': prompt['labels'], 'null': jnp.full_like(prompt['labels'], -1)}
      return prior.class_context(jnp.stack([labels[s] for s in self.streams], axis=1))
    text, streams = self.bind_part(params, 'text'), {}
    if 'prompt' in self.streams:
      streams['prompt'] = text(prompt['ids'], prompt['mask']), prompt['mask']
    if 'null' in self.streams:
      # the end token alone, unpadded: what pads would add is masked, there and in the prior
      states, pad = text(prompt['null']), self._context_words - 1
      mask = jnp.pad(jnp.ones_like(prompt['null']), ((0, 0), (0, pad)))
      streams['null'] = jnp.pad(states, ((0, 0), (0, pad), (0, 0))), mask
    states, mask = (jnp.stack(x, axis=1) for x in zip(*(streams[s] for s in self.streams)))
    return prior.text_context(states, mask)

  @property
  def _context_words(self):
    """Words of the context: one suffices where no prompt is read."""
    return self.words if 'prompt' in self.streams else 1

  # ------------------------------------------------------------------------------------ candidates

  def init_cache(self, params, ctx, lead):
    return self.bind_part(params, 'prior').init_cache(*lead, len(self.streams), self.num_stages)

  def init_extra(self, params, ctx, keys):
    """The seed of the decoder's noise `[B, N, 2]` uint32."""
    owners = keys if self.noise == 'candidate' else jnp.broadcast_to(keys[:, :1], keys.shape)
    return noise_seeds(owners)

  def next_logits(self, params, ctx, state, stage):
    prior, fed = self.bind_part(params, 'prior'), self.previous_tokens(state, stage)
    # a row of the prior's cache is a candidate here
    position = stage[..., None] if jnp.ndim(stage) else stage
    hidden, cache = prior.step(ctx, state.cache, fed[..., None], position)
    return self.guide_logits(prior.logits(hidden[:, :, 0])), cache

  def prefill(self, params, ctx, state, stage):
    # all positions at once; those from `stage` on are never seen before they are rewritten
    return self.bind_part(params, 'prior').prefill(ctx, state.tokens)[1]

  def forced_logits(self, params, ctx, state):
    prior = self.bind_part(params, 'prior')
    hidden, _ = prior.prefill(ctx, state.tokens)
    return self.guide_logits(prior.logits(hidden))

  def decode_latents(self, params, state, stage):
    """What the VAE decodes, `[B N, H, H, channels]`."""
    sizes, decoder = self.part_config('tokenizer'), self.bind_part(params, 'tokenizer')
    keep = jnp.broadcast_to(stage, state.tokens.shape[:2]).reshape(-1)
    registers = decoder.condition(state.tokens.reshape(-1, sizes.tokens), keep)
    noise = draw_noise(state.extra.reshape(-1, 2), (sizes.size, sizes.size, sizes.channels))
    return flow.sample(decoder, registers, noise, self.decode_steps, self.decode_scale)

  def decode(self, params, ctx, state, stage):
    vae = self.bind_part(params, 'vae')
    latents = self.decode_latents(params, state, stage)
    images = vae.decode(vae.unscale(latents)).astype(jnp.float32)
    images = images.reshape(*state.tokens.shape[:2], *images.shape[1:])
    return jnp.clip((images + 1) / 2, 0, 1)

  def flops(self, op):
    streams = len(self.streams)
    if op == 'decode':
      sizes, passes = self.part_config('tokenizer'), 1 if self.decode_scale == 1 else 2
      steps = self.decode_steps * passes * flextok.flops_decode(sizes)
      return steps + autoencoder_kl.flops_decode(self.part_config('vae'), sizes.size)
    prior = self.part_config('prior')
    words = 0 if prior.classes else self._context_words
    if op == 'encode':
      flops = streams * flexar.flops_text(prior, words)
      if not prior.classes:
        width = {'prompt': self.words, 'null': 1}
        flops += sum(t5.flops(self.part_config('text'), width[s]) for s in self.streams)
      return flops
    trunk = flexar.flops_trunk(prior, self.num_stages, words)
    return {
      'step': streams * (trunk + flexar.flops_head(prior)),
      'prefill': streams * self.num_stages * trunk,
    }[op]


# -------------------------------------------------------------------------------------------- noise


def noise_seeds(keys: jax.Array) -> jax.Array:
  """Two numbers `[..., 2]` uint32 for each key `[...]`, whatever the keys' implementation."""
  draw = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, NOISE), (2,), jnp.uint32))
  return draw(keys.reshape(-1)).reshape(*keys.shape, 2)


def draw_noise(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal noise `[R, *shape]` float32 of seeds `[R, 2]`."""
  keys = jax.random.wrap_key_data(seeds, impl='threefry2x32')
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
