"""The scene world: 32x32 pictures of coloured shapes, captions in GenEval's six categories.

The world is simple, so that small models learn it in minutes on a CPU: five shapes, eight colours,
two sizes, a flat grey ground, one to four objects with centres on a 6 x 6 lattice of 4 pixels and
gaps of at least 2 pixels. A caption describes the complete scene in GenEval's grammar and has
GenEval's metadata (github.com/djghosh13/geneval, `evaluation_metadata.jsonl`). What a caption
leaves open is drawn at random: always position and size, and the colour in four of the six
categories (the objects of a counting scene share both).

Everything is a pure function of (seed, index): `sample_scenes(0, range(10, 20))` equals rows
10..19 of `sample_scenes(0, range(100))`.

Splits hold out *combinations*: prefix-shape pairs (single_object), shape pairs (two_object),
shape-count pairs (counting), colour-shape pairs (colors), relation triples (position), attribution
quadruples (color_attr). A training caption contains no held-out combination of any category (except
that prefix-shape pairs concern single_object only). A held-out caption contains a held-out
combination of its own category and of no other.

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
SLOTS, TEXT_LENGTH, PAD = 4, 12, 0
VOCABULARY = ('<pad>', *sorted({
  w for p in (*PREFIXES, *RELATIONS, *SHAPES, *PLURALS, *COLOURS, *NUMBERS[1:], 'and')
  for w in p.split()}))
_WORDS = {w: i for i, w in enumerate(VOCABULARY)}
_INK = np.array(list(PALETTE.values()), np.float32)  # [8, 3]


class Captions(NamedTuple):
  """The content of R captions. Integer arrays `[R]` of indices into the tuples above.

  A caption reads `A relation B`, `colour_a A and colour_b B` or `count A`. A field that its
  category does not use is 0 (`count`: 1).
  """
  tag: np.ndarray
  prefix: np.ndarray
  a: np.ndarray
  b: np.ndarray
  colour_a: np.ndarray
  colour_b: np.ndarray
  count: np.ndarray
  relation: np.ndarray

  def take_rows(self, rows):
    """The captions of some rows (indices, a slice or a mask)."""
    return Captions(*(f[rows] for f in self))


class Scenes(NamedTuple):
  """The content of R pictures: `shape, colour, size, place [R, O]` of object slots, `count [R]`.

  `place` is row * 6 + column on the lattice. Slots from `count` on are undefined.
  """
  captions: Captions
  count: np.ndarray
  shape: np.ndarray
  colour: np.ndarray
  size: np.ndarray
  place: np.ndarray


# ---------------------------------------------------------------------------------- random numbers


def _random_bits(seed, index, lane):
  """splitmix64 of (seed, index, lane): `[...]` uint64, the only source of randomness here."""
  # a counter-based generator: any row can be drawn alone, in any order
  # the multiplications wrap around on purpose
  with np.errstate(over='ignore'):
    x = np.asarray(index, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = x ^ (np.uint64(seed) * np.uint64(0xD1B54A32D192ED03))
    for add in (np.asarray(lane, np.uint64) + np.uint64(1), np.uint64(0x2545F4914F6CDD1D)):
      x = x + add * np.uint64(0x9E3779B97F4A7C15)
      x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      x = x ^ (x >> np.uint64(31))
  return x


def draw_integers(seed, index, lane, n):
  """Integers `[...]` in [0, n) of stream `lane`; `n` may be an array."""
  # the upper 53 bits fill the mantissa of a float64
  unit = (_random_bits(seed, index, lane) >> np.uint64(11)).astype(np.float64) * 2.0**-53
  return np.minimum((unit * n).astype(np.int64), np.asarray(n) - 1)


# -------------------------------------------------------------------------------------- the splits

# The tables of held-out combinations. Each spreads over shapes and colours, so that training shows
# every shape with most prefixes, counts, colours and partners.
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


def _canonical_meaning(c):
  """One integer per meaning: `A left of B` = `B right of A`, `x A and y B` = `y B and x A`."""
  # both wordings must fall into the same split, else the held-out meaning is seen in training
  turned = np.where(c.tag == 4, c.relation % 2 == 1, (c.tag == 5) & (c.a > c.b))
  a, b = np.where(turned, c.b, c.a), np.where(turned, c.a, c.b)
  x, y = np.where(turned, c.colour_b, c.colour_a), np.where(turned, c.colour_a, c.colour_b)
  return ((((c.tag * 5 + a) * 5 + b) * 8 + x) * 8 + y) * 4 + c.relation // 2 * 2


def caption_splits(captions):
  """The split of each caption `[R]`: 0 training, 1 held out, 2 neither (new in several ways)."""
  c = captions
  pair = np.isin(c.tag, (1, 4, 5)) & _HELD_PAIR[c.a, c.b]
  colour = ((c.tag == 3) | (c.tag == 5)) & _HELD_COLOUR[c.a, c.colour_a]
  colour |= (c.tag == 5) & _HELD_COLOUR[c.b, c.colour_b]
  # triples and quadruples are too many for a table: hold out a random fifth of them
  chosen = draw_integers(77, _canonical_meaning(c), 0, 5) == 0
  own = np.select([c.tag == t for t in range(6)], [
    _HELD_PREFIX[c.prefix, c.a], pair, _HELD_COUNT[c.a, c.count], colour, chosen, chosen])
  # held out in another category's way too: then a failure could not be attributed
  other = ((c.tag >= 4) & pair) | ((c.tag == 5) & colour)
  return np.where(other, 2, own.astype(np.int64))


@functools.cache
def list_captions(tag, split):
  """All captions of one category and split, as `Captions`.

  Raises:
    ConfigError: an unknown category or split.
  """
  check_choice('tag', tag, TAGS), check_choice('split', split, SPLITS)
  t, one, z = TAGS.index(tag), (1,), (0,)
  s, k, p = range(5), range(8), range(len(PREFIXES))
  axes = {  # prefix, a, b, colour_a, colour_b, count, relation
    'single_object': (p, s, z, z, z, one, z), 'two_object': (p, s, s, z, z, one, z),
    'counting': (p, s, z, z, z, (2, 3, 4), z), 'colors': (p, s, z, k, z, one, z),
    'position': (p, s, s, z, z, one, range(4)), 'color_attr': (p, s, s, k, k, one, z)}[tag]
  rows = np.array(list(itertools.product(*axes)))
  # two objects of one shape or colour would read as a count
  if tag in ('two_object', 'position', 'color_attr'):
    rows = rows[rows[:, 1] != rows[:, 2]]
  if tag == 'color_attr':
    rows = rows[rows[:, 3] != rows[:, 4]]
  captions = Captions(np.full(len(rows), t), *rows.T)
  return captions.take_rows(caption_splits(captions) == SPLITS.index(split))


# ---------------------------------------------------------------------------------------- captions


def draw_captions(seed, index, split='train'):
  """Random captions of rows `index [R]`: a uniform category, then one of its captions uniformly."""
  # by category first, else color_attr with its many captions would be nearly all of the data
  index = np.asarray(index)
  tag = draw_integers(seed, index, 0, 6)
  out = np.zeros((8, len(index)), np.int64)
  for t, name in enumerate(TAGS):
    rows = np.flatnonzero(tag == t)
    table = list_captions(name, split)
    out[:, rows] = np.stack(table)[:, draw_integers(seed, index[rows], 1, len(table.tag))]
  return Captions(*out)


def _with_article(word):
  return ('an ' if word[0] in 'aeiou' else 'a ') + word


def caption_texts(captions):
  """The captions as a list of R sentences."""
  return [_caption_text(*row) for row in zip(*(f.tolist() for f in captions))]


def _caption_text(tag, prefix, a, b, colour_a, colour_b, count, relation):
  one, other = SHAPES[a], SHAPES[b]
  if tag in (3, 5):
    one, other = f'{COLOURS[colour_a]} {one}', f'{COLOURS[colour_b]} {other}'
  first = f'{NUMBERS[count - 1]} {PLURALS[a]}' if tag == 2 else _with_article(one)
  join = {1: ' and ', 4: f' {RELATIONS[relation]} ', 5: ' and '}.get(tag)
  return f'{PREFIXES[prefix]} {first}' + (join + _with_article(other) if join else '')


def caption_prompts(captions):
  """R prompt rows with GenEval's metadata; of `position` the reference object comes first."""
  out = []
  for text, tag, a, b, x, y, n, r in zip(caption_texts(captions), *(
      f.tolist() for f in captions._replace(prefix=captions.tag)[1:])):
    one = lambda shape, **more: {'class': SHAPES[shape], 'count': 1, **more}
    entry = {'tag': TAGS[tag], 'include': [one(a)]}
    if tag == 1:
      entry['include'] = [one(a), one(b)]
    elif tag == 2:
      entry['include'] = [{'class': SHAPES[a], 'count': n}]
      # 'two circles' must not be satisfied by three
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
  """Words to ids `[R, 12]` int32, padded with 0; the empty text is the null prompt.

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
  """A fixed balanced list of prompt rows: `count / 6` of each category, categories in turn.

  The prompts of a category are distinct until all are used, then they repeat (sizes of the held-out
  split: 10, 32, 24, 64, 112, 1056).

  Raises:
    ConfigError: `count` is not a positive multiple of 6, or an unknown split.
  """
  if count < 1 or count % 6:
    raise ConfigError(f'count={count}: give a positive multiple of 6 (the categories)')
  columns = []
  for t, tag in enumerate(TAGS):
    table = list_captions(tag, split)
    # sorting random numbers gives a permutation; lanes from 100 on are not used elsewhere
    order = np.argsort(_random_bits(seed, np.arange(len(table.tag)), 100 + t))
    columns.append(caption_prompts(table.take_rows(np.resize(order, count // 6))))
  return [entry for row in zip(*columns) for entry in row]


# ------------------------------------------------------------------------------------------ scenes


@functools.cache
def _allowed_places():
  """`[5, 36, 36]` bool at [rule, p, q]: may a second object be at q if the first is at p? Rule 0
  only separates them, rule 1 + r also demands that p is in relation r to q."""
  y, x = (np.array(LATTICE)[i] for i in np.divmod(np.arange(36), 6))
  dx, dy = x[:, None] - x[None], y[:, None] - y[None]  # p minus q
  apart = np.maximum(abs(dx), abs(dy)) >= SEPARATION
  # a clear relation: far apart along its axis and close across it, so that no other relation holds
  along = [dx <= -SEPARATION, dx >= SEPARATION, dy <= -SEPARATION, dy >= SEPARATION]
  across = [abs(dy) < SEPARATION] * 2 + [abs(dx) < SEPARATION] * 2
  return np.stack([apart] + [m & n for m, n in zip(along, across)])


def arrange_scenes(captions, seed, index):
  """`Scenes` of given captions; (seed, index) determine what the captions leave open."""
  index = np.asarray(index)
  c, slots = captions, np.arange(SLOTS)
  count = np.where(c.tag == 2, c.count, np.where(np.isin(c.tag, (1, 4, 5)), 2, 1))
  # the objects of a counting scene share colour and size: one lane serves all slots
  many = (c.tag == 2)[:, None]
  shape = np.where(many | (slots == 0), c.a[:, None], c.b[:, None])
  free = draw_integers(seed, index[:, None], np.where(many, 10, 10 + slots), 8)
  said = np.where(slots == 0, c.colour_a[:, None], c.colour_b[:, None])
  colour = np.where(np.isin(c.tag, (3, 5))[:, None], said, free)
  size = draw_integers(seed, index[:, None], np.where(many, 20, 20 + slots), len(RADII))
  rule = np.where(c.tag == 4, 1 + c.relation, 0)
  place = np.zeros((len(index), SLOTS), np.int64)
  todo, attempt = np.arange(len(index)), 0
  # Objects are placed one after another. If one finds no room, its row is drawn again; other rows
  # keep their draws, so a row does not depend on its neighbours.
  while len(todo):
    ok = np.ones((len(todo), 36), bool)
    good = np.ones(len(todo), bool)
    for j in range(SLOTS):
      room = ok.sum(1)
      active = j < count[todo]
      good &= ~active | (room > 0)
      # choose the n-th of the places that are still free
      nth = draw_integers(seed, index[todo], 1000 + 8 * attempt + j, np.maximum(room, 1))
      chosen = np.argmax(np.cumsum(ok, 1) > nth[:, None], 1)
      # the first object must leave room for the second: one in the middle has none on some sides
      if j == 0:
        first = _allowed_places()[rule[todo]].any(2)
        nth = draw_integers(seed, index[todo], 1000 + 8 * attempt, first.sum(1))
        chosen = np.argmax(np.cumsum(first, 1) > nth[:, None], 1)
      place[todo, j] = chosen
      ok &= _allowed_places()[rule[todo] if j == 0 else 0 * todo, chosen] | ~active[:, None]
    todo, attempt = todo[~good], attempt + 1
  return Scenes(captions, count, shape, colour, size, place)


def sample_scenes(seed, index, split='train'):
  """`Scenes` with captions: rows `index [R]` of the endless data set (seed, split).

  >>> scenes = sample_scenes(seed=0, index=range(4))
  >>> images = render_scenes(scenes)
  >>> ids = tokenize_texts(caption_texts(scenes.captions))
  """
  index = np.asarray(index)
  # the two splits of a seed must not share draws
  salt = 2 * seed + SPLITS.index(check_choice('split', split, SPLITS))
  return arrange_scenes(draw_captions(salt, index, split), salt, index)


def pixel_coverage(shape, radius, dy, dx):
  """Share of each pixel that a shape covers; `dy, dx [...]`: pixel centre minus object centre."""
  # 8 x 8 samples per pixel give soft edges
  sub = (np.arange(8) + 0.5) / 8 - 0.5
  y, x = (dy[..., None, None] + sub[:, None]) / radius, (dx[..., None, None] + sub) / radius
  box = (abs(x) <= 1) & (abs(y) <= 1)
  inside = {'circle': lambda: x * x + y * y <= 1, 'square': lambda: box,
            'triangle': lambda: box & (abs(x) <= (y + 1) / 2),
            'cross': lambda: box & ((abs(x) <= 0.34) | (abs(y) <= 0.34)),
            'ring': lambda: (x * x + y * y <= 1) & (x * x + y * y >= 0.25)}[shape]()
  return inside.mean((-2, -1), dtype=np.float32)


@functools.cache
def _shape_masks():
  """Coverage of the whole picture by each object, `[5 shapes, 2 sizes, 36 places, 1024]`."""
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
  """Pictures `[R, 32, 32, 3]` float32 in [0, 1]."""
  alpha = _shape_masks()[scenes.shape, scenes.size, scenes.place]  # [R, O, 1024]
  alpha = alpha * (np.arange(SLOTS) < scenes.count[:, None])[..., None]
  # objects never overlap, so their contributions to the ground can be added
  ink = _INK[scenes.colour] - np.float32(GROUND)  # [R, O, 3]
  return (np.matmul(alpha.transpose(0, 2, 1), ink) + np.float32(GROUND)).reshape(-1, SIZE, SIZE, 3)


def object_boxes(scenes):
  """True boxes: (`[R, O, 4]` x0, y0, x1, y1 in pixels, `[R, O]` bool present)."""
  lattice = np.array(LATTICE, np.float32)
  centre = np.stack([lattice[scenes.place % 6], lattice[scenes.place // 6]], -1)  # [R, O, 2]
  radius = np.array(RADII, np.float32)[scenes.size][..., None]
  present = np.arange(SLOTS) < scenes.count[:, None]
  return np.concatenate([centre - radius, centre + radius], -1), present


def object_detections(scenes):
  """True objects in GenEval's form: R lists of {'class', 'color', 'box': [x0, y0, x1, y1]}."""
  box, present = object_boxes(scenes)
  return [[{'class': SHAPES[scenes.shape[i, j]], 'color': COLOURS[scenes.colour[i, j]],
            'box': box[i, j].tolist()} for j in np.flatnonzero(present[i])]
          for i in range(len(present))]


def check_choice(name, value, allowed):
  """Returns `value`; raises `ConfigError` if it is not one of `allowed`."""
  if value not in allowed:
    raise ConfigError(f'{name}={value!r}: allowed are {", ".join(allowed)}')
  return value
