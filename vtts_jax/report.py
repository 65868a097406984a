"""A run directory as one self-contained page, with `curve.png` and `grid.png` beside it."""

import base64
import io
import json

import jinja2
import numpy as np
from etils import epath
from PIL import Image

from vtts_jax import plots, stats, study
from vtts_jax.core import ConfigError
from vtts_jax.store import read_results, read_timing, write_atomic


def write(root) -> epath.Path:
  """Writes RUN/report.html, curve.png and grid.png from the lines in RUN; returns the page's path.

  Raises:
    ConfigError: there are no results yet.
  """
  root = epath.Path(root)
  rows = read_results(root)
  if not rows:
    raise ConfigError(f'{root} holds no results yet')
  about = json.loads((root / 'config.json').read_text())
  arms = stats.arms(rows)
  seconds = _seconds(read_timing(root))
  curve = plots.curves(stats.families(arms), _family_seconds(arms, seconds))
  write_atomic(root / 'curve.png', curve)
  grids = _grids(root, rows)
  if grids:
    write_atomic(root / 'grid.png', plots.grid(grids))
  searched = {r['arm']: r['searched'] for r in rows}
  measures = list(arms[0].points[0].measured)
  matrix, warnings = _matrix(arms, _bases(arms, about['config']), searched, measures)
  page = _template().render(
    title=about['config']['name'],
    lines=len(rows),
    environment=about['environment'],
    config=json.dumps(about['config'], indent=1),
    metric=about['config']['metric'],
    curve=_uri(curve, 'png'),
    arms=[_arm_row(a, searched[a.name]) for a in arms],
    tags=list(arms[0].points[0].categories),
    measures=measures,
    matrix=matrix,
    warnings=warnings,
    grids=[_grid_html(g) for g in grids],
    genealogies=_genealogies(root, rows),
    bill=[_bill_row(a, seconds.get(a.name)) for a in arms],
  )
  write_atomic(root / 'report.html', page.encode())
  return root / 'report.html'


def _template() -> jinja2.Template:
  text = (epath.resource_path('vtts_jax') / 'assets' / 'report.html.j2').read_text()
  return jinja2.Environment(autoescape=True).from_string(text)


def _uri(data: bytes, kind: str) -> str:
  return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'


def _seconds(timing) -> dict[str, tuple[float, float]]:
  """Arm to (measured seconds a prompt, compile seconds)."""
  out = {}
  for name in dict.fromkeys(t['arm'] for t in timing):
    own = [t for t in timing if t['arm'] == name]
    prompts = sum(t['prompts'] for t in own)
    out[name] = (sum(t['run'] for t in own) / prompts, sum(t['compile'] for t in own))
  return out


def _family_seconds(arms, seconds) -> dict[str, list[float]]:
  """Seconds a prompt of each family's points; a prefix of best-of-N gets its share by FLOPs."""
  points: dict[str, list[tuple[float, float]]] = {}
  for arm in arms:
    if arm.name not in seconds:
      continue
    full = arm.points[-1].cost
    for p in arm.points if arm.ladder else arm.points[-1:]:
      share = p.cost['flops'] / full['flops'] if full['flops'] else 1.0
      points.setdefault(arm.family, []).append((p.cost['generator'], seconds[arm.name][0] * share))
  return {k: [s for _, s in sorted(v)] for k, v in points.items()}


def _arm_row(arm, searched):
  first, last = arm.points[0], arm.points[-1]
  return {
    'name': arm.name,
    'searched': searched,
    'first': f'{first.accuracy.mean:.3f}',
    'last': f'{last.accuracy.mean:.3f}',
    'interval': f'{last.accuracy.low:.3f} to {last.accuracy.high:.3f}',
    'total': f'{last.total.mean:.3f}',
    'nfe': f'{last.cost["generator"]:,.0f}',
    'gflop': f'{last.cost["flops"] / 1e9:,.2f}',
    'categories': {k: f'{v:.2f}' for k, v in last.categories.items()},
  }


