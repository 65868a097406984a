"""VAR: sizes, files, guidance, the generator; the golden file is replayed in test_replay.py."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from traced_flops import count_traced_flops

from vtts_jax import components, core
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.cli import run
from vtts_jax.engine.search import bill
from vtts_jax.errors import ConfigError
from vtts_jax.generators.var import TINY, VAR
from vtts_jax.models import modules
from vtts_jax.models.var import attention, convert, modeling
from vtts_jax.models.var_vq import convert as vq_convert
from vtts_jax.models.var_vq import modeling as vq_modeling
from vtts_jax.models.var_vq import pyramid
from vtts_jax.search.beam import Beam
from vtts_jax.study.arms import build_study
from vtts_jax.testing import laws, toys

pytestmark = pytest.mark.usefixtures('host_weights')
KEY = jax.random.key(5)
HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Drawn(VAR):
  """With weights drawn on the host: initialisers take seconds to compile."""

  def load(self):
    draw = np.random.default_rng(0).normal
    random = lambda leaf: jnp.asarray(0.3 * draw(size=leaf.shape), jnp.float32)
    parts = self.model_parts().items()
    shapes = {k: modules.structure_of(p.modeling.build_model, p.config)[1] for k, p in parts}
    return jax.tree.map(random, shapes)


@pytest.fixture(scope='module')
def golden():
  with np.load(HERE / 'golden/var_c_sharedaln.npz') as file:
    return {k: file[k] for k in file.files}


def take(golden, lead):
  return {k.removeprefix(lead): v for k, v in golden.items() if k.startswith(lead)}


def load(tensors, **options):
  source = source_of_arrays(tensors, {'num_heads': 4} | options, 'here')
  config = convert.config_of(source)
  return config, convert.load_weights(source, config)


# ------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
  ('name', 'count'),
  [('d16', 0.31e9), ('d20', 0.6e9), ('d24', 1.0e9), ('d30', 2.0e9), ('d36_512', 2.35e9)],
)
def test_released_sizes(name, count):
  config = modeling.SIZES[name]
  _, params = modules.structure_of(modeling.build_model, config)
  assert abs(modules.count_parameters(params) / count - 1) < 0.04
  assert config.ends[-1] == (2240 if config.shared_adaln else 680)


def test_phis_and_grids():
  config = vq_modeling.SIZES['256']
  assert config.downscale == 16 and config.grids[-1] == (16, 16)
  # as numpy rounds the ticks of the reference: scales 2 and 7 lie halfway between two of them
  assert [config.phi_of_scale(s) for s in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
  for weights in pyramid.WEIGHTS.values():
    np.testing.assert_allclose(weights(7, 4).sum(1), 1)
    np.testing.assert_allclose(weights(5, 5), np.eye(5), atol=1e-12)
  np.testing.assert_allclose(pyramid.area_weights(3, 2), [[0.5, 0.5, 0], [0, 0.5, 0.5]])
  # torch.nn.functional.interpolate of (0, 0, 1) to 6
  want = [0, -0.03515625, -0.10546875, 0.2265625, 0.7734375, 1.10546875]
  np.testing.assert_allclose(pyramid.cubic_weights(3, 6)[:, 2], want, atol=1e-6)
  np.testing.assert_allclose(pyramid.linear_weights(2, 4)[:, 1], [0, 0.25, 0.75, 1])


def test_flops_are_those_of_the_traced_program():
  gen = VAR(**TINY, top_k=6)
  params = jax.eval_shape(gen.load)
  rows = {'labels': jnp.array([3])}
  trace = lambda f, *args: count_traced_flops(jax.make_jaxpr(f)(*args).jaxpr)
  assert trace(gen.encode, params, rows) == gen.cost('encode').flops
  ctx = jax.eval_shape(gen.encode, params, rows)
  state = jax.eval_shape(lambda p, c: gen.init(p, c, jnp.zeros((1, 1), jnp.uint32)), params, ctx)
  for stage in (0, 1):
    step = functools.partial(gen.next_logits, stage=stage)
    assert trace(step, params, ctx, state) == gen.cost('extend', stage, 1).flops
  see = lambda p, c, s: gen.decode(p, c, s, 2)
  assert trace(see, params, ctx, state) == gen.cost('observe:image').flops
  read = lambda p, c, s: gen.prefill(p, c, s, 2)
  assert trace(read, params, ctx, state) == gen.cost('rebuild_cache', 2).flops


# ------------------------------------------------------------------------------------------- files


def test_a_part_read_as_another_one_is_seen(golden):
  config, params = load(take(golden, 'params/'))
  labels = golden['in/labels'].astype(np.int32)[:, None]

  @jax.jit
  def run_all(params, inputs):
    model = modules.bind_module(modeling.build_model, config, params)
    ctx = model.class_context(labels)
    cache = model.init_cache(ctx, 1)
    inputs = inputs.astype(ctx['start'].dtype)
    hidden, _ = model.feed_scales(ctx, cache, inputs[:, None], 0, 3)
    return model.token_logits(ctx, hidden)[:, 0, :, 0]

  want = golden['out/logits_cond']
  difference = lambda params: np.abs(run_all(params, golden['out/var_input']) - want).max()
  assert difference(params) < 1e-4
  # scale and shift of the head exchanged
  head = jax.tree.map(lambda x: x[..., ::-1, :], params['head_adaln'])
  assert difference(params | {'head_adaln': head}) > 0.3
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  found = run_all(low, golden['out/var_input'])
  assert found.dtype == jnp.float32 and 0 < np.abs(found - want).mean() < 0.05 * np.abs(want).mean()


def test_what_is_wrong_is_said(golden):
  tensors = take(golden, 'params/')
  with pytest.raises(ValueError, match='unused by the model: odd'):
    load(tensors | {'odd': np.zeros(2)})
  kept = {k: v for k, v in tensors.items() if k != 'blocks.1.ada_gss'}
  with pytest.raises(ValueError, match=r'has no blocks\.\*\.ada_gss for layers \[1\]'):
    load(kept)
  with pytest.raises(ValueError, match='here is no VAR: no word_embed.weight'):
    load({'x': np.zeros(1)})
  with pytest.raises(ConfigError, match='width=48: must be a multiple of heads=5'):
    load(tensors, num_heads=5)
  # a file without buffers needs the scales
  buffers = ('lvl_1L', 'attn_bias_for_masking')
  kept = {k: v for k, v in tensors.items() if k not in buffers}
  with pytest.raises(ValueError, match='neither lvl_1L nor the config tells patch_nums'):
    load(kept)
  assert load(kept, patch_nums=[1, 2, 4])[0] == load(tensors)[0]
  with pytest.raises(ValueError, match='no tokenizer of VAR: no decoder'):
    vq_convert.config_of(source_of_arrays({'x': np.zeros(1)}))
  # the decoder alone leaves the encoder's tensors
  source = source_of_arrays(take(golden, 'params_vae/'), {'patch_nums': (1, 2, 4)})
  config = vq_convert.config_of(source, 'decoder')
  assert vq_convert.load_weights(source, config).keys() == {
    'codebook', 'decoder', 'phis', 'post_quant_conv'
  }  # fmt: skip


def test_chunks_of_queries_change_nothing(monkeypatch):
  q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 1, 6, 2, 4)).astype(np.float32)
  q = q.swapaxes(2, 3)  # queries stand before the streams
  mask = np.tri(6, dtype=bool)
  want = attention.attend_in_chunks(q, k, v, mask)
  monkeypatch.setattr(attention, 'QUERIES', 2)
  np.testing.assert_allclose(attention.attend_in_chunks(q, k, v, mask), want, atol=1e-6)


# ------------------------------------------------------------------------------------ the generator


def test_the_generator_keeps_the_laws():
  laws.check_generator(Drawn(**TINY, top_k=6, top_p=0.9), [{'label': 3}, '2'], KEY)


def test_guidance_grows_with_the_scales():
  gen = VAR(**TINY, top_k=6)
  assert [gen._ramp(s) for s in range(2)] == [0.0, 1.5]
  assert gen.guidance_streams == ('prompt', 'null')
  assert VAR(**TINY, top_k=6, guidance=0.0).guidance_streams == ('prompt',)
  logits = jnp.array([[1.0, 2.0], [0.5, 4.0]])
  np.testing.assert_allclose(modeling.guide_logits(logits, 0.5), [1.25, 1.0])
  np.testing.assert_allclose(modeling.guide_logits(logits[:1], 0.5), [1.0, 2.0])


def test_a_beam_over_scales_and_its_bill():
  gen, ver = Drawn(**TINY, top_k=6), toys.Brightness()
  algo = Beam(width=2, branch=3, schedule='linear', size=1, lookahead=-1)
  costs = bill(algo, gen, ver)
  # children share the call at their parent: 2 beams, then 6 candidates are completed
  assert [cost.generator for cost in costs] == [2 + 6, 2]
  assert laws.counted_cost(algo, gen, ver, ['3'], KEY) == sum(costs, core.Cost())
  assert gen.outputs['image'] == core.Output('image', (4, 4, 3))
  assert components.load('generators.var', **TINY) == VAR(**TINY)
  mesh = jax.make_mesh((1, 1), ('data', 'model'))
  blocks = gen.shardings(mesh)['prior']['blocks']
  assert blocks['attn']['qkv']['kernel'].spec == PartitionSpec(None, None, None, 'model')


def test_settings_that_cannot_run():
  with pytest.raises(ConfigError, match=r'generator.top_k=900: must be in 0 \(off\) .. 16'):
    VAR(**TINY).check()
  with pytest.raises(ConfigError, match=r"generator\.weights='random:d99'"):
    VAR(weights='random:d99')
  with pytest.raises(ConfigError, match='has codebook_size=4096, the transformer wants 16'):
    VAR(weights='random:tiny', tokenizer_weights='random:256').check()
  with pytest.raises(ConfigError, match=r'prompt 1 \(label=5\) is no class; must be in 0 .. 4'):
    VAR(**TINY).tokenize([{'label': 3}, {'label': 5}])
  with pytest.raises(ConfigError, match='must be an integer for all candidates'):
    VAR(**TINY).extend({}, {}, None, KEY, jnp.int32(1), 1)


@pytest.mark.parametrize(('name', 'evals'), [('bon', 8), ('beam', 4), ('lookahead', 8)])
def test_configs_build_and_know_their_bill(name, evals):
  config = f'--config={HERE.parent}/configs/var_imagenet.py'
  (arm,) = build_study(run.read_config([f'{config}:{name},runlocal'])).arms
  assert arm.cost.generator == evals
  published = run.read_config([f'{config}:{name},clip,d36_512'])['generator']
  assert (published['weights'], published['top_k']) == ('var_d36.safetensors', 900)
  with pytest.raises(ConfigError, match='must be one of bon, beam, lookahead'):
    run.read_config([f'{config}:smc'])
