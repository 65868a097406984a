"""Texts as networks read them: padded token ids and masks; too long a text is cut or refused.

Letters: B texts · W tokens of a text.
"""

import bisect
import functools
import html
import os
import zlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from vtts_jax.errors import ConfigError


def tokenize_texts(
  texts: Sequence[str],
  tokenizer: str,
  width: int,
  vocab: int,
  template: str = '{}',
  *,
  longer: str = 'cut',
  allow_empty: bool = False,
  setting: str = 'verifier.length',
) -> tuple[np.ndarray, np.ndarray]:
  """Returns ids and mask `[B, W]` int32 of texts, padded to `width` as the tokenizer pads.

  Args:
    texts: B texts.
    tokenizer: folder, repository (`owner/name@revision`) or folder of one
      (`owner/name/tokenizer_2@revision`) with a tokenizer of transformers, or '' for random
      weights, which know no words (`hash_words`).
    width: W.
    vocab: the network's vocabulary; only the hashed ids depend on it.
    template: each text is put into its '{}'. The template itself is never cut: a long text loses
      its end.
    longer: what happens to a text of more than W tokens: 'cut', with one warning that names the
      first such text, or 'error'.
    allow_empty: whether a text may have no words (the null prompt of guidance has none).
    setting: the setting that says W, for errors.

  Raises:
    ConfigError: a text is empty or too long, or the template leaves no room for any text.
  """
  empty = [i for i, text in enumerate(texts) if not text.strip()]
  if empty and not allow_empty:
    raise ConfigError(f'prompts: prompt {empty[0]} is empty; a text verifier must have words')
  split = _open_tokenizer(tokenizer) if tokenizer else functools.partial(hash_words, vocab=vocab)

  def read_text(text):
    return split(template.replace('{}', text), width)

  rows = [read_text(text) for text in texts]
  long = [(text, length) for text, (_, _, length) in zip(texts, rows) if length > width]
  if long and longer == 'error':
    raise ConfigError(f'{setting}={width}: {long[0][0]!r} has {long[0][1]} tokens')
  if long:
    logging.warning(
      'prompts: %d of %d are longer than the %d tokens that are read and are cut; the first has '
      '%d: %r', len(long), len(texts), width, long[0][1], long[0][0],
    )  # fmt: skip
  # the tokenizer would cut the end of the template; instead the text inside it is shortened
  if long and template != '{}':
    rows = [
      row if row[2] <= width else read_text(_longest_head(text, read_text, width, setting))
      for text, row in zip(texts, rows)
    ]
  return tuple(np.array([row[i] for row in rows], np.int32).reshape(-1, width) for i in range(2))


def clean_text(text: str) -> str:
  """Cleans a text as OpenAI's CLIP and open_clip do before they split it into tokens.

  Typographic quotes, ligatures and full-width letters become plain (ftfy), HTML entities become
  their characters, twice, and spaces collapse. Capitals stay: CLIP's tokenizer lowers them itself.
  transformers does none of that, so a score that was published with it must not either.
  """
  # imported here, because most runs clean no text
  import ftfy

  text = ftfy.fix_text(text)
  # twice: captions from the web say '&amp;amp;'
  text = html.unescape(html.unescape(text))
  return ' '.join(text.split())


def _longest_head(text, read, width, setting):
  """Returns as much of the text's beginning as fits."""
  # more characters never give fewer tokens, near enough for a bisection
  end = bisect.bisect_right(range(len(text)), width, key=lambda n: read(text[:n])[2]) - 1
  if end < 1:
    raise ConfigError(f'{setting}={width}: too few tokens for any of {text!r}')
  return text[:end]


def hash_words(text: str, width: int, vocab: int) -> tuple[list[int], list[int], int]:
  """Returns (ids, mask, tokens before the cut) of a text by a hash of each word.

  Words have ids 1 .. vocab - 3, between a start (vocab - 2) and an end (vocab - 1); 0 pads.
  """
  # crc32 and not `hash`, which differs from process to process
  words = [1 + zlib.crc32(word.encode()) % (vocab - 3) for word in text.split()]
  kept = words[: width - 2]
  ids, padding = [vocab - 2, *kept, vocab - 1], [0] * (width - 2 - len(kept))
  return ids + padding, [1] * len(ids) + padding, len(words) + 2


@functools.cache
def _open_tokenizer(place):
  # imported here: random weights need no transformers
  from transformers import AutoTokenizer

  name, subfolder, revision = place, '', ''
  if not os.path.isdir(place) and not os.path.isabs(place):
    name, _, revision = place.partition('@')
    # 'owner/name/folder': what follows the repository
    owner, *rest = name.split('/')
    name, subfolder = '/'.join([owner, *rest[:1]]), '/'.join(rest[1:])
  tokenizer = AutoTokenizer.from_pretrained(
    name, revision=revision or None, subfolder=subfolder
  )

  def split_text(text, width):
    # the length before the cut, for the warning and for templates
    length = len(tokenizer(text, verbose=False).input_ids)
    row = tokenizer(text, truncation=True, max_length=width, padding='max_length')
    # CLIP's old tokenizer files give no mask: what is no padding is real
    mask = row.get('attention_mask', [int(i != tokenizer.pad_token_id) for i in row.input_ids])
    return row.input_ids, mask, length

  return split_text
