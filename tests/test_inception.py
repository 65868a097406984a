"""InceptionV3 of FID: sizes, the two preprocessings, pools, the loader, and the two oracles."""

import dataclasses
import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from vtts_jax import components
from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.errors import ConfigError
from vtts_jax.metrics import fid as metric
from vtts_jax.metrics import inception
from vtts_jax.metrics import statistics as stats
from vtts_jax.models import modules
from vtts_jax.models.inception import convert, modeling
from vtts_jax.models.inception import replay as golden
from vtts_jax.testing import laws
from vtts_jax.verifiers import fid, inception_score

D, K = 30, 12
GOLDEN = pathlib.Path(__file__).parent / 'golden/inception_a.npz'


def squares(seed, *shape):
  """Pictures `[*shape, 20, 16, 3]` of large squares, which even a random network tells apart."""
  small = np.random.default_rng(seed).random((*shape, 5, 4, 3), np.float32)
  return small.repeat(4, -3).repeat(4, -2)


PICTURES = squares(0, 2, 3)


@functools.partial(jax.jit, static_argnums=0)
def run_score(ver, params, vctx, images):
  """The only score of a verifier `[B, M]`; compiled once for all tests."""
  return ver.score(params, vctx, {'image': images})[ver.names[0]]


def test_released_size():
  c = modeling.SIZES['inception_2015_12_05']
  _, params = modules.abstract_module(lambda: modeling.build_model(c))
  assert modules.count_parameters(params) == 23_833_744
  assert params['fc']['kernel'].shape == (2048, 1008)
  assert modeling.count_flops(c) == 11_426_464_960  # 5.7 G multiply-adds, as published


def test_pools_do_not_see_their_padding():
  x = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1) - 20
  flat = lambda y: np.asarray(y)[0, :, :, 0]
  assert flat(modeling.mean_pool(x))[0, 0] == x[0, :2, :2].mean()
  assert flat(modeling.mean_pool(x))[1, 3] == x[0, :, 2:].mean()
  assert flat(modeling.mean_pool(x))[1, 1] == x[0, :, :3].mean()
  assert flat(modeling.max_pool(x)).tolist() == [[-15, -14, -13, -13], *[[-11, -10, -9, -9]] * 2]
  y = np.arange(25, dtype=np.float32).reshape(1, 5, 5, 1)
  assert flat(modeling.halving_pool(y)).tolist() == [[12, 14], [22, 24]]


def test_preprocessings_by_hand():
  """Two pixels to four: torch's are at -1/4, 1/4, 3/4, 5/4, those of TensorFlow 1 at 0 .. 3/2."""
  line = np.array([0, 1], np.float32)
  assert (modeling._resize_matrix(2, 4, 'pytorch_fid').T @ line).tolist() == [0, 0.25, 0.75, 1]
  assert (modeling._resize_matrix(2, 4, 'tensorflow').T @ line).tolist() == [0, 0.5, 1, 1]
  tiny, white = modeling.SIZES['tiny'], np.ones((1, 7, 5, 3), np.float32)
  torch = modeling.preprocess(tiny, white)
  assert np.ptp(torch) == 0 and torch[0, 0, 0, 0] == 1
  assert modeling.preprocess(tiny, white, 'tensorflow')[0, 3, 3, 1] == 127 / 128


@pytest.fixture
def tensors():
  with np.load(GOLDEN) as file:
    config = json.loads(str(file['config']))
    return golden.unpack_tensors(file['params/flat'], config['names'])


