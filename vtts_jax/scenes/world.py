"""The scene world: 32x32 pictures of coloured shapes, captions in GenEval's six categories.

A deliberately clean world, so that small models learn it in CPU minutes: five shapes, eight
colours, two sizes, a flat grey ground, one to four objects with centres on a 6 x 6 lattice of 4
pixels and gaps of at least 2 pixels. A caption describes the complete scene in GenEval's grammar
and its metadata is GenEval's (github.com/djghosh13/geneval, `evaluation_metadata.jsonl`). What a
caption leaves open is drawn at random: position and size always, colour in four of the six
categories (the objects of a counting scene share both).

Everything is a pure function of (seed, index): `sample_scenes(0, range(10, 20))` is rows
10..19 of `sample_scenes(0, range(100))`.

Splits hold out *combinations*: prefix-shape pairs (single_object), shape pairs (two_object),
shape-count pairs (counting), colour-shape pairs (colors), relation triples (position), attribution
quadruples (color_attr). A training caption holds no held-out combination of any category (a
prefix-shape pair concerns single_object only); a held-out caption is new in its own category's way.

Letters: R rows (scenes) · O = 4 object slots · Tt = 12 text tokens.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from vtts_jax.errors import ConfigError

SIZE = 32
SHAPES = ('circle', 'square', 'triangle', 'cross', 'ring')
PLURALS = ('circles', 'squares', 'triangles', 'crosses', 'rings')
PALETTE = {  # GenEval's names
  'red': (0.90, 0.10, 0.10), 'orange': (1.00, 0.55, 0.05), 'yellow': (1.00, 0.95, 0.15),
  'green': (0.10, 0.70, 0.15), 'blue': (0.10, 0.25, 0.95), 'purple': (0.62, 0.12, 0.80),
  'black': (0.02, 0.02, 0.02), 'white': (1.00, 1.00, 1.00),
}
COLOURS = tuple(PALETTE)
GROUND = 0.5
RADII = (4.0, 5.0)  # pixels
LATTICE = tuple(range(6, 27, 4))  # centres, pixels from the top left
SEPARATION = 12  # the largest of |dx|, |dy| between two centres: 2 + 2 * max(RADII)
TAGS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
RELATIONS = ('left of', 'right of', 'above', 'below')
NUMBERS = ('one', 'two', 'three', 'four')
PREFIXES = ('a photo of', 'a picture of', 'an image of', 'a drawing of', 'a painting of',
            'a sketch of', 'a print of', 'an illustration of')
SPLITS = ('train', 'held')
ASPECTS = ('shape', 'colour', 'count', 'relation', 'swap')
SLOTS, TEXT_LENGTH, PAD = 4, 12, 0
VOCABULARY = ('<pad>', *sorted({
  w for p in (*PREFIXES, *RELATIONS, *SHAPES, *PLURALS, *COLOURS, *NUMBERS[1:], 'and')
  for w in p.split()}))
_WORDS = {w: i for i, w in enumerate(VOCABULARY)}
_INK = np.array(list(PALETTE.values()), np.float32)  # [8, 3]


class Captions(NamedTuple):
  """What is said. Integer arrays `[R]`; a field a category does not use is 0 (`count`: 1).

  `A relation B`, `colour_a A and colour_b B`, `count A`: indices into the tuples above.
  """
  tag: np.ndarray
  prefix: np.ndarray
  a: np.ndarray
  b: np.ndarray
  colour_a: np.ndarray
  colour_b: np.ndarray
  count: np.ndarray
  relation: np.ndarray

  def take(self, rows):
    return Captions(*(f[rows] for f in self))


class Scenes(NamedTuple):
  """What is shown. Per object slot `[R, O]`: shape, colour, size, place; `[R]`: count of objects.

  `place` is row * 6 + column on the lattice; slots past `count` are meaningless.
  """
  captions: Captions
  count: np.ndarray
  shape: np.ndarray
  colour: np.ndarray
  size: np.ndarray
  place: np.ndarray


# ---- counters -> random numbers
def _bits(seed, index, lane):
  """splitmix64 of (seed, index, lane): `[...]` uint64, the only source of randomness here."""
  with np.errstate(over='ignore'):
    x = np.asarray(index, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = x ^ (np.uint64(seed) * np.uint64(0xD1B54A32D192ED03))
    for add in (np.asarray(lane, np.uint64) + np.uint64(1), np.uint64(0x2545F4914F6CDD1D)):
      x = x + add * np.uint64(0x9E3779B97F4A7C15)
      x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      x = x ^ (x >> np.uint64(31))
  return x


def _draw(seed, index, lane, n):
  """Integers in [0, n), n may be an array."""
  unit = (_bits(seed, index, lane) >> np.uint64(11)).astype(np.float64) * 2.0**-53
  return np.minimum((unit * n).astype(np.int64), np.asarray(n) - 1)


# ---- the splits
_HELD_PREFIX = np.zeros((len(PREFIXES), 5), bool)  # [prefix, shape]
for _p in range(len(PREFIXES)):
  _HELD_PREFIX[_p, [(2 * _p) % 5] + ([(2 * _p + 1) % 5] if _p % 4 == 0 else [])] = True
_HELD_PAIR = np.zeros((5, 5), bool)  # circle-cross, square-ring
for _a, _b in ((0, 3), (1, 4)):
  _HELD_PAIR[_a, _b] = _HELD_PAIR[_b, _a] = True
_HELD_COUNT = np.zeros((5, 5), bool)  # [shape, count]
_HELD_COUNT[[0, 2, 3], [3, 2, 4]] = True
_HELD_COLOUR = np.zeros((5, 8), bool)  # [shape, colour]
_HELD_COLOUR[[(2 * c + 1) % 5 for c in range(8)], range(8)] = True


def _canonical(c):
  """One integer per meaning: `A left of B` = `B right of A`, `x A and y B` = `y B and x A`."""
  turned = np.where(c.tag == 4, c.relation % 2 == 1, (c.tag == 5) & (c.a > c.b))
  a, b = np.where(turned, c.b, c.a), np.where(turned, c.a, c.b)
  x, y = np.where(turned, c.colour_b, c.colour_a), np.where(turned, c.colour_a, c.colour_b)
  return ((((c.tag * 5 + a) * 5 + b) * 8 + x) * 8 + y) * 4 + c.relation // 2 * 2


def caption_splits(captions):
  """`[R]`: 0 training, 1 held out, 2 in neither (new in more than one way, so used nowhere)."""
  c = captions
  pair = np.isin(c.tag, (1, 4, 5)) & _HELD_PAIR[c.a, c.b]
  colour = ((c.tag == 3) | (c.tag == 5)) & _HELD_COLOUR[c.a, c.colour_a]
  colour |= (c.tag == 5) & _HELD_COLOUR[c.b, c.colour_b]
  chosen = _draw(77, _canonical(c), 0, 5) == 0  # a fifth of relation triples and quadruples
  own = np.select([c.tag == t for t in range(6)], [
    _HELD_PREFIX[c.prefix, c.a], pair, _HELD_COUNT[c.a, c.count], colour, chosen, chosen])
  other = ((c.tag >= 4) & pair) | ((c.tag == 5) & colour)
  return np.where(other, 2, own.astype(np.int64))


@functools.cache
def list_captions(tag, split):
  """Every caption of one category and split, as `Captions`."""
  _check('tag', tag, TAGS), _check('split', split, SPLITS)
  t, one, z = TAGS.index(tag), (1,), (0,)
  s, k, p = range(5), range(8), range(len(PREFIXES))
  axes = {  # prefix, a, b, colour_a, colour_b, count, relation
    'single_object': (p, s, z, z, z, one, z), 'two_object': (p, s, s, z, z, one, z),
    'counting': (p, s, z, z, z, (2, 3, 4), z), 'colors': (p, s, z, k, z, one, z),
    'position': (p, s, s, z, z, one, range(4)), 'color_attr': (p, s, s, k, k, one, z)}[tag]
  rows = np.array(list(itertools.product(*axes)))
  if tag in ('two_object', 'position', 'color_attr'):
    rows = rows[rows[:, 1] != rows[:, 2]]
  if tag == 'color_attr':
    rows = rows[rows[:, 3] != rows[:, 4]]
  captions = Captions(np.full(len(rows), t), *rows.T)
  return captions.take(caption_splits(captions) == SPLITS.index(split))


# ---- captions
def draw_captions(seed, index, split='train'):
  """Captions of rows `index [R]`: a category uniformly, then one of its captions uniformly."""
  index = np.asarray(index)
  tag = _draw(seed, index, 0, 6)
  out = np.zeros((8, len(index)), np.int64)
  for t, name in enumerate(TAGS):
    rows = np.flatnonzero(tag == t)
    table = list_captions(name, split)
    out[:, rows] = np.stack(table)[:, _draw(seed, index[rows], 1, len(table.tag))]
  return Captions(*out)


def _article(word):
  return ('an ' if word[0] in 'aeiou' else 'a ') + word


def caption_texts(captions):
  """The sentences, a list of R strings."""
  return [_text(*row) for row in zip(*(f.tolist() for f in captions))]


def _text(tag, prefix, a, b, colour_a, colour_b, count, relation):
  one, other = SHAPES[a], SHAPES[b]
  if tag in (3, 5):
    one, other = f'{COLOURS[colour_a]} {one}', f'{COLOURS[colour_b]} {other}'
  first = f'{NUMBERS[count - 1]} {PLURALS[a]}' if tag == 2 else _article(one)
  join = {1: ' and ', 4: f' {RELATIONS[relation]} ', 5: ' and '}.get(tag)
  return f'{PREFIXES[prefix]} {first}' + (join + _article(other) if join else '')


def caption_prompts(captions):
  """R prompt rows with GenEval's metadata; in `position` the thing referred to comes first."""
  out = []
  for text, tag, a, b, x, y, n, r in zip(caption_texts(captions), *(
      f.tolist() for f in captions._replace(prefix=captions.tag)[1:])):
    one = lambda shape, **more: {'class': SHAPES[shape], 'count': 1, **more}
    entry = {'tag': TAGS[tag], 'include': [one(a)]}
    if tag == 1:
      entry['include'] = [one(a), one(b)]
    elif tag == 2:
      entry['include'] = [{'class': SHAPES[a], 'count': n}]
      entry['exclude'] = [{'class': SHAPES[a], 'count': n + 1}]
    elif tag == 3:
      entry['include'] = [one(a, color=COLOURS[x])]
    elif tag == 4:
      entry['include'] = [one(b), one(a, position=[RELATIONS[r], 0])]
    elif tag == 5:
      entry['include'] = [one(a, color=COLOURS[x]), one(b, color=COLOURS[y])]
    out.append({'text': text, **entry})
  return out


