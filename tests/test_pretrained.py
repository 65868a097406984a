"""`Pretrained`: every family of `models/` keeps one contract, and what is wrong is said."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import vtts_jax.models
from vtts_jax.checkpoints.files import flatten_tree, write_weights
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules
from vtts_jax.models.pretrained import Pretrained, short_name

FOLDER = pathlib.Path(vtts_jax.models.__file__).parent
FAMILIES = sorted(path.parent.name for path in FOLDER.glob('*/convert.py'))


def smallest(family, **options):
  size = 'siglip_tiny' if family == 'siglip' else 'tiny'
  return Pretrained(family, f'random:{size}', **options)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_family_keeps_the_contract(family):
  """Sizes, parts, one signature of the loaders, random weights, and rules that name weights."""
  whole = smallest(family)
  load = inspect.signature(whole.convert.load_weights).parameters.values()
  assert [(p.name, p.kind.name[:10]) for p in load] == [
    ('source', 'POSITIONAL'), ('config', 'POSITIONAL'), ('dtype', 'KEYWORD_ON'),
    ('sharding', 'KEYWORD_ON'),
  ]  # fmt: skip
  read = list(inspect.signature(whole.convert.config_of).parameters.values())
  assert [p.name for p in read[:2]] == ['source', 'part'] and read[1].default == ''
  leaves = {}
  for part in ('', *getattr(whole.modeling, 'PARTS', ())):
    model = smallest(family, part=part, dtype='bfloat16')
    assert model.is_random and model.name.endswith('tiny_random')
    _, template = modules.structure_of(model.modeling.build_model, model.config)
    params = jax.eval_shape(model.load) if family != 'inception' else model.load()
    assert jax.tree.structure(params) == jax.tree.structure(template)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
    model.bind(template)
    leaves |= {k.replace('.', '/'): v for k, v in flatten_tree(template).items()}
  # each rule is needed, and splits an axis that the weight has
  for pattern, spec in whole.convert.SHARDING:
    found = [leaf for name, leaf in leaves.items() if re.search(pattern, name)]
    assert found or pattern.endswith('bias'), pattern  # not every size has biases
    assert all(leaf.ndim == len(spec) for leaf in found), pattern
    assert [axis for axis in spec if axis] == ['model']


def test_random_weights_are_the_same_at_every_call_and_bound():
  model = smallest('clip', part='image')
  first, again = model.load(), model.load()
  jax.tree.map(np.testing.assert_array_equal, first, again)
  pixels = model.modeling.preprocess(model.config, jnp.ones((2, 40, 48, 3)))
  found = jax.jit(lambda params: model.bind(params).embed_images(pixels))(first)
  np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)


def test_weights_are_placed_by_the_family_s_rules():
  """On any mesh; what it does not divide evenly is on every device."""
  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'model'), (AxisType.Auto,) * 2)
  model = smallest('clip')
  params, places = model.load(mesh), model.shardings(mesh)
  jax.tree.map(lambda x, place: x.sharding == place or pytest.fail(str(place)), params, places)
  block = places['image']['trunk']['blocks']
  assert block['ffn']['up']['kernel'].spec == PartitionSpec(None, None, 'model')
  assert block['ffn']['down']['bias'].spec == PartitionSpec()
  wide = jax.sharding.AbstractMesh((1, 5), ('data', 'model'))
  odd = {'up': jax.ShapeDtypeStruct((4, 12), 'f'), 'down': jax.ShapeDtypeStruct((10, 4), 'f')}
  rules = [('up', PartitionSpec(None, 'model')), ('down', PartitionSpec('model', None))]
  found = modules.shardings_by_rule(odd, wide, rules)
  assert [found[k].spec for k in ('up', 'down')] == [PartitionSpec(), PartitionSpec('model', None)]


def test_names():
  assert short_name('owner/dinov2-base@main') == 'dinov2_base'
  assert short_name('/models/my.clip.safetensors') == 'my_clip'
  assert short_name('owner/flan-t5@a1+openai/clip') == 'flan_t5'
  assert Pretrained('dino', 'x/y').size == '' and smallest('dino').size == 'tiny'


@pytest.mark.parametrize(
  ('family', 'weights', 'options', 'message'),
  [
    ('clip', '', {}, "weights='': must be owner/name@revision, .* random:SIZE .* tiny, b32"),
    ('clip', 'random:b17', {'setting': 'generator.text'},
     "generator.text='random:b17': must be a checkpoint or one of random:tiny, random:b32"),
    ('clip', 'x/y', {'dtype': 'int8'}, "verifier.dtype='int8': must be one of float32, bfloat16"),
    ('flextok', 'x/y', {'part': 'vae'}, "part='vae' of flextok: must be in .'encoder', 'decoder'"),
  ],
)  # fmt: skip
def test_settings_that_cannot_be(family, weights, options, message):
  with pytest.raises(ConfigError, match=message):
    Pretrained(family, weights, **options)


def test_checkpoints_that_cannot_be(tmp_path):
  model = Pretrained('dino', str(tmp_path / 'none'), setting='verifier.encoder')
  with pytest.raises(ConfigError, match=r"verifier.encoder='.*none': no weights at path="):
    _ = model.config
  write_weights(tmp_path / 'x.safetensors', {'w': np.zeros(1)})
  other = Pretrained('dino', str(tmp_path / 'x.safetensors'))
  with pytest.raises(ConfigError, match=r"verifier.weights='.*x\.safetensors': .* has no DINO"):
    other.load()