def test_what_is_wrong_is_said(tensors):
  load = lambda values: convert.load_weights(source_of_arrays(values), modeling.Config(139, 7, 64))
  load(tensors | {'Mixed_5b.branch1x1.bn.num_batches_tracked': np.array(3)})
  lost = {k: v for k, v in tensors.items() if k != 'Mixed_6a.branch3x3.bn.running_var'}
  with pytest.raises(ValueError, match=r'without Mixed_6a\.branch3x3\.bn\.running_var'):
    load(lost)
  with pytest.raises(ValueError, match=r'unused by the model: extra'):
    load(tensors | {'extra': np.zeros(2)})
  with pytest.raises(ValueError, match='is the InceptionV3 of torchvision'):
    convert.config_of(source_of_arrays(tensors | {'AuxLogits.fc.weight': np.zeros(2)}))
  with pytest.raises(ValueError, match='has no InceptionV3'):
    convert.config_of(source_of_arrays({'x': np.zeros(2)}))
  with pytest.raises(ConfigError, match='side=74: at least 75'):
    modeling.Config(side=74)


# ---------------------------------------------------------------------------------------- oracles


def sets(n, seed=0):
  """Features and logits of n pictures kept, of a reference, and of 6 candidates, some far off."""
  rng = np.random.default_rng(seed)
  mix = rng.normal(size=(D, D)) * np.exp(-np.arange(D) / 6)
  draw = lambda n, shape: rng.gamma(shape, size=(n, D)) @ mix
  made = draw(6, 0.3) * np.linspace(0.5, 6, 6)[:, None]
  kept = stats.Statistics.of_batch(draw(n, 0.3), 2 * rng.normal(size=(n, K)))
  real = draw(100, 0.4)
  return kept, (real.mean(0), np.cov(real, rowvar=False)), made, 3 * rng.normal(size=(6, K))


@pytest.mark.parametrize('n', [2, 20, 2000])  # fewer than features, and many
def test_oracles_are_the_metrics_recomputed(n):
  """Against FID and IS of the set with one picture more, each from scratch in float64."""
  kept, real, made, logits = sets(n)
  now = metric.frechet_distance((kept.mu, kept.sigma), real)
  fids, scores = [], []
  for x, z in zip(made, logits):
    more = kept + stats.Statistics.of_batch(x[None], z[None])
    fids.append(now - metric.frechet_distance((more.mu, more.sigma), real))
    scores.append(more.log_is - kept.log_is)
  have = fid.fid_reduction(fid.tabulate_fid(kept, *real), made.astype(np.float32))
  np.testing.assert_allclose(have, fids, rtol=1e-4, atol=1e-5 * np.abs(fids).max())
  logs = jax.nn.log_softmax(logits.astype(np.float32))
  have = inception_score.log_is_gain(inception_score.tabulate_is(kept), logs)
  np.testing.assert_allclose(have, scores, rtol=1e-4, atol=1e-5 * np.abs(scores).max())


def test_oracles_on_statistics_files(tmp_path):
  """A reference of pytorch-fid, a running file of ours, the network's own features."""
  see = inception.compiled_network('random:tiny')  # of 8 bits, as its preprocessing rounds to
  bits = lambda x: np.rint(x * 255).astype(np.uint8)
  real, old = (see(bits(squares(seed, 9))) for seed in (1, 2))
  gauss = stats.Statistics.of_batch(*real)
  np.savez(tmp_path / 'real.npz', mu=gauss.mu, sigma=gauss.sigma)
  kept = stats.Statistics.of_batch(*old)
  kept.write_npz(tmp_path / 'kept.npz', 'pytorch_fid')
  files = {'running_from': str(tmp_path / 'kept.npz'), 'weights': 'random:tiny'}
  made = components.load('verifiers.fid', reference_from=str(tmp_path / 'real.npz'), **files)
  have = run_score(made, made.load(), {}, PICTURES)
  seen = see(bits(np.tile(PICTURES[0, :1], (9, 1, 1, 1))))
  new = stats.Statistics.of_batch(*(x[:1] for x in seen))
  score = lambda s: metric.frechet_distance((s.mu, s.sigma), (gauss.mu, gauss.sigma))
  np.testing.assert_allclose(have[0, 0], score(kept) - score(kept + new), rtol=1e-3)
  made = components.load('verifiers.inception_score', **files)
  assert made.tokenize([{'text': 'any words'}]) == {}
  have = run_score(made, made.load(), {}, PICTURES)
  np.testing.assert_allclose(have[0, 0], (kept + new).log_is - kept.log_is, rtol=1e-3)
  read = stats.Statistics.read_npz(tmp_path / 'kept.npz')
  np.testing.assert_allclose(read.sigma, kept.sigma, atol=1e-12)
  said = "preprocessing='tensorflow': .* was made with 'pytorch_fid'"
  with pytest.raises(ConfigError, match=said):
    components.load('verifiers.inception_score', preprocessing='tensorflow', **files).load()
  with pytest.raises(ConfigError, match='have no count, probs, plogp'):
    stats.Statistics.read_npz(tmp_path / 'real.npz')


