"""FID, Inception Score, precision and recall against other ways to compute them; the command."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import linalg

from vtts_jax.errors import ConfigError
from vtts_jax.metrics import fid, inception
from vtts_jax.metrics.statistics import Statistics

D = 60


def features(n, seed, shape=0.3):
  """`[n, D]`, not negative and correlated, with a spectrum that falls fast."""
  rng = np.random.default_rng(seed)
  mix = np.abs(np.random.default_rng(9).normal(size=(D, D))) * np.exp(-np.arange(D) / 15)
  return rng.gamma(shape, size=(n, D)) @ mix


def gauss(x):
  return x.mean(0), np.cov(x, rowvar=False)


@pytest.mark.parametrize(('n', 'm'), [(400, 300), (D, D + 1), (25, 400), (30, 20), (2, 3)])
@pytest.mark.parametrize('kind', [np.float64, np.float32])
def test_frechet_of_few_and_many(n, m, kind):
  """For sets the trace of the root is the nuclear norm of the product of the centred samples, which
  needs no root of a singular matrix; with more samples than features scipy's sqrtm agrees too."""
  x, y = features(n, 1), features(m, 2, 0.4)
  (a, s), (b, t) = gauss(x), gauss(y)
  nuclear = linalg.svdvals((x - a) @ (y - b).T).sum() / np.sqrt((n - 1) * (m - 1))
  rest = np.sum((a - b) ** 2) + np.trace(s) + np.trace(t)
  have = fid.frechet_distance((a.astype(kind), s.astype(kind)), (b.astype(kind), t.astype(kind)))
  np.testing.assert_allclose(have, rest - 2 * nuclear, rtol=1e-6 if kind is np.float64 else 1e-3)
  if min(n, m) > D + 1 and kind is np.float64:
    np.testing.assert_allclose(have, rest - 2 * np.trace(linalg.sqrtm(s @ t)).real, rtol=1e-6)


def test_frechet_by_hand():
  a, b = (np.zeros(2), np.diag([4.0, 9.0])), (np.array([3.0, 4.0]), np.diag([1.0, 16.0]))
  assert fid.frechet_distance(a, b) == pytest.approx(25 + (2 - 1) ** 2 + (3 - 4) ** 2)
  assert fid.frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
  with pytest.raises(ValueError, match=r'\(2,\) features against \(3,\)'):
    fid.frechet_distance(a, (np.zeros(3), np.eye(3)))


