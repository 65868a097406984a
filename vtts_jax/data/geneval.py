"""GenEval's prompts: what they ask for, with its classes, colours and relations.

Metadata says what a prompt asks for. `include` lists objects with their class, count and perhaps
colour and position, `exclude` lists what must not be there, `tag` is the category. A prompt row may
bring its metadata along; otherwise `parse_prompt` reads the sentence. The benchmark's sentences
follow a closed grammar of six templates (Ghosh et al. 2023, arXiv 2310.11513;
github.com/djghosh13/geneval, MIT licence), so `parse_prompt` gives what `evaluation_metadata.jsonl`
says in each of its 553 rows. Classes are COCO's in GenEval's words.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vtts_jax.errors import ConfigError

COLOURS = (
  'red', 'orange', 'yellow', 'green', 'blue', 'purple', 'pink', 'brown', 'black', 'white',
)  # fmt: skip
RELATIONS = ('left of', 'right of', 'above', 'below')
NUMBERS = ('two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten')
TAGS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
CLASSES = {  # name -> number in COCO's annotations, 1 .. 90 with gaps
  'person': 1, 'bicycle': 2, 'car': 3, 'motorcycle': 4, 'airplane': 5, 'bus': 6, 'train': 7,
  'truck': 8, 'boat': 9, 'traffic light': 10, 'fire hydrant': 11, 'stop sign': 13,
  'parking meter': 14, 'bench': 15, 'bird': 16, 'cat': 17, 'dog': 18, 'horse': 19, 'sheep': 20,
  'cow': 21, 'elephant': 22, 'bear': 23, 'zebra': 24, 'giraffe': 25, 'backpack': 27,
  'umbrella': 28, 'handbag': 31, 'tie': 32, 'suitcase': 33, 'frisbee': 34, 'skis': 35,
  'snowboard': 36, 'sports ball': 37, 'kite': 38, 'baseball bat': 39, 'baseball glove': 40,
  'skateboard': 41, 'surfboard': 42, 'tennis racket': 43, 'bottle': 44, 'wine glass': 46,
  'cup': 47, 'fork': 48, 'knife': 49, 'spoon': 50, 'bowl': 51, 'banana': 52, 'apple': 53,
  'sandwich': 54, 'orange': 55, 'broccoli': 56, 'carrot': 57, 'hot dog': 58, 'pizza': 59,
  'donut': 60, 'cake': 61, 'chair': 62, 'couch': 63, 'potted plant': 64, 'bed': 65,
  'dining table': 67, 'toilet': 70, 'tv': 72, 'laptop': 73, 'computer mouse': 74, 'tv remote': 75,
  'computer keyboard': 76, 'cell phone': 77, 'microwave': 78, 'oven': 79, 'toaster': 80,
  'sink': 81, 'refrigerator': 82, 'book': 84, 'clock': 85, 'vase': 86, 'scissors': 87,
  'teddy bear': 88, 'hair drier': 89, 'toothbrush': 90,
}  # fmt: skip
FORMS = (
  "'a photo of a dog', 'a photo of a dog and a cup', 'a photo of three dogs', 'a photo of a red "
  "dog', 'a photo of a dog left of a cup' or 'a photo of a red dog and a green cup', of COCO's "
  'classes'
)


def with_article(words: str) -> str:
  """Returns the words with their article: 'a dog', 'an orange'."""
  return f'an {words}' if words[0] in 'aeiou' else f'a {words}'


def plural_of(name: str) -> str:
  """Returns the plural as GenEval writes it: 'buses', and also 'benchs'."""
  return f'{name}es' if name.endswith('s') else f'{name}s'


# every noun phrase of the grammar -> (class, colour or None)
_PHRASES = {with_article(name): (name, None) for name in CLASSES} | {
  with_article(f'{colour} {name}'): (name, colour) for colour in COLOURS for name in CLASSES
}
_PLURALS = {plural_of(name): name for name in CLASSES}
_TWO_PHRASES = re.compile(f'(.+?) (and|{"|".join(RELATIONS)}) (.+)')


def metadata_of(prompts: Sequence[Mapping[str, Any]]) -> list[dict]:
  """Returns the metadata of each prompt row.

  A row with 'include' or 'exclude' is its own metadata; of any other the text is parsed.

  Raises:
    ConfigError: a prompt has neither metadata nor a text of GenEval's grammar.
  """
  return [
    dict(row) if row.get('include') or row.get('exclude') else parse_prompt(row.get('text', ''))
    for row in prompts
  ]


def parse_prompt(text: str) -> dict:
  """Parses a prompt into metadata {'tag', 'include', 'exclude' where counted, 'text'}.

  Raises:
    ConfigError: the prompt is not of GenEval's grammar.
  """
  found = re.fullmatch('a photo of (.+)', text)
  parsed = _parse_phrase(found[1]) if found else None
  if parsed is None:
    raise ConfigError(
      f'prompts: {text!r} is no prompt of GenEval; it must read like {FORMS}, or its row must have '
      "an 'include'"
    )
  tag, include, *exclude = parsed
  return {'tag': tag, 'include': include, **({'exclude': exclude} if exclude else {}), 'text': text}


def _parse_phrase(words):
  """Returns (tag, include, excluded entries ...) of a phrase; None if the grammar has no such."""
  # counting comes first: no class begins with a number
  number, _, many = words.partition(' ')
  if number in NUMBERS and many in _PLURALS:
    # 'three dogs' asks for three and forbids four
    name, count = _PLURALS[many], NUMBERS.index(number) + 2
    return 'counting', [_metadata_entry(name, None, count)], _metadata_entry(name, None, count + 1)
  if words in _PHRASES:
    name, colour = _PHRASES[words]
    return 'colors' if colour else 'single_object', [_metadata_entry(name, colour)]
  found = _TWO_PHRASES.fullmatch(words)
  if not found or found[1] not in _PHRASES or found[3] not in _PHRASES:
    return None
  (a, colour_a), (b, colour_b) = _PHRASES[found[1]], _PHRASES[found[3]]
  if found[2] != 'and':
    # the benchmark has no sentence with both a relation and a colour
    if colour_a or colour_b:
      return None
    # 'a cup left of a cow': the cow is entry 0, to which the cup's position refers
    return 'position', [_metadata_entry(b), {**_metadata_entry(a), 'position': [found[2], 0]}]
  # both objects have a colour, or neither has
  if bool(colour_a) != bool(colour_b):
    return None
  entries = [_metadata_entry(a, colour_a), _metadata_entry(b, colour_b)]
  return 'color_attr' if colour_a else 'two_object', entries


def _metadata_entry(name, colour=None, count=1):
  return {'class': name, 'count': count, **({'color': colour} if colour else {})}