@pytest.mark.parametrize('name', ['fid', 'inception_score'])
def test_conformance_and_bad_pixels(name):
  ver = components.load(f'verifiers.{name}', weights='random:tiny')
  prompts = [{'text': '3'}, {'text': 'a rare bird', 'label': 11}]
  laws.check_verifier(ver, prompts, PICTURES)
  broken = PICTURES.copy()
  broken[1, 2, 0, 0, 1] = np.nan
  bad = np.isnan(run_score(ver, ver.load(), ver.tokenize(prompts), broken))
  assert bad[1, 2] and bad.sum() == 1


def test_class_prompts(tmp_path):
  ver = components.load('verifiers.inception_score', weights='random:tiny')
  params, labels = ver.load(), ({'output': np.full(2, k, np.int32)} for k in range(12))
  every = [run_score(ver, params, vctx, PICTURES) for vctx in labels]
  np.testing.assert_allclose(np.exp(every).sum(0), 1, atol=1e-5)
  said = ver.tokenize([{'text': ' 11'}, {'text': 'a rare bird', 'label': 4}])
  assert said['output'].tolist() == [11, 4]
  # ImageNet's numbers and WordNet ids, through the file that says the network's own order
  entry = 'entry {\n  target_class: %d\n  target_class_string: "n%08d"\n}\n'
  order = np.random.default_rng(0).permutation(1000) + 1
  path = tmp_path / 'map.pbtxt'
  path.write_text('# map\n' + ''.join(entry % (o, 7 * i) for i, o in enumerate(order)))
  mapped = components.load('verifiers.inception_score', weights='random:tiny', label_map=str(path))
  said = mapped.tokenize([{'text': '0'}, {'text': 'n00000007'}, {'text': 'x', 'label': 999}])
  assert said['output'].tolist() == [order[0], order[1], order[999]]
  few = tmp_path / 'few.pbtxt'
  few.write_text(entry % (449, 1440764))
  with pytest.raises(ConfigError, match='label_map=.*has 1 entries, must have the 1000'):
    dataclasses.replace(mapped, label_map=str(few)).tokenize([{'text': '0'}])


def test_bad_settings():
  load = components.load
  with pytest.raises(ConfigError, match=r"prompt 1 \('a cat'\) is no class; must be in 0 .. 11"):
    ver = load('verifiers.inception_score', weights='random:tiny')
    ver.tokenize([{'text': '1'}, {'text': 'a cat'}])
  for given in ({'weights': 'random:x'}, {'preprocessing': 'pil'}, {'dtype': 'f'}):
    (setting,) = given
    with pytest.raises(ConfigError, match=f'verifier.{setting}='):
      load('verifiers.inception_score', **{'weights': 'random:tiny'} | given)
  with pytest.raises(ConfigError, match='both must name a file of statistics'):
    load('verifiers.fid', weights='inception.safetensors')
  for name in ('fid', 'inception_score'):
    with pytest.raises(ConfigError, match="verifier.weights='': must name the weights of 2015"):
      load(f'verifiers.{name}')
  kept = sets(5)[0]
  with pytest.raises(ConfigError, match='running_from has 30 features, reference_from has 4'):
    fid.tabulate_fid(kept, np.zeros(4), np.eye(4))
