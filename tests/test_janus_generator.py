"""Janus as a generator: protocol, prompts, configs."""

import functools
import pathlib

import jax
import numpy as np
import pytest

from vtts_jax.cli import run
from vtts_jax.data import tokenizers
from vtts_jax.errors import ConfigError
from vtts_jax.generators.janus import TEMPLATES, TINY, Janus
from vtts_jax.study.arms import build_study
from vtts_jax.testing import laws

pytestmark = pytest.mark.usefixtures('host_weights')
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
tiny = functools.partial(Janus, **TINY, words=8)


def test_conformance():
  laws.check_generator(tiny(), ['a cat', 'two red dogs'], jax.random.key(3))


def test_prompts(monkeypatch):
  """Padding moves behind the words; the null prompt keeps the first and the last."""
  ids, mask = np.array([[2, 2, 5, 6, 7], [4, 5, 6, 7, 8]]), np.array([[0, 0, 1, 1, 1], [1] * 5])
  asked = []

  def tokenize_texts(texts, tokenizer, width, vocab, template, **options):
    asked.append((texts, tokenizer, width, template))
    return ids, mask

  monkeypatch.setattr(tokenizers, 'tokenize_texts', tokenize_texts)
  found = tiny().tokenize([{'text': 'a'}, {'text': 'b'}])
  np.testing.assert_array_equal(found['prompt'], [[5, 6, 7, 2, 2], [4, 5, 6, 7, 8]])
  np.testing.assert_array_equal(found['null'], [[5, 0, 7, 2, 2], [4, 0, 0, 0, 8]])
  np.testing.assert_array_equal(found['mask'], [[1, 1, 1, 0, 0], [1] * 5])
  assert asked == [(['a', 'b'], '', 8, TEMPLATES['pro'])]
  assert TEMPLATES['pro'].endswith('<|Assistant|>:<begin_of_image>')


def test_what_is_wrong_is_said():
  with pytest.raises(ConfigError, match=r"generator\.template='chat': must be one of pro, first"):
    tiny(template='chat')
  with pytest.raises(ConfigError, match=r'generator\.words=2: must be an integer >= 3'):
    Janus(**TINY, words=2)
  with pytest.raises(ConfigError, match=r'generator\.words=8: .* tokens'):
    tiny().tokenize([{'text': 'one two three four five six seven'}])


@pytest.mark.parametrize(('name', 'evals'), [('bon', 36), ('beam', 17), ('blocks', 72)])
def test_configs(name, evals):
  where = f'--config={CONFIGS}/janus_coco.py:{name}'
  (arm,) = build_study(run.read_config([f'{where},runlocal'])).arms
  assert arm.cost.generator == evals and arm.gen.check() is None
  assert run.read_config([f'{where},pro_7b'])['generator']['weights'].endswith('Janus-Pro-7B')
  with pytest.raises(ConfigError, match='must be one of bon, beam, blocks, then'):
    run.read_config([f'{where},imagenet'])
