"""CLIP stage by stage against transformers; open_clip's layout by its names.

The golden file of open_clip itself (make_golden_clip.py) holds that these names are its own.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from PIL import Image
from reference import nchw, torch, transformers

from vtts_jax import components
from vtts_jax.checkpoints.convert import _match_rule
from vtts_jax.checkpoints.files import flatten_tree, write_weights
from vtts_jax.checkpoints.source import Source, source_of_arrays
from vtts_jax.models import modules
from vtts_jax.models.clip import convert, modeling
from vtts_jax.models.preprocessing import read_preprocessing

transformers.CLIPModel, transformers.CLIPImageProcessorPil  # noqa: B018, loaded as they are named
CLOSE = {'atol': 1e-4, 'rtol': 1e-4}
IDS = np.array([[28, 3, 4, 29, 0, 0, 0], [28, 7, 29, 29, 5, 29, 9]])  # 29 ends a text


def config(act='quick_gelu', eos=2, image=(24, 3, 2, 40), text=(20, 2, 4, 36), **sizes):
  names = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size')
  sizes = {'image_size': 20, 'patch_size': 4, 'vocab_size': 30, 'length': 7, 'to': 12} | sizes
  return transformers.CLIPConfig(
    text_config=dict(zip(names, text)) | {
      'hidden_act': act, 'vocab_size': sizes['vocab_size'], 'eos_token_id': eos,
      'max_position_embeddings': sizes['length'],
    },
    vision_config=dict(zip(names, image)) | {
      'hidden_act': act, 'image_size': sizes['image_size'], 'patch_size': sizes['patch_size'],
    },
    projection_dim=sizes['to'],
  )  # fmt: skip


@pytest.fixture(scope='module', params=[('quick_gelu', 2), ('gelu', 29)], ids=['openai', 'laion'])
def pair(request):
  theirs = reference.randomise(transformers.CLIPModel(config(*request.param)), 1)
  with torch.no_grad():
    theirs.logit_scale.fill_(1.5)
  source = reference.source(theirs, theirs.config.to_dict())
  return theirs, reference.bind_port(convert, modeling, source)


def data(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_image_tower(pair):
  theirs, ours = pair
  x = data(3, 20, 20, 3)
  with torch.no_grad():
    vision = theirs.vision_model
    first = vision.pre_layrnorm(vision.embeddings(torch.from_numpy(nchw(x))))
    out = vision(torch.from_numpy(nchw(x)), output_hidden_states=True)
    pooled, projected = out.pooler_output, theirs.visual_projection(out.pooler_output)
  np.testing.assert_allclose(ours.image.embed_patches(x), first.numpy(), **CLOSE)
  states = ours.image.trunk.layer_states(ours.image.embed_patches(x))
  assert len(states) == len(out.hidden_states) - 1 == 3
  for ours_state, state in zip(states, out.hidden_states[1:]):
    np.testing.assert_allclose(ours_state, state.numpy(), **CLOSE)
  states = ours.image.hidden_states(x)
  np.testing.assert_allclose(ours.image.pool_tokens(states), pooled.numpy(), **CLOSE)
  np.testing.assert_allclose(ours.image(x), projected.numpy(), **CLOSE)


def test_text_tower(pair):
  theirs, ours = pair
  with torch.no_grad():
    ids = torch.from_numpy(IDS)
    out = theirs.text_model(ids, output_hidden_states=True)
    projected = theirs.text_projection(out.pooler_output)
  np.testing.assert_allclose(ours.text.embed_tokens(IDS), out.hidden_states[0].numpy(), **CLOSE)
  states = ours.text.trunk.layer_states(ours.text.embed_tokens(IDS), modeling.vit.causal_bias(7))
  for ours_state, state in zip(states, out.hidden_states[1:]):
    np.testing.assert_allclose(ours_state, state.numpy(), **CLOSE)
  tokens = ours.text.hidden_states(IDS)
  np.testing.assert_allclose(tokens, out.last_hidden_state.numpy(), **CLOSE)
  np.testing.assert_allclose(ours.text.pool_tokens(tokens, IDS), out.pooler_output.numpy(), **CLOSE)
  np.testing.assert_allclose(ours.text(IDS), projected.numpy(), **CLOSE)
  np.testing.assert_allclose(ours.text(IDS[:, :4])[0], projected[0].numpy(), **CLOSE)


def test_scores(pair):
  theirs, ours = pair
  x = data(3, 20, 20, 3, seed=1)
  with torch.no_grad():
    out = theirs(torch.from_numpy(IDS), torch.from_numpy(nchw(x)))
  image, text = ours.embed_images(x), ours.embed_texts(IDS)
  np.testing.assert_allclose(image, out.image_embeds.numpy(), **CLOSE)
  np.testing.assert_allclose(text, out.text_embeds.numpy(), **CLOSE)
  want = out.logits_per_image.numpy()
  np.testing.assert_allclose(ours.pair_logits(image @ text.T), want, **CLOSE)


def test_bfloat16_stays_near(pair):
  theirs, ours = pair
  source = reference.source(theirs, theirs.config.to_dict())
  params = convert.load_weights(source, ours.config, dtype=jnp.bfloat16)
  half = modules.bind_module(modeling.build_model, ours.config, params)
  assert half.scale.dtype == jnp.float32 and half.image.cls.dtype == jnp.bfloat16
  x = data(8, 20, 20, 3, seed=2)
  cosines = [(m.embed_images(x) @ m.embed_texts(IDS).T) for m in (ours, half)]
  assert cosines[1].dtype == jnp.float32
  assert np.abs(cosines[0] - cosines[1]).max() < 0.03


PROCESSORS = {
  'plain': {'size': {'shortest_edge': 20}},
  'half': {'size': {'shortest_edge': 20}, 'image_mean': [0.5] * 3, 'image_std': [0.5] * 3},
  'larger, bilinear': {'size': {'shortest_edge': 27}, 'resample': 2},
  'smaller, padded': {'size': {'shortest_edge': 15}, 'resample': 1},
  'squash': {'size': {'height': 20, 'width': 20}, 'do_center_crop': False},
  'squash, cut': {'size': {'height': 25, 'width': 25}},
  'no resize': {'do_resize': False},
  '-1 .. 1': {'size': {'shortest_edge': 20}, 'rescale_factor': 1 / 127.5, 'image_mean': [1.0] * 3},
  'bytes': {'size': {'shortest_edge': 20}, 'do_rescale': False, 'image_std': [100.0] * 3},
  'not normalised': {'size': {'shortest_edge': 20}, 'do_normalize': False},
}


@pytest.mark.parametrize('name', PROCESSORS)
def test_preprocessing_is_the_processor_s(name, tmp_path):
  """By the file that the processor saves, for sizes with every rest of the centre crop."""
  options = {'crop_size': {'height': 20, 'width': 20}} | PROCESSORS[name]
  processor = transformers.CLIPImageProcessorPil(**options)
  processor.save_pretrained(tmp_path)
  source = dataclasses.replace(source_of_arrays({}), folder=str(tmp_path))
  how = read_preprocessing(source, modeling.PREPROCESSING, 20, 'CLIPImageProcessor')
  # transformers' own crop, as in PickScore, where all else is as released
  how = dataclasses.replace(how, crop='transformers')
  c = modeling.Config(None, None, 8, image_size=20, patch=4, preprocessing=how)
  for shape in ((30, 30), (17, 23), (23, 18), (41, 64), (64, 37), (20, 20), (83, 121), (4, 90)):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    want = processor(Image.fromarray(picture), return_tensors='np')['pixel_values']
    have = modeling.preprocess(c, picture[None] / np.float32(255))
    np.testing.assert_allclose(nchw(have), want, atol=2e-5, err_msg=f'{shape}')


def open_names(state):
  """A state dict of transformers under the names of open_clip, written from open_clip's classes."""
  found, layers = {}, {}
  for name, value in state.items():
    side, _, rest = name.partition('_model.')
    lead = {'vision': 'visual.', 'text': ''}.get(side, '')
    if rest.startswith('encoder.layers.'):
      _, _, number, part = rest.split('.', 3)
      layers.setdefault(f'{lead}transformer.resblocks.{number}.', {})[part] = value
      continue
    table = {
      'embeddings.class_embedding': 'class_embedding', 'final_layer_norm.weight': 'ln_final.weight',
      'embeddings.patch_embedding.weight': 'conv1.weight', 'final_layer_norm.bias': 'ln_final.bias',
      'embeddings.position_embedding.weight': 'positional_embedding',
      'embeddings.token_embedding.weight': 'token_embedding.weight',
      'pre_layrnorm.weight': 'ln_pre.weight', 'pre_layrnorm.bias': 'ln_pre.bias',
      'post_layernorm.weight': 'ln_post.weight', 'post_layernorm.bias': 'ln_post.bias',
    }  # fmt: skip
    if rest:
      found[lead + table[rest]] = value
    elif name == 'logit_scale':
      found[name] = value
    else:
      key = {'visual_projection.weight': 'visual.proj', 'text_projection.weight': 'text_projection'}
      found[key[name]] = value.T
  for lead, parts in layers.items():
    for kind in ('weight', 'bias'):
      found[f'{lead}attn.in_proj_{kind}'] = torch.cat(
        [parts[f'self_attn.{p}_proj.{kind}'] for p in 'qkv']
      )
      found |= {
        f'{lead}attn.out_proj.{kind}': parts[f'self_attn.out_proj.{kind}'],
        f'{lead}ln_1.{kind}': parts[f'layer_norm1.{kind}'],
        f'{lead}ln_2.{kind}': parts[f'layer_norm2.{kind}'],
        f'{lead}mlp.c_fc.{kind}': parts[f'mlp.fc1.{kind}'],
        f'{lead}mlp.c_proj.{kind}': parts[f'mlp.fc2.{kind}'],
      }
  return found