def tokenize_texts(texts):
  """Words to ids, `[R, 12]` int32, padded with 0; the empty text is the null prompt.

  Raises:
    ConfigError: a word outside the closed vocabulary, or more than 12 words.
  """
  ids = np.full((len(texts), TEXT_LENGTH), PAD, np.int32)
  for row, text in enumerate(texts):
    words = text.lower().replace('.', '').replace(',', '').split()
    unknown = [w for w in words if w not in _WORDS]
    if unknown:
      raise ConfigError(f'prompt {text!r}: word {unknown[0]!r} is not in the scene world; '
                        f'allowed words: {", ".join(VOCABULARY[1:])}')
    if len(words) > TEXT_LENGTH:
      raise ConfigError(f'prompt {text!r} has {len(words)} words; at most {TEXT_LENGTH} fit')
    ids[row, :len(words)] = [_WORDS[w] for w in words]
  return ids


def prompts(split='held', count=240, seed=0):
  """A fixed balanced list: `count / 6` prompt rows per category, categories in turn.

  Within a category prompts are distinct until it is used up, then they repeat (held-out sizes: 10,
  32, 24, 64, 112, 1056).
  """
  if count < 1 or count % 6:
    raise ConfigError(f'count={count}: give a positive multiple of 6 (the categories)')
  columns = []
  for t, tag in enumerate(TAGS):
    table = list_captions(tag, split)
    order = np.argsort(_bits(seed, np.arange(len(table.tag)), 100 + t))
    columns.append(caption_prompts(table.take(np.resize(order, count // 6))))
  return [entry for row in zip(*columns) for entry in row]


# ---- scenes
@functools.cache
def _allowed():
  """`[5, 36, 36]`: may an object be at q with one at p? Row 0 anywhere, 1 + r: p is r of q."""
  y, x = (np.array(LATTICE)[i] for i in np.divmod(np.arange(36), 6))
  dx, dy = x[:, None] - x[None], y[:, None] - y[None]  # p minus q
  apart = np.maximum(abs(dx), abs(dy)) >= SEPARATION
  along = [dx <= -SEPARATION, dx >= SEPARATION, dy <= -SEPARATION, dy >= SEPARATION]
  across = [abs(dy) < SEPARATION] * 2 + [abs(dx) < SEPARATION] * 2
  return np.stack([apart] + [m & n for m, n in zip(along, across)])


def arrange_scenes(captions, seed, index):
  """Scenes for given captions: what they leave open drawn from (seed, index). Returns `Scenes`."""
  index = np.asarray(index)
  c, slots = captions, np.arange(SLOTS)
  count = np.where(c.tag == 2, c.count, np.where(np.isin(c.tag, (1, 4, 5)), 2, 1))
  many = (c.tag == 2)[:, None]
  shape = np.where(many | (slots == 0), c.a[:, None], c.b[:, None])
  free = _draw(seed, index[:, None], np.where(many, 10, 10 + slots), 8)
  said = np.where(slots == 0, c.colour_a[:, None], c.colour_b[:, None])
  colour = np.where(np.isin(c.tag, (3, 5))[:, None], said, free)
  size = _draw(seed, index[:, None], np.where(many, 20, 20 + slots), len(RADII))
  rule = np.where(c.tag == 4, 1 + c.relation, 0)
  place = np.zeros((len(index), SLOTS), np.int64)
  todo, attempt = np.arange(len(index)), 0
  while len(todo):  # an object may find no room left: then this row alone is drawn again
    ok = np.ones((len(todo), 36), bool)
    good = np.ones(len(todo), bool)
    for j in range(SLOTS):
      room = ok.sum(1)
      active = j < count[todo]
      good &= ~active | (room > 0)
      nth = _draw(seed, index[todo], 1000 + 8 * attempt + j, np.maximum(room, 1))
      chosen = np.argmax(np.cumsum(ok, 1) > nth[:, None], 1)
      if j == 0:  # an object in the middle leaves no room on some sides of it
        first = _allowed()[rule[todo]].any(2)
        nth = _draw(seed, index[todo], 1000 + 8 * attempt, first.sum(1))
        chosen = np.argmax(np.cumsum(first, 1) > nth[:, None], 1)
      place[todo, j] = chosen
      ok &= _allowed()[rule[todo] if j == 0 else 0 * todo, chosen] | ~active[:, None]
    todo, attempt = todo[~good], attempt + 1
  return Scenes(captions, count, shape, colour, size, place)


def sample_scenes(seed, index, split='train'):
  """Captions and scenes of rows `index [R]` of the endless data set (seed, split), as `Scenes`.

  >>> scenes = sample_scenes(seed=0, index=range(4))
  >>> images = render_scenes(scenes)
  >>> ids = tokenize_texts(caption_texts(scenes.captions))
  """
  index = np.asarray(index)
  salt = 2 * seed + SPLITS.index(_check('split', split, SPLITS))
  return arrange_scenes(draw_captions(salt, index, split), salt, index)


def pixel_coverage(shape, radius, dy, dx):
  """Share of each pixel that a shape covers; `dy, dx [...]`: pixel centre minus object centre."""
  sub = (np.arange(8) + 0.5) / 8 - 0.5
  y, x = (dy[..., None, None] + sub[:, None]) / radius, (dx[..., None, None] + sub) / radius
  box = (abs(x) <= 1) & (abs(y) <= 1)
  inside = {'circle': lambda: x * x + y * y <= 1, 'square': lambda: box,
            'triangle': lambda: box & (abs(x) <= (y + 1) / 2),
            'cross': lambda: box & ((abs(x) <= 0.34) | (abs(y) <= 0.34)),
            'ring': lambda: (x * x + y * y <= 1) & (x * x + y * y >= 0.25)}[shape]()
  return inside.mean((-2, -1), dtype=np.float32)


@functools.cache
def _masks():
  """`[5 shapes, 2 sizes, 36 places, 1024]` float32."""
  grid = np.arange(SIZE) + 0.5
  out = np.zeros((len(SHAPES), len(RADII), 36, SIZE * SIZE), np.float32)
  for s, shape in enumerate(SHAPES):
    for z, radius in enumerate(RADII):
      for p in range(36):
        y, x = LATTICE[p // 6], LATTICE[p % 6]
        dy, dx = np.meshgrid(grid - y, grid - x, indexing='ij')
        out[s, z, p] = pixel_coverage(shape, radius, dy, dx).ravel()
  return out


def render_scenes(scenes):
  """Pictures, `[R, 32, 32, 3]` float32 in [0, 1]."""
  alpha = _masks()[scenes.shape, scenes.size, scenes.place]  # [R, O, 1024]
  alpha = alpha * (np.arange(SLOTS) < scenes.count[:, None])[..., None]
  ink = _INK[scenes.colour] - np.float32(GROUND)  # [R, O, 3]
  return (np.matmul(alpha.transpose(0, 2, 1), ink) + np.float32(GROUND)).reshape(-1, SIZE, SIZE, 3)


def object_boxes(scenes):
  """Truth for detectors: (`[R, O, 4]` x0, y0, x1, y1 in pixels, `[R, O]` bool present)."""
  lattice = np.array(LATTICE, np.float32)
  centre = np.stack([lattice[scenes.place % 6], lattice[scenes.place // 6]], -1)  # [R, O, 2]
  radius = np.array(RADII, np.float32)[scenes.size][..., None]
  present = np.arange(SLOTS) < scenes.count[:, None]
  return np.concatenate([centre - radius, centre + radius], -1), present


def object_detections(scenes):
  """The same as GenEval detections: R lists of {'class', 'color', 'box': [x0, y0, x1, y1]}."""
  box, present = object_boxes(scenes)
  return [[{'class': SHAPES[scenes.shape[i, j]], 'color': COLOURS[scenes.colour[i, j]],
            'box': box[i, j].tolist()} for j in np.flatnonzero(present[i])]
          for i in range(len(present))]


# ---- hard negatives
_ASPECTS_OF = np.array([  # [tag, aspect]: which aspects a caption of the category can get wrong
  [1, 0, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 0],
  [1, 1, 0, 0, 0], [1, 0, 0, 1, 0], [1, 1, 0, 0, 1]], bool)


def wrong_captions(scenes, seed, index, split='train'):
  """Captions false of the scene in exactly one aspect: (`Captions`, `[R]` index into ASPECTS).

  The wrong caption is one of the grammar and, with `split='train'`, never holds a held-out
  combination (one that only ever occurs as wrong would give itself away); 'held' allows any. A
  single object's wrong count is `two circles`. Pure in (seed, `index [R]`, scenes).
  """
  _check('split', split, SPLITS)
  index, old = np.asarray(index), scenes.captions
  new, aspect = np.stack(old), np.zeros(len(index), np.int64)
  todo, attempt = np.arange(len(index)), 0
  while len(todo):
    c = old.take(todo)
    draw = lambda lane, n: _draw(seed, index[todo], 5000 + 16 * attempt + lane, n)  # noqa: B023
    can = _ASPECTS_OF[c.tag]
    what = np.argmax(np.cumsum(can, 1) > draw(0, can.sum(1))[:, None], 1)
    second = (draw(1, 2) == 1) & np.isin(c.tag, (1, 4, 5))  # which of two objects
    other = (np.where(second, c.b, c.a) + 1 + draw(2, 4)) % 5
    hue = (np.where(second, c.colour_b, c.colour_a) + 1 + draw(3, 7)) % 8
    is_ = [what == k for k in range(5)]
    a, b = np.where(is_[0] & ~second, other, c.a), np.where(is_[0] & second, other, c.b)
    x, y = np.where(is_[1] & ~second, hue, c.colour_a), np.where(is_[1] & second, hue, c.colour_b)
    x, y = np.where(is_[4], y, x), np.where(is_[4], x, y)
    n = np.where(c.tag == 0, 2, 2 + (c.count - 2 + 1 + draw(4, 2)) % 3)
    n = np.where(is_[2], n, c.count)
    tag = np.where(is_[2], 2, c.tag)
    r = np.where(is_[3], (c.relation + 1 + draw(5, 3)) % 4, c.relation)
    cand = Captions(tag, c.prefix, a, b, x, y, n, r)
    good = ~(np.isin(c.tag, (1, 4, 5)) & (a == b)) & ~((c.tag == 5) & (x == y))
    if split == 'train':
      good &= caption_splits(cand) == 0
    new[:, todo], aspect[todo] = np.stack(cand), what
    todo, attempt = todo[~good], attempt + 1
  return Captions(*new), aspect


def _check(name, value, allowed):
  if value not in allowed:
    raise ConfigError(f'{name}={value!r}: allowed are {", ".join(allowed)}')
  return value
