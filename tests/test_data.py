"""Prompts, classes, references and tokens: what is read from files, and what is refused."""

import functools
import gzip
import json
import logging

import numpy as np
import pytest
from PIL import Image

from vtts_jax.data import classes, prompts, references, tokenizers
from vtts_jax.errors import ConfigError
from vtts_jax.models.dino import modeling as dino
from vtts_jax.models.dreamsim import modeling as dreamsim

# ------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize('name', ['p.txt', 'p.jsonl', 'p.txt.gz', 'p.jsonl.gz'])
def test_lines_end_at_newlines_only(tmp_path, name):
  """A byte order mark is no part of a prompt, and U+2028, U+2029, U+0085 do not end a line."""
  texts = ['a dog\u2028in the rain', 'a caf\u0085 table', 'two\u2029cats']
  lines = [json.dumps({'text': t}, ensure_ascii=False) if 'json' in name else t for t in texts]
  data = ('\r\n'.join(lines[:2]) + '\n\n' + lines[2] + '\n').encode('utf-8-sig')
  (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith('gz') else data)
  assert prompts.prompts(str(tmp_path / name)) == [{'text': t} for t in texts]
  assert len(prompts.prompts(str(tmp_path / name), count=2)) == 2


def test_rows_keep_what_they_say(tmp_path):
  """A file's own id is no key, GenEval's `prompt` is the text, files are beside the prompts."""
  rows = [
    {'id': 'a-001', 'prompt': 'a red circle', 'tag': 'colors', 'include': [{'class': 'circle'}]},
    {'id': 1, 'text': 'a dog', 'prompt': 'kept', 'reference': ['x/1.png', '/y/2.png'], 'label': 3},
    {'id': 1, 'text': 'a cat', 'reference': 'cats', 'image': 'cat.png'},
  ]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  at = lambda name: str(tmp_path / name)
  assert prompts.prompts(at('rows.jsonl')) == [
    {'file_id': 'a-001', 'text': 'a red circle', 'tag': 'colors', 'include': [{'class': 'circle'}]},
    {'file_id': 1, 'text': 'a dog', 'prompt': 'kept', 'reference': [at('x/1.png'), '/y/2.png'],
     'label': 3},
    {'file_id': 1, 'text': 'a cat', 'reference': at('cats'), 'image': at('cat.png')},
  ]  # fmt: skip
  assert prompts.prompts(texts=('a', 'b'), count=1) == [{'text': 'a'}]
  assert len(prompts.prompts('geneval')) == 553


@pytest.mark.parametrize(
  ('data', 'message'),
  [
    ('a dog\n'.encode('utf-16'), 'is UTF-16; save it as UTF-8'),
    (b'a caf\xe9 table\n', r'is not UTF-8 \(byte 5\); save it as UTF-8'),
    (b'{"text": 3}', "line 1: must be an object with a 'text'"),
    (b'{"text": "a"}\n{', 'line 2: '),
    (b'\n', r'count=0: must be in 0 \(all\) .. 0'),
  ],
)
def test_files_that_are_no_prompts(tmp_path, data, message):
  (tmp_path / 'p.jsonl').write_bytes(data)
  with pytest.raises(ConfigError, match=message):
    prompts.prompts(str(tmp_path / 'p.jsonl'))


def test_prompts_that_cannot_be():
  with pytest.raises(ConfigError, match='give one of the two'):
    prompts.prompts('geneval', ('a',))
  with pytest.raises(ConfigError, match='no such file; geneval is here without one'):
    prompts.prompts('/none.txt')
  with pytest.raises(ConfigError, match='count=3: must be in 0'):
    prompts.prompts(texts=('a', 'b'), count=3)


# ------------------------------------------------------------------------------------ classes


def test_labels_names_and_numbers(tmp_path):
  (tmp_path / 'names.txt').write_bytes(b'\xef\xbb\xbftench\r\ncrane\r\nred crane\r\ncrane\r\n\r\n')
  names = classes.read_class_names(tmp_path / 'names.txt')
  assert names == ('tench', 'crane', 'red crane', 'crane')
  rows = [{'text': ' tench '}, {'text': 'red crane'}, {'text': '1'}, {'text': 'x', 'label': 3},
          {'label': np.int64(0)}]  # fmt: skip
  found = classes.class_labels(rows, 4, 'verifier.class_names', names)
  assert found.dtype == np.int32 and found.tolist() == [0, 2, 1, 3, 0]
  for row, said in (
    ({'text': 'crane'}, "'crane'"), ({'text': '4'}, "'4'"), ({'text': '-1'}, "'-1'"),
    ({'text': 'a', 'label': 4}, 'label=4'), ({'text': '1', 'label': True}, 'label=True'),
    ({'text': '1', 'label': 'tench'}, "label='tench'"),
  ):  # fmt: skip
    with pytest.raises(ConfigError, match=rf'names: prompt 1 \({said}\) is no class; .*0 .. 3'):
      classes.class_labels([{'text': '0'}, row], 4, 'verifier.class_names', names)
  (tmp_path / 'gap.txt').write_text('a\n\nb\n')
  with pytest.raises(ConfigError, match=r'verifier.class_names=.*line 2 is empty'):
    classes.read_class_names(tmp_path / 'gap.txt', 'verifier.class_names')
  (tmp_path / 'one.txt').write_text('a\n')
  with pytest.raises(ConfigError, match='must name two classes or more'):
    classes.read_class_names(tmp_path / 'one.txt')