def test_open_clip_layout(pair):
  theirs, ours = pair
  state = {k: v.numpy() for k, v in open_names(theirs.state_dict()).items()}
  golden = pathlib.Path(__file__).parents[1] / 'golden/clip_open.npz'
  with np.load(golden) as file:
    real = {k[7:] for k in file.files if k.startswith('params/')}
  shorter = lambda names: {n for n in names if 'resblocks' not in n or 'resblocks.0.' in n}
  assert shorter(state) == shorter(real)
  options = theirs.config.to_dict()
  for lead in ('', 'text.'):  # open_clip's newer models keep the text tower in one place
    mine = {
      n if n.startswith('visual.') or n == 'logit_scale' else lead + n: v for n, v in state.items()
    }
    source = source_of_arrays(mine, options)
    params = convert.load_weights(source, convert.config_of(source))
    jax.tree.map(np.testing.assert_array_equal, params, modules.split_module(ours)[1])
  mine |= {'input_resolution': np.array(20), 'context_length': np.array(7)}
  assert convert.config_of(source_of_arrays(mine)).image.act == 'quick_gelu'
  assert convert.config_of(source_of_arrays(state)).image.act == 'gelu'


def test_a_tower_alone(pair):
  theirs, ours = pair
  source = reference.source(theirs, theirs.config.to_dict())
  _, whole = modules.split_module(ours)
  for tower in modeling.PARTS:
    config = convert.config_of(source, tower)
    params = convert.load_weights(source, config)
    # the sizes of the tower that is left out do not count
    assert getattr(config, tower) == getattr(ours.config, tower)
    assert config.projection == ours.config.projection
    assert set(params) == {tower}
    jax.tree.map(np.testing.assert_array_equal, params[tower], whole[tower])
  options = theirs.config.vision_config.to_dict() | {'projection_dim': 12}
  alone = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**options))
  alone = reference.source(alone, options)
  config = convert.config_of(source, 'image')
  assert convert.config_of(alone, 'image') == config
  convert.load_weights(alone, config)


