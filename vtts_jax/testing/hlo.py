"""Bytes that a compiled program moves through main memory, counted in its optimised HLO text.

XLA's own `bytes accessed` counts a loop body once and the on-chip memory of a TPU too. Here every
instruction counts what it reads and writes in main memory, times the trips of the loops around it:
a slice reads the slice, an update in place writes the update, and what a TPU program keeps in other
memory spaces (`S(1)` in a layout) is free. A static count: it knows nothing of overlap or of tiles.
"""

import math
import re
from typing import NamedTuple

BITS = {'pred': 8, 's4': 4, 'u4': 4, 'bf16': 16, 'c64': 64, 'c128': 128}
FREE = {
  'parameter', 'tuple', 'get-tuple-element', 'constant', 'bitcast', 'after-all', 'partition-id',
  'replica-id', 'opt-barrier', 'domain', 'add-dependency',
}  # fmt: skip
SLICES = {'dynamic-slice', 'slice', 'gather'}
_ARRAY = re.compile(r'\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?')
_LINE = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*)$')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$')


class Instruction(NamedTuple):
  """One line: its result's type as text, its operation, names of operands, and the rest."""

  kind: str
  op: str
  operands: tuple[str, ...]
  rest: str


class Computation(NamedTuple):
  """Instructions by name, and the name of the root."""

  lines: dict[str, Instruction]
  root: str


def _size(kind: str) -> int:
  """Bytes in main memory of a type, tuples summed."""
  total = 0
  for name, dims, layout in _ARRAY.findall(kind):
    if 'S(' in layout and 'S(0)' not in layout:
      continue
    bits = BITS.get(name) or int(re.search(r'\d+', name)[0] if re.search(r'\d', name) else 0)
    total += math.prod(int(d) for d in dims.split(',') if d) * bits // 8
  return total


def _closing(text: str, start: int) -> int:
  """Index of the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] in '({[') - (text[i] in ')}]')
    if not depth:
      return i
  raise ValueError(f'unbalanced: {text[:80]}')


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """Computations by name, and the entry's name, of `compiled.as_text()`."""
  found, entry, lines, name, root = {}, '', {}, '', ''
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      name, lines, root = head[2], {}, ''
      entry = name if head[1] else entry
    elif line.startswith('}') and name:
      found[name], name = Computation(lines, root), ''
    elif name and (match := _LINE.match(line)):
      body = re.sub(r'/\*.*?\*/', '', match[3])
      end = _closing(body, 0) + 1 if body[0] == '(' else body.index(' ')
      kind, body = body[:end], body[end:].strip()
      opening = body.index('(')
      closing = _closing(body, opening)
      inside = body[opening + 1 : closing]
      operands = (
        [inside]
        if body[:opening] in ('parameter', 'constant')
        else re.findall(r'%([\w.\-]+)', inside)
      )
      lines[match[2]] = Instruction(kind, body[:opening], tuple(operands), body[closing + 1 :])
      root = match[2] if match[1] else root
  return found, entry


def _called(rest: str, key: str) -> str:
  match = re.search(rf'\b{key}=%?([\w.\-]+)', rest)
  return match[1] if match else ''


class _Counter:
  def __init__(self, program):
    self.program = program

  def total(self, name: str) -> float:
    """Bytes of one run of a computation."""
    where = self.program[name]
    return sum(self.bytes(where, line) for line in where.lines.values())

  def bytes(self, where, line) -> float:
    op, rest = line.op, line.rest
    if op in FREE or op.endswith('-done') or op.endswith('-update'):
      return 0
    if op == 'while':
      return self.trips(rest) * self.total(_called(rest, 'body'))
    if op == 'conditional':
      return max(self.total(n) for n in re.findall(r'%([\w.\-]+)', rest) if n in self.program)
    if op == 'call':
      return self.total(_called(rest, 'to_apply'))
    if op in ('fusion', 'async-start'):
      body = self.program[_called(rest, 'calls')]
      reads = sum(self.read(body, n, where.lines[o].kind) for n, o in self.pairs(body, line))
      return reads + self.written(body, body.root, line.kind)
    reads = [_size(where.lines[o].kind) for o in line.operands if o in where.lines]
    if op in SLICES:
      kept = _size(where.lines[line.operands[0]].kind) and _raw(line.kind)
      return kept + sum(reads[1:]) + _size(line.kind)
    if op == 'dynamic-update-slice':
      update = where.lines[line.operands[1]].kind
      return _size(update) + (_raw(update) if _size(line.kind) else 0)
    if op in ('copy-start', 'slice-start'):  # (destination, source, ..): one of each
      arrays = [m[0] for m in re.finditer(r'\w+\[[\d,]*\](\{[^}]*\})?', line.kind)]
      source = min(_raw(arrays[0]), reads[0]) if reads[0] else 0
      return source + _size(arrays[0])
    return sum(reads) + _size(line.kind)

  def trips(self, rest) -> int:
    """The compiler's note, else the constant that the condition compares a counter from 0 to."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
    if known:
      return int(known[1])
    condition = self.program[_called(rest, 'condition')].lines.values()
    limits = [i.operands[0] for i in condition if i.op == 'constant' and i.kind.startswith('s32[]')]
    if len(limits) != 1:
      raise ValueError('a loop whose number of trips is not known')
    return int(limits[0])

  def pairs(self, body, line):
    """(parameter of the body, operand) of a call, in order."""
    inner = [n for n, i in body.lines.items() if i.op == 'parameter']
    return zip(sorted(inner, key=lambda n: int(body.lines[n].operands[0])), line.operands)

  def read(self, body, name, kind) -> float:
    """Bytes read of a parameter of a fused body: of one that is only sliced, the slices."""
    if not _size(kind):
      return 0
    total = 0
    for user in body.lines.values():
      if name not in user.operands:
        continue
      first = user.operands[0] == name
      if user.op in SLICES and first:
        total += _raw(user.kind)
      elif user.op == 'dynamic-update-slice' and first:
        continue
      elif user.op in ('bitcast', 'get-tuple-element', 'tuple') or user.op == 'fusion':
        total += self.through(body, user, name, kind)
      else:
        return _size(kind)
    return min(total, _size(kind))

  def through(self, body, user, name, kind):
    if user.op == 'fusion':
      inner = self.program[_called(user.rest, 'calls')]
      return sum(self.read(inner, n, kind) for n, o in self.pairs(inner, user) if o == name)
    own = next(n for n, i in body.lines.items() if i is user)
    return self.read(body, own, kind) if own != body.root else _size(kind)

  def written(self, body, name, kind) -> float:
    """Bytes written by a fused body: of an update in place, the update."""
    if not _size(kind):
      return 0
    line = body.lines[name]
    if line.op == 'tuple':
      parts = [m[0] for m in _ARRAY.finditer(kind)]
      return sum(self.written(body, o, part) for o, part in zip(line.operands, parts))
    if line.op == 'bitcast':
      return self.written(body, line.operands[0], kind)
    if line.op == 'dynamic-update-slice':
      return _raw(body.lines[line.operands[1]].kind)
    return _size(kind)


def _raw(kind: str) -> int:
  """Bytes of a type wherever it lies."""
  return _size(re.sub(r'S\(\d+\)', '', kind))


def traffic(text: str) -> float:
  """Bytes through main memory of one run of a compiled program, `compiled.as_text()`; of a
  partitioned program, on one device.

  Raises:
    ValueError: a loop whose number of trips the compiler does not know.
  """
  program, entry = parse(text)
  return _Counter(program).total(entry)