def _bill_row(arm, seconds):
  c = arm.points[-1].cost
  cells = [f'{c[k]:,.0f}' for k in ('generator', 'render', 'verify')] + [f'{c["flops"] / 1e9:,.3f}']
  cells += [f'{seconds[0]:.3f}', f'{seconds[1]:.1f}'] if seconds else ['', '']
  return {'name': arm.name, 'cells': cells}


def _bases(arms, config) -> dict[str, stats.Point]:
  """What each arm is compared with: one sample of its generator where the run has one, else its own
  first step."""
  generator = {
    name or 'main': study.merge(config, changes)['generator']
    for name, changes in (config['arms'] or {'': {}}).items()
  }
  bases = {}
  for arm in arms:
    same = [a for a in arms if a.ladder and generator[a.name] == generator[arm.name]]
    bases[arm.name] = (same or [arm])[0].points[0]
  return bases


def _matrix(arms, bases, searched, measures):
  """Rows of the verifier x metric matrix, and a warning for each sign of verifier hacking."""
  rows, warnings = [], []
  for arm in arms:
    first, last = bases[arm.name], arm.points[-1]
    change = last.accuracy.mean - first.accuracy.mean
    cells = [{'text': f'{100 * change:+.1f}', 'own': False, 'kind': _kind(change, 0.01)}]
    falls, own_gain = [], 0.0
    for name in measures:
      a, b = first.measured[name], last.measured[name]
      spread = first.spread[name]
      gain = (b.mean - a.mean) / spread if spread > 0 else 0.0
      own = name in searched[arm.name].split('+')
      cells.append({'text': f'{gain:+.2f}', 'own': own, 'kind': _kind(gain, 0.05)})
      own_gain = max(own_gain, gain) if own else own_gain
      if not own and b.high < a.low:
        falls.append(name)
    if last.accuracy.high < first.accuracy.low:
      falls.append('accuracy')
    if own_gain > 0 and falls:
      warnings.append(
        f'{arm.name}: the searched score {searched[arm.name]} rises by {own_gain:.2f} standard '
        f'deviations while {", ".join(falls)} fall(s) beyond the intervals: verifier hacking.'
      )
    rows.append({'name': arm.name, 'cells': cells})
  return rows, warnings


def _kind(value: float, threshold: float) -> str:
  return 'up' if value > threshold else 'down' if value < -threshold else ''


def _grids(root, rows):
  """For each arm: names of the budgets and, per traced prompt, (prompt, [(pixels, right?)])."""
  grids = []
  for name in dict.fromkeys(r['arm'] for r in rows if 'grid' in r):
    own = sorted((r for r in rows if r['arm'] == name and 'grid' in r), key=lambda r: r['id'])
    keep = _thin(len(own[0]['grid']))
    columns = [f'{own[0]["curve"][i]["generator"]:,.0f}' for i in keep]
    entries = []
    for r in own:
      pixels = [np.asarray(Image.open((root / r['grid'][i]).open('rb'))) for i in keep]
      entries.append(
        (r['prompt'], [(p, bool(r['curve'][i]['correct'])) for p, i in zip(pixels, keep)])
      )
    grids.append((name, columns, entries))
  return grids


def _thin(count: int, most: int = 9) -> list[int]:
  return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _grid_html(grid):
  name, columns, entries = grid
  rows = []
  for prompt, images in entries:
    cells = [{'src': _uri(_png(p), 'png'), 'kind': 'right' if ok else 'wrong'} for p, ok in images]
    rows.append({'prompt': prompt, 'images': cells})
  return {'arm': name, 'columns': columns, 'rows': rows}


def _png(pixels: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'png')
  return buffer.getvalue()


def _genealogies(root, rows, most: int = 6):
  """Family trees of a traced prompt of each arm, those with more than one step first."""
  found = []
  for name in dict.fromkeys(r['arm'] for r in rows if 'trace' in r):
    row = next(r for r in rows if r['arm'] == name and 'trace' in r)
    with (root / row['trace']).open('rb') as file, np.load(file) as arrays:
      trace = dict(arrays)
    found.append((len(trace['winner']), f'{name}: {row["prompt"]}', trace))
  found.sort(key=lambda f: -f[0])
  return [{'title': t, 'src': _uri(plots.genealogy(trace), 'png')} for _, t, trace in found[:most]]
