"""What the FlexTok AR generator is made of: sizes, weights, words and classes, noise.

Sizes come from the header of a checkpoint or from a name; weights from the checkpoint or, under a
name, from a seed. Letters: B prompts, W words, R rows, H W C latents.
"""

import functools
import pathlib
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vtts_jax.checkpoints import source as source_files
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.autoencoder_kl import convert as vae_convert
from vtts_jax.models.autoencoder_kl import modeling as vae
from vtts_jax.models.flexar import convert as flexar_convert
from vtts_jax.models.flexar import modeling as flexar
from vtts_jax.models.flextok import convert as flextok_convert
from vtts_jax.models.flextok import modeling as flextok
from vtts_jax.models.t5 import convert as t5_convert
from vtts_jax.models.t5 import modeling as t5

END = 1  # T5's end of text; the empty text is this token alone
HASHED = 256  # words that the hash tokenizer tells apart, pad and end among them

_TINY_PRIOR = {'width': 16, 'layers': 2, 'heads': 2, 'tokens': 8, 'codes': 16, 'hidden': 24}
PRIORS = {'tiny': flexar.Config(**_TINY_PRIOR, text_width=8), **flexar.RELEASED}
TOKENIZERS = {
  'tiny': flextok.Config(
    channels=3, size=8, grid=4, registers=8, levels=(4, 4), encoder_width=8, encoder_layers=1,
    decoder_width=16, decoder_layers=2, head=8,
  ),
  # released tokens, and a decoder that a laptop can run: for timing searches
  'small': flextok.Config(decoder_width=256, decoder_layers=4),
  **flextok.RELEASED,
}  # fmt: skip
_VAES = {
  'tiny': vae.Config(latent_channels=3, block_out_channels=(4, 8), layers_per_block=1,
                     norm_num_groups=2, scaling_factor=1.0, encoder=False),
  'small': vae.Config(latent_channels=16, block_out_channels=(16, 16, 32, 32), layers_per_block=1,
                      norm_num_groups=8, scaling_factor=1.0, encoder=False),
}  # fmt: skip
_VAE = vae.Config(latent_channels=16, scaling_factor=1.0, encoder=False)


class Configs(NamedTuple):
  """Sizes of the parts; None for one that is not needed."""

  prior: flexar.Config | None
  tokenizer: flextok.Config
  vae: vae.Config
  text: t5.Config | None


def check_random(random: str) -> None:
  """Raises `ConfigError` unless `random` is '', a prior, or 'prior/tokenizer', by known names."""
  prior, slash, tokenizer = random.partition('/')
  if random and (prior not in PRIORS or (slash and tokenizer not in TOKENIZERS)):
    raise ConfigError(
      f"generator.random={random!r}: must be '' or PRIOR or PRIOR/TOKENIZER with PRIOR one of "
      f'{", ".join(PRIORS)} and TOKENIZER one of {", ".join(TOKENIZERS)}'
    )


@functools.cache
def configs(random: str, froms: tuple[str, ...], modelled: bool, condition: str) -> Configs:
  """Sizes of the parts; `froms` are the places of prior, tokenizer, vae and text encoder, '' for a
  part that is not needed. Reads headers only."""
  if random:
    return _random(random, modelled, condition)
  prior_from, tokenizer_from, vae_from, text_from = froms
  prior = flexar_convert.config_of(source_files.open_source(prior_from)) if modelled else None
  tokenizer = flextok_convert.config_of(source_files.open_source(tokenizer_from))
  decoder = vae_convert.config_of(source_files.open_source(vae_from), encoder=False)
  text = None
  if modelled and not prior.classes:
    text = t5_convert.config_of(source_files.open_source(text_from))
  return Configs(prior, tokenizer, decoder, text)


