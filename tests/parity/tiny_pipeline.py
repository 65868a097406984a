"""Small random text models with tokenizers, and what a pipeline of diffusers and a generator of
ours make of the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import reference
from reference import torch, transformers

PROMPTS = ('a red dog', 'Two cats, and a very small blue cup left of them')
CLIP_LENGTH, CLIP_WIDTH = 20, 16  # so that the second prompt is cut


def make_clip(seed, *, projection=0, act='quick_gelu', pad='<|endoftext|>'):
  """(text tower, tokenizer): words are single letters; the ends are the highest ids."""
  letters = 'abcdefghijklmnopqrstuvwxyz,!'
  vocab = {token: i for i, token in enumerate([*letters, *(f'{c}</w>' for c in letters)])}
  vocab |= {'<|startoftext|>': len(vocab), '<|endoftext|>': len(vocab) + 1}
  tokenizer = transformers.CLIPTokenizer(
    vocab=vocab, merges=[], pad_token=pad, model_max_length=CLIP_LENGTH
  )
  config = transformers.CLIPTextConfig(
    vocab_size=len(vocab), hidden_size=CLIP_WIDTH, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=2, max_position_embeddings=CLIP_LENGTH, hidden_act=act,
    projection_dim=projection or CLIP_WIDTH, bos_token_id=len(vocab) - 2,
    eos_token_id=len(vocab) - 1, pad_token_id=1,
  )  # fmt: skip
  kind = 'CLIPTextModelWithProjection' if projection else 'CLIPTextModel'
  return reference.randomise(getattr(transformers, kind)(config), seed).eval(), tokenizer


def make_t5(seed, width):
  """(encoder, tokenizer)."""
  pieces = [('<pad>', 0.0), ('</s>', 0.0), ('<unk>', 0.0), ('▁', -2.0)]
  pieces += [(piece, -3.0) for c in 'abcdefghijklmnopqrstuvwxyz' for piece in (c, f'▁{c}')]
  config = transformers.T5Config(
    vocab_size=len(pieces), d_model=width, d_kv=4, d_ff=24, num_layers=2, num_heads=3,
    feed_forward_proj='gated-gelu', dropout_rate=0.0,
  )  # fmt: skip
  tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
  return reference.randomise(transformers.T5EncoderModel(config), seed).eval(), tokenizer


def sample(gen, params, noise):
  """(latents, pictures) of ours, from noise `[B, h, w, C]`."""
  rows = [{'text': text} for text in PROMPTS]
  arrays = jax.tree.map(jnp.asarray, gen.tokenize(rows))

  @jax.jit
  def run(params, arrays, noise):
    ctx = gen.encode(params, arrays)
    keys = jax.random.split(jax.random.key(0), (len(PROMPTS), 1))
    state = gen.extend(params, ctx, gen.start_state(noise[:, None]), keys, 0, gen.num_stages)
    return ctx, state.x[:, 0], gen.observe(params, ctx, state, gen.num_stages, ('image',))['image']

  ctx, latents, images = run(params, arrays, noise)
  return ctx, np.asarray(latents), np.asarray(images[:, 0])


def draw_noise(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def to_torch(x):
  """`[B, h, w, C]` -> `[B, C, h, w]`."""
  return torch.tensor(np.moveaxis(x, -1, 1).copy())