@pytest.mark.parametrize('name', [name for name in modeling.SIZES if name != 'tiny'])
def test_released_sizes_are_theirs(name):
  """On the meta device: the counts, the configs from headers, and every key of both layouts."""
  c = modeling.SIZES[name]
  trunk = lambda t: (t.width, t.layers, t.heads, t.hidden)
  released = config(
    c.image.act, image=trunk(c.image), text=trunk(c.text), image_size=c.image_size,
    patch_size=c.patch, vocab_size=c.vocab, length=c.length, to=c.projection,
  )  # fmt: skip
  with torch.device('meta'):
    theirs = transformers.CLIPModel(released)
  _, template = modules.abstract_module(lambda: modeling.build_model(c))
  assert modules.count_parameters(template) == sum(p.numel() for p in theirs.parameters())
  old = {f'{side}_model.embeddings.position_ids': torch.empty(9) for side in ('text', 'vision')}
  layouts = (theirs.state_dict() | old, open_names(theirs.state_dict()))
  for state, options in zip(layouts, ({}, {'quick_gelu': c.image.act == 'quick_gelu'})):
    source = header(state, options or released.to_dict())
    assert convert.config_of(source) == c
    assert convert.config_of(source, 'image') == modeling.part_of(c, 'image')
    check_table(source, template)


