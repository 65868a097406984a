"""Prompts as text towers read them: token ids and masks, padded, and cut with a warning."""

import bisect
import functools
import zlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from vtts_jax.errors import ConfigError


def tokens(
  texts: Sequence[str], place: str, length: int, vocab: int, template: str = '{}'
) -> tuple:
  """Ids and mask `[B, length]` int32 of the texts, padded as the tokenizer pads.

  Args:
    texts: prompts, none of them empty.
    place: folder or repository (`owner/name@revision`) with a tokenizer of transformers, or '' for
      random weights: words are hashed to 1 .. vocab - 3 between a start (vocab - 2) and an end
      (vocab - 1), and 0 pads.
    length: of the context. What is longer is cut, and one warning names the first such prompt.
    template: what a prompt is put into, at its '{}'. It is never cut itself: of a long prompt the
      end is left out.

  Raises:
    ConfigError: an empty prompt, or a template without room for any.
  """
  empty = [i for i, text in enumerate(texts) if not text.strip()]
  if empty:
    raise ConfigError(f'prompts: prompt {empty[0]} is empty; a text verifier must have words')
  split = _pretrained(place) if place else functools.partial(_hashed, vocab=vocab)
  read = lambda text: split(template.replace('{}', text), length)
  rows = [read(text) for text in texts]
  long = [(text, whole) for text, (_, _, whole) in zip(texts, rows) if whole > length]
  if long:
    logging.warning(
      'prompts: %d of %d are longer than the %d tokens that the verifier reads and are cut; the '
      'first has %d: %r', len(long), len(texts), length, long[0][1], long[0][0],
    )  # fmt: skip
  if template != '{}':
    rows = [
      r if r[2] <= length else read(_head(text, read, length)) for text, r in zip(texts, rows)
    ]
  return tuple(np.array([row[i] for row in rows], np.int32) for i in range(2))


def _head(text, read, length):
  """As much of the text's beginning as fits."""
  end = bisect.bisect_right(range(len(text)), length, key=lambda n: read(text[:n])[2]) - 1
  if end < 1:
    raise ConfigError(f'verifier.length={length}: too few tokens for any of {text!r}')
  return text[:end]


def _hashed(text, length, vocab):
  found = [1 + zlib.crc32(word.encode()) % (vocab - 3) for word in text.split()]
  whole, kept = len(found) + 2, found[: length - 2]
  ids, pad = [vocab - 2, *kept, vocab - 1], length - 2 - len(kept)
  return ids + [0] * pad, [1] * len(ids) + [0] * pad, whole


@functools.cache
def _pretrained(place):
  from transformers import AutoTokenizer

  name, _, revision = place.partition('@')
  tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or None)

  def split(text, length):
    whole = len(tokenizer(text, verbose=False).input_ids)
    row = tokenizer(text, truncation=True, max_length=length, padding='max_length')
    mask = row.get('attention_mask', [int(i != tokenizer.pad_token_id) for i in row.input_ids])
    return row.input_ids, mask, whole

  return split
