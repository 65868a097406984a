"""Classes by number or by name: the labels of prompts, and files of class names.

Letters: B prompts.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vtts_jax.data.prompts import read_lines
from vtts_jax.errors import ConfigError


def read_class_names(path, setting: str = 'class_names') -> tuple[str, ...]:
  """Reads the names of the classes 0, 1, 2 ... from the lines of a text file.

  Raises:
    ConfigError: there is no such file, a line between names is empty, or there are fewer than two
      names; the message names `setting`.
  """
  try:
    names = [line.strip() for line in read_lines(path)]
  except ConfigError as error:
    raise ConfigError(f'{setting}: {error}') from None
  # empty lines at the end name no class; one in between would shift all classes after it
  while names and not names[-1]:
    names.pop()
  if '' in names:
    line = names.index('') + 1
    raise ConfigError(f'{setting}={str(path)!r}: line {line} is empty; must name a class')
  if len(names) < 2:
    raise ConfigError(f'{setting}={str(path)!r}: must name two classes or more, one on each line')
  return tuple(names)


def class_labels(
  prompts: Sequence[Mapping[str, Any]], count: int, setting: str, names: Sequence[str] = ()
) -> np.ndarray:
  """Returns the labels `[B]` int32 in 0 .. count - 1 of prompt rows.

  A row's 'label' decides. A row without one has a text that is the name of a class or a number.

  Args:
    prompts: B rows.
    count: number of classes.
    setting: the setting that an error names.
    names: names of the classes in order. A name that two classes have (ImageNet has 'crane' twice)
      stands for neither.

  Raises:
    ConfigError: a prompt is no class; the message names the prompt and what is allowed.
  """
  labels = [_class_label(row, i, count, setting, names) for i, row in enumerate(prompts)]
  return np.array(labels, np.int32)


def _class_label(row, place, count, setting, names):
  label, text = row.get('label'), row.get('text')
  text = text.strip() if isinstance(text, str) else ''
  if label is None:
    # names come before numbers: a class may be called '7'
    if list(names).count(text) == 1:
      label = list(names).index(text)
    elif text not in names and text.isdecimal():
      label = int(text)
  # True is an int in Python, and would be class 1
  is_number = isinstance(label, int | np.integer) and not isinstance(label, bool)
  if is_number and 0 <= label < count:
    return int(label)
  said = f'label={label!r}' if row.get('label') is not None else repr(text)
  named = ', or a name that one class alone has' if names else ''
  raise ConfigError(
    f'{setting}: prompt {place} ({said}) is no class; must be in 0 .. {count - 1}{named}'
  )


def inception_outputs(path, setting: str = 'label_map') -> tuple[tuple[str, ...], np.ndarray]:
  """Finds ImageNet's classes among the outputs of InceptionV3 of 2015-12-05.

  Args:
    path: the file imagenet_2012_challenge_label_map_proto.pbtxt of inception-2015-12-05.tgz.

  Returns:
    The WordNet ids of the classes in ImageNet's order, and the network's output `[1000]` int32 of
    each class; the network has an order of its own.

  Raises:
    ConfigError: there is no such file, or it lacks some of ImageNet's classes; the message names
      `setting`.
  """
  try:
    text = '\n'.join(read_lines(path))
  except ConfigError as error:
    raise ConfigError(f'{setting}: {error}') from None
  entries = re.findall(r'target_class:\s*(\d+)\s*target_class_string:\s*"(n\d+)"', text)
  if len(entries) != 1000:
    raise ConfigError(
      f'{setting}={str(path)!r}: has {len(entries)} entries, must have the 1000 of ImageNet'
    )
  # ImageNet numbers its classes in the order of their ids
  outputs = {name: int(output) for output, name in entries}
  ids = tuple(sorted(outputs))
  return ids, np.array([outputs[name] for name in ids], np.int32)