def header(state, options):
  """A `Source` that knows names and shapes, and reads zeros without memory."""
  shapes = {k: (tuple(v.shape), 'float32') for k, v in state.items()}
  read = lambda name: np.broadcast_to(np.float32(0), shapes[name][0])
  return Source('meta', shapes, read, options)


def check_table(source, template):
  """Every key is used or knowingly left, every parameter is filled: by names, nothing is read."""
  source = convert.fuse_projections(convert.stack_layers(source, 'layers|resblocks'))
  targets = [_match_rule(name, convert.RULES)[0] for name in source.tensor_names()]
  assert '' not in targets
  assert {t for t in targets if t} == set(flatten_tree(template))


@pytest.mark.parametrize('shape', [(64, 64), (300, 301), (512, 380), (33, 47)])
def test_hpsv2_s_own_preprocessing(shape):
  """hpsv2's transform: floats, the longer side to S with antialiasing, black around, normalised."""
  ver = components.load('verifiers.hpsv2', weights='random:b32')  # S = 224, as H/14
  picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  x = torch.from_numpy(nchw(picture[None] / np.float32(255)))
  scale = 224 / float(max(shape))
  new = tuple(round(side * scale) for side in shape)
  x = torch.nn.functional.interpolate(x, new, mode='bicubic', antialias=True)
  rest = [224 - side for side in new]
  x = torch.nn.functional.pad(
    x, (rest[1] // 2, rest[1] - rest[1] // 2, rest[0] // 2, rest[0] - rest[0] // 2)
  )
  mean, std = (torch.tensor(v)[:, None, None] for v in (modeling.MEAN, modeling.STD))
  have = ver.preprocess(picture[None] / np.float32(255))
  np.testing.assert_allclose(nchw(have), ((x - mean) / std).numpy(), atol=1e-4)


def test_aesthetic_head_is_the_published_module(tmp_path):
  """LAION's `MLP`: linear layers with dropout between, written out here."""
  layers = [(12, 1024), 0.2, (1024, 128), 0.2, (128, 64), 0.1, (64, 16), (16, 1)]
  made = [torch.nn.Dropout(x) if isinstance(x, float) else torch.nn.Linear(*x) for x in layers]
  theirs = torch.nn.ModuleDict({'layers': torch.nn.Sequential(*made)}).eval()
  state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
  write_weights(tmp_path / 'head.safetensors', state)
  place = str(tmp_path / 'head.safetensors')
  ver = components.load('verifiers.aesthetic', weights='random:tiny', head_weights=place)
  params = ver.load()
  params['head'] = ver._read_head(ver._head_shapes())
  pictures = np.random.default_rng(0).random((1, 3, 32, 32, 3), np.float32)
  want = theirs['layers'](torch.from_numpy(np.array(ver.embed_images(params, pictures))))
  have = ver.score(params, {}, {'image': pictures})['aesthetic_tiny_random']
  np.testing.assert_allclose(have, want.detach().numpy()[..., 0], **CLOSE)