def _random(random, modelled, condition):
  name, _, tokenizer = random.partition('/')
  prior = PRIORS[name]
  if not tokenizer:
    grid, classes = name.startswith('grid'), prior.classes or condition == 'class'
    tokenizer = f'flextok_d18_d28_{"in1k" if classes else "dfn"}'
    tokenizer = 'tiny' if name == 'tiny' else 'gridtok_d18_d28' if grid else tokenizer
  if name == 'tiny' and condition == 'class':
    prior = flexar.Config(**_TINY_PRIOR, classes=5)
  text = None
  if modelled and not prior.classes:  # as wide as the prior expects, else as small as can be
    text = t5.Config(HASHED, prior.text_width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
  picture = _VAES.get(tokenizer, _VAE)
  return Configs(prior if modelled else None, TOKENIZERS[tokenizer], picture, text)


def check_fit(c: Configs, condition: str) -> None:
  """Raises `ConfigError` where the parts do not belong together or do not take the condition."""
  pairs = [('tokenizer_from', 'channels', c.tokenizer.channels, 'vae', c.vae.latent_channels)]
  if c.prior is not None:
    wanted = 'class' if c.prior.classes else 'text'
    if condition not in (wanted, 'none'):
      raise ConfigError(
        f'generator.condition={condition!r}: the prior is a {wanted} model; allowed: '
        f"'{wanted}', 'none'"
      )
    pairs += [
      ('tokenizer_from', 'tokens', c.tokenizer.tokens, 'prior', c.prior.tokens),
      ('tokenizer_from', 'codes', c.tokenizer.codes, 'prior', c.prior.codes),
    ]
  if c.text is not None:
    pairs.append(('text_from', 'width', c.text.d_model, 'prior', c.prior.text_width))
  for setting, what, have, other, want in pairs:
    if have != want:
      raise ConfigError(f'generator.{setting}: has {what}={have}, the {other} wants {want}')
  if c.vae.scaling_factor is None:
    raise ConfigError('generator.vae_from: no scaling_factor; a config.json with it must be there')


# ------------------------------------------------------------------------------------------ weights

_MODELS = {
  flexar.Config: flexar.FlexAR,
  flextok.Config: flextok.Decoder,  # a search only decodes
  vae.Config: vae.AutoencoderKL,
  t5.Config: t5.T5Encoder,
}


def _build(config):
  return _MODELS[type(config)](config, rngs=nnx.Rngs(0))


def merge(config, params):
  """The module of a config with its parameters."""
  return modules.model(_build, config, params)


def load(part: str, config, place: str, dtype: str):
  """Parameters of 'prior', 'tokenizer', 'vae' or 'text' at `place`, or random ones for ''."""
  if not place:
    return modules.drawn(_build, config, dtype)
  source = source_files.open_source(place)
  loaders = {
    'prior': lambda: flexar_convert.load(source, config, dtype=dtype),
    'tokenizer': lambda: flextok_convert.load(source, config, dtype=dtype, part='decoder'),
    'vae': lambda: vae_convert.load(source, dtype=dtype, encoder=False),
    'text': lambda: t5_convert.load(source, dtype=dtype),
  }
  return loaders[part]()[1]


# ------------------------------------------------------------------------------------------ prompts


def words(texts, width: int, place: str) -> tuple[np.ndarray, np.ndarray]:
  """Token ids and mask `[B, W]` int32, padded with 0; '' as the place takes the hash tokenizer.

  Raises:
    ConfigError: a text of more than `width` tokens, its end among them.
  """
  split = _t5_tokenizer(place) if place else hash_tokenizer
  ids, mask = (np.zeros((len(texts), width), np.int32) for _ in range(2))
  for row, text in enumerate(texts):
    found = split(text)
    if len(found) > width:
      raise ConfigError(f'generator.words={width}: {text!r} has {len(found)} tokens')
    ids[row, : len(found)], mask[row, : len(found)] = found, 1
  return ids, mask


def hash_tokenizer(text: str) -> list[int]:
  """Ids 2 .. 255 by a hash of each word, and the end: for random weights, which know no words."""
  return [2 + zlib.crc32(word.encode()) % (HASHED - 2) for word in text.split()] + [END]


@functools.cache
def _t5_tokenizer(place):
  from transformers import AutoTokenizer

  name, _, revision = place.partition('@')
  found = AutoTokenizer.from_pretrained(name, revision=revision or None)
  return lambda text: found(text).input_ids


def labels(texts, classes: int, names: str) -> np.ndarray:
  """Classes `[B]` int32 of prompts that are numbers, or lines of the file `names`.

  Raises:
    ConfigError: a class that there is none of.
  """
  known = pathlib.Path(names).read_text(encoding='utf-8').splitlines() if names else []
  index = {name.strip(): i for i, name in enumerate(known)}
  found = []
  for text in texts:
    label = index.get(text.strip(), int(text) if text.strip().isdecimal() else -1)
    if not 0 <= label < classes:
      allowed = f'a number in 0 .. {classes - 1}' + (f' or a line of {names}' if names else '')
      raise ConfigError(f'generator.condition=class: prompt {text!r} must be {allowed}')
    found.append(label)
  return np.array(found, np.int32)


# -------------------------------------------------------------------------------------------- noise


def noise_seed(keys):
  """Two numbers `[..., 2]` uint32 for each key `[...]`, whatever the keys' implementation."""
  draw = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, 0x401E), (2,), jnp.uint32))
  return draw(keys.reshape(-1)).reshape(*keys.shape, 2)


def noise(seeds, shape):
  """Standard normal noise `[R, *shape]` float32 of seeds `[R, 2]`."""
  keys = jax.random.wrap_key_data(seeds, impl='threefry2x32')
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