# ------------------------------------------------------------------------------------ references


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Pictures 1, 2, 10, one of them square, and a hidden one."""
  folder = tmp_path_factory.mktemp('pictures')
  rng = np.random.default_rng(0)
  for name, size in (('1', (40, 61)), ('2', (64, 64)), ('10', (40, 61)), ('.3', (9, 9))):
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f'{name}.png')
  return folder


def read(*rows, common='', most=3, side=16):
  fit = lambda picture: dreamsim.PREPROCESSING.fit_picture(picture, side)
  return references.read_references(rows, common, most, fit)


def test_a_prompts_own_references_and_those_for_all(folder):
  at = lambda i: str(folder / f'{i}.png')
  rows = {'reference': at(2)}, {'reference': [at(10), at(1)]}, {'text': 'none of its own'}
  found = read(*rows, common=str(folder))
  assert found['pictures'].shape == (3, 3, 16, 16, 3)
  assert found['mask'].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
  one, two, ten = found['pictures'][2]  # the folder, in natural order
  np.testing.assert_array_equal(found['pictures'][0, 0], two)
  np.testing.assert_array_equal(found['pictures'][1, :2], [ten, one])
  assert references.count_references('', 2) == 2
  assert references.count_references(str(folder), 2) == 3
  mean = references.mean_embedding(np.arange(8.0).reshape(1, 4, 2), np.array([[1, 0, 1, 0]]))
  assert mean.tolist() == [[2, 3]]


def test_references_as_the_pipelines_see_them(folder):
  """What PIL makes on the host is what `preprocess` makes in jit."""
  for family in (dino, dreamsim):
    how, side = family.fitting_of(None)
    fit = functools.partial(how.fit_picture, side=side)
    found = references.read_references([{}], str(folder), 3, fit)['pictures'][0]
    for picture, name in zip(found[:2], ('1', '2')):
      x = np.asarray(Image.open(folder / f'{name}.png'), np.float32) / 255
      same = family.preprocess(None, picture / np.float32(255), fitted=True)
      np.testing.assert_allclose(family.preprocess(None, x), same, atol=1e-6)


def test_references_that_cannot_be(folder, tmp_path):
  (tmp_path / 'bad.png').write_text('no picture')
  for row, common, said in (
    ({'text': 'a cat'}, '', r"prompt 0 \('a cat'\) has no 'reference', and verifier.references"),
    ({'reference': 'none.png'}, '', "prompt 0 .*: 'none.png' is no picture and no folder"),
    ({}, str(folder / 'none'), "verifier.references: .*none' is no picture"),
    ({'reference': str(folder)}, '', r'has 3 references; verifier.max_references=2 must be at l'),
    ({'reference': str(tmp_path / 'bad.png')}, '', r'bad\.png: cannot be read'),
  ):
    with pytest.raises(ConfigError, match=said):
      read(row, common=common, most=2)


# ------------------------------------------------------------------------------------ tokens


def test_hashed_words_are_padded_cut_or_refused(caplog):
  texts = ['a red cat', 'b ' * 9]
  with caplog.at_level(logging.WARNING):
    ids, mask = tokenizers.tokenize_texts(texts, '', 6, 30)
  assert '1 of 2 are longer than the 6 tokens' in caplog.text
  assert ids.shape == mask.shape == (2, 6) and mask.sum(1).tolist() == [5, 6]
  assert ids[0, 0] == 28 and ids[0, 4:].tolist() == [29, 0] and ids[1, 5] == 29
  assert ids[:, 1:4].min() >= 1 and ids[:, 1:4].max() <= 27
  same, _ = tokenizers.tokenize_texts(['red'], '', 6, 30)
  assert same[0, 1] == ids[0, 2]
  with pytest.raises(ConfigError, match=r"generator.words=6: 'b b .*' has 11 tokens"):
    tokenizers.tokenize_texts(texts, '', 6, 30, longer='error', setting='generator.words')
  with pytest.raises(ConfigError, match='prompt 1 is empty'):
    tokenizers.tokenize_texts(['a', ' '], '', 6, 30)
  ids, mask = tokenizers.tokenize_texts([''], '', 4, 30, allow_empty=True)
  assert ids.tolist() == [[28, 29, 0, 0]] and mask.tolist() == [[1, 1, 0, 0]]


def test_a_template_is_never_cut():
  ids, _ = tokenizers.tokenize_texts(['cat ' * 9], '', 8, 30, 'is {} there')
  plain, _ = tokenizers.tokenize_texts(['is cat cat cat cat there'], '', 8, 30)
  assert ids.tolist() == plain.tolist()
  with pytest.raises(ConfigError, match='verifier.length=3: too few tokens for any'):
    tokenizers.tokenize_texts(['cat'], '', 3, 30, 'is {} there')


@pytest.mark.parametrize(
  ('text', 'clean'),
  [
    ('a cat\u2019s red hat', "a cat's red hat"),
    ('a sign that says \u201cOPEN\u201d', 'a sign that says "OPEN"'),
    ('salt &amp; pepper', 'salt & pepper'),
    ('salt &amp;amp; pepper', 'salt & pepper'),
    ('\uff2e\uff25\uff2f\uff2e sign', 'NEON sign'),
    ('an o\ufb03ce', 'an office'),
    (' two\n lines\tof&nbsp;text ', 'two lines of text'),
    ('na\u00c3\u00afve', 'na\u00efve'),
  ],
)
def test_texts_are_cleaned_as_open_clip_does(text, clean):
  """No vocabulary of CLIP is at hand here: the clean text stands for its ids."""
  assert tokenizers.clean_text(text) == clean
  assert tokenizers.clean_text(clean) == clean