def test_statistics_of_shards_add_up(tmp_path):
  x, z = features(50, 3), np.random.default_rng(4).normal(size=(50, 7))
  whole = Statistics.of_batch(x, z)
  a, b, c = (Statistics.of_batch(x[i], z[i]) for i in (slice(0, 7), slice(7, 8), slice(8, 50)))
  for sums in ((a + b) + c, c + (b + a), whole + Statistics.of_batch(x[:0], z[:0])):
    assert sums.count == 50
    np.testing.assert_allclose(sums.mu, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(sums.sigma, np.cov(x, rowvar=False), atol=1e-9)
  a.write_npz(tmp_path / 'a.npz')
  both = Statistics.read_npz(tmp_path / 'a.npz') + (b + c)
  np.testing.assert_allclose(both.outer, whole.outer, rtol=1e-12)
  assert both.log_is == pytest.approx(whole.log_is, abs=1e-12)
  assert np.exp(whole.log_is) == pytest.approx(fid.inception_score(z, 1)[0])
  with pytest.raises(ValueError, match='do not add'):
    whole + Statistics.of_batch(x[:, 1:], z)
  with pytest.raises(ValueError, match='a covariance needs 2 pictures, there are 1'):
    _ = b.sigma
  with pytest.raises(ValueError, match=r'picture 2 \(1 of 3\) are not finite'):
    Statistics.of_batch(np.array([[1.0], [2.0], [np.nan]]), np.zeros((3, 2)))


def test_inception_score_by_hand():
  # files in the order of classes: in consecutive splits every picture would be of one class
  classes = np.repeat(np.log(np.eye(10) + 1e-30), 100, axis=0)
  assert fid.inception_score(classes, 10)[0] > 9
  sure = np.log(np.array([[1.0, 1e-30], [1e-30, 1.0]]))
  assert fid.inception_score(sure, 1)[0] == pytest.approx(2)  # two classes, both sure
  assert fid.inception_score(sure, 2) == pytest.approx((1, 0))  # alone nothing is varied
  rng = np.random.default_rng(5)
  z = rng.normal(size=(23, 6))
  p = (np.exp(z) / np.exp(z).sum(1, keepdims=True))[np.random.RandomState(2020).permutation(23)]
  parts = [p[:7], p[7:15], p[15:]]  # 23 in three: bounds i * 23 // 3
  want = [np.exp(np.mean([np.sum(r * np.log(r / q.mean(0))) for r in q])) for q in parts]
  assert fid.inception_score(z, 3) == pytest.approx((np.mean(want), np.std(want)))
  with pytest.raises(ConfigError, match=r'splits=24: must be 1 \.\. 23'):
    fid.inception_score(z, 24)


@pytest.mark.parametrize('chunk', [5, 1000])
def test_precision_recall_one_by_one(chunk):
  real, made = features(40, 6)[:, :4], 0.7 * features(31, 7)[:, :4] + 0.1

  def covered(points, centres, k):
    hit = []
    for p in points:
      reach = [sorted(np.linalg.norm(c - o) for o in centres)[k] for c in centres]
      hit.append(any(np.linalg.norm(p - c) <= r for c, r in zip(centres, reach)))
    return np.mean(hit)

  want = covered(made, real, 3), covered(real, made, 3)
  assert min(want) > 0 and max(want) < 1 and want[0] != want[1]
  assert fid.precision_recall(real, made, 3, chunk) == pytest.approx(want)
  assert fid.precision_recall(real, real) == (1, 1)
  assert fid.precision_recall(real, real + 100) == (0, 0)
  with pytest.raises(ConfigError, match='k=31: must be below 31'):
    fid.precision_recall(real, made, 31)


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
  """A folder of pictures of two sizes, and a batch file of others."""
  root = tmp_path_factory.mktemp('sets')
  rng = np.random.default_rng(8)
  (root / 'made/more').mkdir(parents=True)
  for i in range(7):
    shape = (16, 16, 3) if i < 4 else (12, 20, 3)
    image = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
    image.save(root / 'made' / ('more' if i == 5 else '') / f'{i}.png')
  np.savez(root / 'real.npz', arr_0=rng.integers(0, 200, (6, 16, 16, 3), np.uint8))
  return root


def test_sizes_that_take_turns_share_batches():
  """Four full batches and two half ones, and every picture in its place."""
  ran = []
  def network(rows):
    ran.append(rows.shape)
    return rows[:, 0, 0, :1], rows[:, 0, 0, 1:]

  pictures = [np.full((2 + i % 2, 3, 3), i, np.uint8) for i in range(20)]
  features, logits = inception.extract_features(pictures, network, 4)
  assert len(ran) == 6 and {shape[0] for shape in ran} == {4}
  np.testing.assert_array_equal(features[:, 0], np.arange(20))
  np.testing.assert_array_equal(logits[:, 1], np.arange(20))


def run(capsys, *args):
  code = fid.main([str(a) for a in args])
  out, err = capsys.readouterr()
  return (json.loads(out.splitlines()[-1]), out + err) if code == 0 else err


def test_command(sets, capsys):
  flags = ('--weights=random:tiny', '--batch=4', '--splits=1')
  both, table = run(capsys, sets / 'made', sets / 'real.npz', *flags, f'--save={sets}/made.npz')
  for name in ('FID', 'Inception Score', 'precision', 'recall', '7 against 6 pictures'):
    assert name in table
  assert 'warning: 6 pictures are too few for a covariance of' in table
  network = inception.compiled_network('random:tiny')
  made, real = (
    inception.extract_features(inception.read_pictures(sets / name), network, 4)
    for name in ('made', 'real.npz')
  )
  assert made[0].shape[0] == 7 and both['count'] == 7
  want = fid.frechet_distance(gauss(made[0]), gauss(real[0]))
  assert both['fid'] == pytest.approx(want, rel=1e-4)
  assert both['inception_score'] == pytest.approx(fid.inception_score(made[1], 1)[0], rel=1e-5)
  pair = fid.precision_recall(real[0], made[0])
  assert (both['precision'], both['recall']) == pytest.approx(pair)
  mu, sigma = gauss(real[0])  # as pytorch-fid writes them
  np.savez(sets / 'stats.npz', mu=mu, sigma=sigma)
  kept, _ = run(capsys, sets / 'made.npz', sets / 'stats.npz')  # statistics alone: no network
  assert kept['fid'] == pytest.approx(both['fid'], rel=1e-5)
  assert kept['inception_score'] == pytest.approx(both['inception_score'], rel=1e-5)
  assert kept['precision'] is None and kept['reference_count'] is None


def test_command_says_what_is_wrong(sets, capsys):
  (sets / 'bad').mkdir()
  (sets / 'bad/x.png').write_bytes(b'no picture')
  (sets / 'none').mkdir()
  np.savez(sets / 'other.npz', x=np.zeros(3))
  np.savez(sets / 'odd.npz', mu=np.zeros(3), sigma=np.eye(4))
  real, tiny = sets / 'real.npz', '--weights=random:tiny'
  for args, said in (
    ((sets / 'made', real), "--weights='': must name the weights of 2015-12-05"),
    ((sets / 'bad', real, tiny), 'cannot be read as a picture'),
    ((sets / 'none', real, tiny), 'has no pictures (.png'),
    ((sets / 'gone', real, tiny), 'no pictures at'),
    ((sets / 'other.npz', real, tiny), 'is no .npz with arr_0'),
    ((sets / 'odd.npz', real, tiny), 'mu (3,) and sigma (4, 4) do not fit'),
    ((sets / 'bad/x.png', real, tiny), 'is no .npz of arrays'),
    ((real, real, tiny, '--preprocessing=pil'), "--preprocessing='pil': must be one of"),
  ):
    assert said in run(capsys, *args)
