"""T5 decoder block by block against transformers, and the key table at full size."""

import dataclasses

import jax
import numpy as np
import pytest
import reference
from full_size import check_table, header
from reference import torch, transformers

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.t5 import convert, decoder, modeling

transformers.T5ForConditionalGeneration  # noqa: B018, loads as it is named
CLOSE = {'atol': 2e-5, 'rtol': 2e-5}
R, A, W, D, H = 3, 5, 11, 24, 5


def untied(config):
  """transformers 5 ties the head of a new model; those of v1.1 and FLAN have their own."""
  theirs = transformers.T5ForConditionalGeneration(config)
  theirs.lm_head.weight = torch.nn.Parameter(torch.zeros_like(theirs.lm_head.weight))
  return theirs


def load(theirs, encoder):
  source = reference.source(theirs, theirs.config.to_dict())
  config = decoder.config_of(source, encoder)
  graphdef, template = modules.abstract_module(lambda: decoder.build_model(config))
  table = [*decoder.RULES, (r'(encoder|shared|decoder\.embed_tokens)\..*', None, '')]
  params = convert_weights(decoder.arrange_layers(source), table, template)
  return modules.bind_graph(graphdef, params)


@pytest.fixture(scope='module', params=['gated-gelu', 'relu'])
def pair(request):
  config = transformers.T5Config(
    vocab_size=50, d_model=D, d_kv=6, d_ff=40, num_layers=2, num_decoder_layers=3, num_heads=H,
    relative_attention_num_buckets=12, relative_attention_max_distance=20,
    feed_forward_proj=request.param, dropout_rate=0.0, tie_word_embeddings=False,
  )  # fmt: skip
  theirs = reference.randomise(untied(config), 1)
  encoder = convert.config_of(reference.source(theirs, config.to_dict()))
  return theirs, load(theirs, encoder)


def data(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(theirs, x, states, mask):
  """What went into and came out of every part of the decoder: {module: (input, output)}."""
  seen, first = {}, lambda y: (y[0] if isinstance(y, tuple) else y).detach().numpy()

  def hook(name):
    def keep(module, args, kwargs, out):
      seen[name] = first(args or kwargs['hidden_states']), first(out)

    return keep

  parts = dict(theirs.decoder.named_modules())
  hooks = [m.register_forward_hook(hook(n), with_kwargs=True) for n, m in parts.items() if n]
  options = {} if mask is None else {'encoder_attention_mask': torch.from_numpy(mask)}
  with torch.no_grad():
    out = theirs.decoder(
      inputs_embeds=torch.from_numpy(x), encoder_hidden_states=torch.from_numpy(states), **options
    )
    logits = theirs.lm_head(out.last_hidden_state).numpy()
  for each in hooks:
    each.remove()
  return seen, out.last_hidden_state.numpy(), logits


@pytest.mark.parametrize('width', [1, 2, 17, 300])
@pytest.mark.parametrize(('count', 'farthest'), [(32, 128), (12, 20), (8, 64)])
def test_bias(width, count, farthest):
  attention = transformers.models.t5.modeling_t5.T5Attention
  offset = torch.arange(width)[None] - torch.arange(width)[:, None]
  want = attention._relative_position_bucket(offset, False, count, farthest)
  have = np.tril(modeling.relative_buckets(width, 2 * count, farthest))
  np.testing.assert_array_equal(have, want.numpy())


@pytest.mark.parametrize('lengths', [None, (11, 4, 1)])
def test_every_part(pair, lengths):
  theirs, ours = pair
  x, states = data(R, A, D), data(R, W, D, seed=1)
  mask = None if lengths is None else (np.arange(W) < np.array(lengths)[:, None]).astype(np.int64)
  seen, last, logits = run(theirs, x, states, mask)
  graphdef, params = modules.split_module(ours.blocks)
  bias = theirs.decoder.block[0].layer[0].SelfAttention.compute_bias(A, A).detach().numpy()
  have, lower = np.asarray(ours.position_bias(A)), np.tri(A, dtype=bool)
  np.testing.assert_allclose(have[:, :, lower], bias[:, :, lower], **CLOSE)
  assert (have[:, :, ~lower] < -1e38).all()
  for i in range(3):
    block = modules.bind_graph(graphdef, jax.tree.map(lambda a, i=i: a[i], params))
    for name, part in {
      'layer.0.layer_norm': block.attention_norm,
      'layer.0.SelfAttention': lambda y, b=block: b.attention(y, have),
      'layer.1.layer_norm': block.cross_norm,
      'layer.1.EncDecAttention': lambda y, b=block: b.cross(y, states, mask),
      'layer.2.layer_norm': block.feed_norm,
      'layer.2.DenseReluDense': block.feed,
    }.items():
      given, want = seen[f'block.{i}.{name}']
      np.testing.assert_allclose(part(given), want, err_msg=f'{i} {name}', **CLOSE)
  for i, state in enumerate(ours.layer_states(x, states, mask)):
    np.testing.assert_allclose(state, seen[f'block.{i}'][1], err_msg=f'block {i}', **CLOSE)
  np.testing.assert_allclose(ours.norm(state), last, **CLOSE)
  np.testing.assert_allclose(ours(x, states, mask), logits, **CLOSE)


def test_whole_model(pair):
  """Ids to logits through both halves, the answer shifted as transformers shifts labels."""
  theirs, ours = pair
  rng = np.random.default_rng(2)
  ids, answer = rng.integers(2, 50, (R, W)), rng.integers(2, 50, (R, A))
  mask = (np.arange(W) < np.array([[11], [4], [1]])).astype(np.int64)
  theirs.config.decoder_start_token_id = 0  # in FLAN's config.json
  with torch.no_grad():
    args = (torch.from_numpy(v) for v in (ids, mask, answer))
    want = theirs(**dict(zip(('input_ids', 'attention_mask', 'labels'), args))).logits.numpy()
  source = reference.source(theirs, theirs.config.to_dict())
  encoder = reference.bind_port(convert, modeling, source)
  embedded = encoder.embed(decoder.shift_right(answer))
  np.testing.assert_allclose(ours(embedded, encoder(ids, mask), mask), want, **CLOSE)


@pytest.mark.parametrize(
  ('name', 'count'), [('flan_t5_xl', 1_626_229_760), ('t5_v1_1_xxl', 6_373_021_696)]
)
def test_released_sizes(name, count):
  """Keys and parameters of the decoder with its head, from transformers' class on meta."""
  config = modeling.SIZES[name]
  with torch.device('meta'):
    theirs = untied(transformers.T5Config(**dataclasses.asdict(config), tie_word_embeddings=False))
  source = header(theirs)
  assert decoder.config_of(source, config) == config
  _, template = modules.abstract_module(lambda: decoder.build_model(config))
  leads = ('decoder.block', 'decoder.final', 'lm_head')
  own = [n for n in source.tensor_names() if n.startswith(leads)]
  theirs = sum(int(np.prod(source.shape_of(n))) for n in own)
  assert modules.count_parameters(template) == count == theirs
  table = [*decoder.RULES, (r'(encoder|shared|decoder\.embed_tokens)\..*', None, '')]
  check_table(decoder.arrange_layers(source), table, template)
