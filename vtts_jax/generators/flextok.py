"""FlexTok AR: draws ordered picture tokens from a text or a class; every prefix is a picture.

The generator of "(1D) Ordered Tokens Enable Efficient Test-Time Search" (arXiv 2604.15453): a
causal transformer (`models.flexar`) with T5 states or a class in front, FlexTok's flow decoder
(`models.flextok`) and a VAE (`models.autoencoder_kl`) behind. A stage is a token; the algorithm
chooses the schedule (1, 2, 4 .. 256). Golden files hold the models to their references;
tests/test_flextok_generator.py holds the published beam, token by token, to a loop without a cache.

Prompts are encoded once. A branch at the last token costs one token, because a child uses its
parent's caches until the search keeps it. Guidance runs as a second stream in the same batch.
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

TEXT_END = 1  # T5's end-of-text id; the null prompt is this token alone
NOISE = 0x401E  # folded into a key, so that the decoder's noise and the tokens do not share draws
TINY = dict.fromkeys(
  ('prior_weights', 'tokenizer_weights', 'vae_weights', 'text_weights'), 'random:tiny'
)  # settings that read no file


@dataclasses.dataclass(frozen=True)
class FlexTokAR(TokenGenerator):
  """The FlexTok AR and GridTok AR family.

  Attributes:
    prior_weights, tokenizer_weights, vae_weights, text_weights: a file, a folder, a repository of
      the hub (`owner/name@revision`), or 'random:SIZE' (`models.pretrained`). With `TINY`, all four
      are 'random:tiny' and no file is read. `text_weights` is a T5 with its tokenizer beside it.
      Models that the other settings do not use are not read.
    prior: 'ar', or 'uniform' to draw tokens without a network.
    condition: 'text', 'class' (a prompt has a 'label', or its text is a number or one of
      `class_names`), or 'none' (prompts are ignored).
    class_names: a text file whose line i names class i; '' if prompts are class numbers.
    words: W, the length that texts are padded to; a longer text is an error.
    guidance: classifier-free guidance scale >= 0 of the tokens. 1 runs one stream only, 0 ignores
      the prompt, -1 selects the published scale: 3 for text, 1.5 for classes.
    temperature, top_k, top_p: see `token_sampling`; top_k 0 switches it off.
    decode_steps: Euler steps of the decoder, at least 1; the cost of a picture grows with it.
    decode_guidance: scale > 0 of the decoder's projected guidance. 1 halves its cost, -1 selects
      the published scale: 7.5 for ordered tokens, 5 for grids.
    noise: 'prompt': candidates that start together share one decoder noise. 'candidate': each has
      its own, and its children keep it.
    dtype: dtype of the parameters, 'float32' or 'bfloat16'.
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
      self._pretrained_part(name)  # raises on an unknown size

  # ------------------------------------------------------------------------------------- the facts

  def _pretrained_part(self, name) -> Pretrained:
    family, part = {
      'prior': ('flexar', ''),
      'tokenizer': ('flextok', 'decoder'),  # a search never encodes pictures
      'vae': ('autoencoder_kl', 'decoder'),
      'text': ('t5', ''),
    }[name]
    setting = f'{name}_weights'
    return Pretrained(family, getattr(self, setting), self.dtype, part, f'generator.{setting}')

  def model_parts(self):
    """The models that these settings need; a checkpoint's header is read once for its sizes."""
    names = ['tokenizer', 'vae']
    # the prior's header tells whether it is a class model, which has no text encoder
    if self.prior == 'ar':
      names += ['prior'] if self._pretrained_part('prior').config.classes else ['prior', 'text']
    return {name: self._pretrained_part(name) for name in names}

  def part_config(self, name):
    """The sizes of one model, needed by these settings or not."""
    return self._pretrained_part(name).config

  @property
  def num_stages(self):
    return self.part_config('tokenizer').tokens

  @property
  def vocab(self):
    return self.part_config('tokenizer').codes

  @property
  def decoded_output(self):
    # the VAE enlarges the latent side H
    side = self.part_config('tokenizer').size * self.part_config('vae').downscale
    return core.Output('image', (side, side, 3))

  @property
  def prefixes_are_samples(self):
    # registers make an ordered tokenizer (FlexTok); a grid (GridTok) has none
    return self.part_config('tokenizer').registers > 0

  @property
  def published_guidance(self):
    return 1.5 if self.condition == 'class' else 3.0

  @property
  def decode_scale(self) -> float:
    """The decoder's guidance scale after -1 has been resolved."""
    if self.decode_guidance > 0:
      return float(self.decode_guidance)
    return 7.5 if self.prefixes_are_samples else 5.0

  @property
  def guidance_streams(self):
    if self.prior == 'uniform':
      return ()
    # without a condition there is nothing to contrast with
    return ('null',) if self.condition == 'none' else super().guidance_streams

  def check(self):
    """Raises `ConfigError` if the models do not fit each other or cannot take the condition."""
    parts = {name: part.config for name, part in self.model_parts().items()}
    # (part, its size, the value that the other part needs, the other part)
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
    """Prompt arrays: {'ids', 'mask': `[B, W]`, 'null': `[B, 1]`} for a text model, {'labels':
    `[B]`} for a class model, {'rows': `[B]`} without a prior.

    Raises:
      ConfigError: a text of more than `words` tokens, or an unknown class.
    """
    count = len(prompts)
    if not self.guidance_streams:
      # the array only carries the number of prompts
      return {'rows': np.zeros(count, np.int32)}
    number = self.part_config('prior').classes
    if number and self.condition == 'none':
      # label -1 selects the embedding of no class
      return {'labels': np.full(count, -1, np.int32)}
    if number:
      setting = 'generator.class_names'
      names = classes.read_class_names(self.class_names, setting) if self.class_names else ()
      return {'labels': classes.class_labels(prompts, number, 'generator.condition', names)}
    null = np.full((count, 1), TEXT_END, np.int32)
    if self.condition == 'none':
      return {'null': null}
    text = self._pretrained_part('text')
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
    """The context of `models.flexar`, leaves `[B, C, ...]`; the only place that runs T5."""
    if not self.guidance_streams:
      return prompt
    prior = self.bind_part(params, 'prior')
    if 'labels' in prompt:
      labels = {'prompt': prompt['labels'], 'null': jnp.full_like(prompt['labels'], -1)}
      return prior.class_context(jnp.stack([labels[s] for s in self.guidance_streams], axis=1))
    text, streams = self.bind_part(params, 'text'), {}
    if 'prompt' in self.guidance_streams:
      streams['prompt'] = text(prompt['ids'], prompt['mask']), prompt['mask']
    if 'null' in self.guidance_streams:
      # T5 reads the end token alone; padding it to W would cost W words and change nothing,
      # because T5 and the prior mask the padding
      states, pad = text(prompt['null']), self._context_words - 1
      mask = jnp.pad(jnp.ones_like(prompt['null']), ((0, 0), (0, pad)))
      streams['null'] = jnp.pad(states, ((0, 0), (0, pad), (0, 0))), mask
    states, mask = (jnp.stack(x, axis=1) for x in zip(*(streams[s] for s in self.guidance_streams)))
    return prior.text_context(states, mask)

  @property
  def _context_words(self):
    """Length of the context; 1 if no stream reads the prompt."""
    return self.words if 'prompt' in self.guidance_streams else 1

  # ------------------------------------------------------------------------------------ candidates

  def init_cache(self, params, ctx, lead):
    prior, streams = self.bind_part(params, 'prior'), len(self.guidance_streams)
    return prior.init_cache(*lead, streams, self.num_stages)

  def init_extra(self, params, ctx, keys):
    """Seeds of the decoder's noise, `[B, N, 2]` uint32."""
    # the seed is part of the state, so a candidate keeps its noise when a search moves or copies it
    owners = keys if self.noise == 'candidate' else jnp.broadcast_to(keys[:, :1], keys.shape)
    return noise_seeds(owners)

  def next_logits(self, params, ctx, state, stage):
    prior, fed = self.bind_part(params, 'prior'), self.previous_tokens(state, stage)
    # the prior's axis of rows per cache has size 1 here: each candidate has its own cache
    position = stage[..., None] if jnp.ndim(stage) else stage
    hidden, cache = prior.feed_tokens(ctx, state.cache, fed[..., None], position)
    return self.guide_logits(prior.token_logits(hidden[:, :, 0])), cache

  def prefill(self, params, ctx, state, stage):
    # fills all positions in one pass; entries from `stage` on are overwritten before they are read
    return self.bind_part(params, 'prior').prefill(ctx, state.tokens)[1]

  def forced_logits(self, params, ctx, state):
    prior = self.bind_part(params, 'prior')
    hidden, _ = prior.prefill(ctx, state.tokens)
    return self.guide_logits(prior.token_logits(hidden))

  def decode_latents(self, params, state, stage):
    """Latents `[B N, H, H, channels]` for the VAE, from the first `stage` tokens."""
    sizes, decoder = self.part_config('tokenizer'), self.bind_part(params, 'tokenizer')
    keep = jnp.broadcast_to(stage, state.tokens.shape[:2]).reshape(-1)
    registers = decoder.embed_registers(state.tokens.reshape(-1, sizes.tokens), keep)
    noise = draw_noise(state.extra.reshape(-1, 2), (sizes.size, sizes.size, sizes.channels))
    return flow.sample_latents(decoder, registers, noise, self.decode_steps, self.decode_scale)

  def decode(self, params, ctx, state, stage):
    vae = self.bind_part(params, 'vae')
    latents = self.decode_latents(params, state, stage)
    # the VAE works in -1 .. 1, pictures are in 0 .. 1
    images = vae.decode(vae.unscale_latents(latents)).astype(jnp.float32)
    images = images.reshape(*state.tokens.shape[:2], *images.shape[1:])
    return jnp.clip((images + 1) / 2, 0, 1)

  def count_flops(self, op):
    streams = len(self.guidance_streams)
    if op == 'decode':
      sizes, passes = self.part_config('tokenizer'), 1 if self.decode_scale == 1 else 2
      # guidance runs the decoder twice a step, except at scale 1
      steps = self.decode_steps * passes * flextok.count_velocity_flops(sizes)
      return steps + autoencoder_kl.count_decode_flops(self.part_config('vae'), *(sizes.size,) * 2)
    prior = self.part_config('prior')
    words = 0 if prior.classes else self._context_words
    if op == 'encode':
      flops = streams * flexar.count_text_flops(prior, words)
      if not prior.classes:
        # T5 reads the null prompt unpadded, see `encode`
        length, text = {'prompt': self.words, 'null': 1}, self.part_config('text')
        flops += sum(t5.count_flops(text, length[stream]) for stream in self.guidance_streams)
      return flops
    trunk = flexar.count_trunk_flops(prior, self.num_stages, words)
    return {
      'step': streams * (trunk + flexar.count_head_flops(prior)),
      'prefill': streams * self.num_stages * trunk,
    }[op]


# -------------------------------------------------------------------------------------------- noise


def noise_seeds(keys: jax.Array) -> jax.Array:
  """Seeds `[..., 2]` uint32 of keys `[...]`; works for every key implementation."""
  # plain numbers, because a state is saved to disk and typed keys are not arrays there
  draw = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, NOISE), (2,), jnp.uint32))
  return draw(keys.reshape(-1)).reshape(*keys.shape, 2)


def draw_noise(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal noise `[R, *shape]` float32 from seeds `[R, 2]`."""
  # a fixed implementation, so that the noise does not depend on jax_default_prng_impl
  keys = jax.random.wrap_key_data(seeds, impl='threefry2x32')
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
