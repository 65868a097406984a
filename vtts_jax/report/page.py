"""One run directory, or several merged, as one self-contained page with its figures beside it."""

import base64
import io
import json

import jinja2
import numpy as np
from etils import epath
from PIL import Image

from vtts_jax import components
from vtts_jax.report import budgets as matched
from vtts_jax.report import plots, stats, tables
from vtts_jax.report import runs as merge
from vtts_jax.study import grading
from vtts_jax.study.store import write_atomic


def write(*roots, out=None) -> epath.Path:
  """Writes report.html, curve.png and grid.png (and rules.png, laws.png where there is enough to
  show) from the lines of the runs; returns the page's path.

  Args:
    roots: run directories; of several, arms are told apart or joined, see `merge`.
    out: the directory to write to; None for the run's own, or for several runs the directory
      'report' beside the first.

  Raises:
    ConfigError: there are no results yet, or the runs do not fit each other.
  """
  runs = merge.read(roots)
  default = epath.Path(roots[0])
  out = epath.Path(out or (default if len(roots) == 1 else default.parent / 'report'))
  rows, config = runs.rows, runs.about[0]['config']
  arms = stats.arms(rows)
  seconds = matched.seconds_per_prompt(runs.timing)
  figures = {'curve': plots.curves(stats.families(arms), _family_seconds(arms, seconds))}
  grids = _grids(rows)
  if grids:
    write_atomic(out / 'grid.png', plots.grid(grids))
  searched = {r['arm']: r['searched'] for r in rows}
  shared = [set(a.points[0].measured) for a in arms]
  measures = [m for m in arms[0].points[0].measured if all(m in own for own in shared)]
  matrix, warnings = _matrix(arms, _bases(arms, runs.settings), searched, measures)
  study = _study(runs, arms, seconds)
  rules, laws = study.pop('found_rules'), study.pop('found_laws')
  if rules:
    figures['rules'] = plots.selection(rules, tables.RULES)
  if laws:
    figures['laws'] = plots.laws(laws)
  for name, data in figures.items():
    write_atomic(out / f'{name}.png', data)
  page = _template().render(
    title=' + '.join(dict.fromkeys(a['config']['name'] for a in runs.about)),
    lines=len(rows),
    runs=[{'name': n, **a['environment']} for n, a in zip(runs.names, runs.about)],
    environment=runs.about[0]['environment'],
    configs=[
      {'name': n, 'text': json.dumps(a['config'], indent=1)} for n, a in zip(runs.names, runs.about)
    ],
    metric=_metric(config, runs.settings),
    curve=_uri(figures['curve'], 'png'),
    figures={name: _uri(data, 'png') for name, data in figures.items()},
    arms=[_arm_row(a, searched[a.name]) for a in arms],
    tags=list(dict.fromkeys(t for a in arms for t in a.points[0].categories)),
    measures=measures,
    matrix=matrix,
    warnings=warnings,
    grids=[_grid_html(g) for g in grids],
    genealogies=_genealogies(rows),
    bill=[_bill_row(a, seconds.get(a.name)) for a in arms],
    **study,
  )
  write_atomic(out / 'report.html', page.encode())
  return out / 'report.html'


def _metric(config, settings) -> str:
  if isinstance(config['metric'], str):
    return grading.label(config['metric'])
  parts = [dict(own['verifier']) for own in settings.values()]
  return grading.label(config['metric'], [components.load(p.pop('name'), **p) for p in parts])


def _study(runs, arms, seconds) -> dict:
  """What the page says about budgets, difficulty, selection rules and laws."""
  families, ids, tags = matched.series(runs.rows, seconds)
  ladders = {a.family for a in arms if a.ladder}
  base = matched.baselines(families, ladders, runs.settings)
  rules, laws = tables.selection(runs.rows), tables.laws(families, tags)
  return {
    'prompts': len(ids),
    'paired': bool(base),
    'equal': tables.equal_budgets(families, tags, base),
    'difficulty': tables.by_difficulty(runs.rows, families, ids, tags, ladders, runs.settings),
    'rules': tables.selection_rows(rules),
    'laws': tables.law_rows(laws),
    'found_rules': rules,
    'found_laws': laws,
  }


def _template() -> jinja2.Template:
  text = (epath.resource_path('vtts_jax') / 'report' / 'report.html.j2').read_text()
  return jinja2.Environment(autoescape=True).from_string(text)


def _uri(data: bytes, kind: str) -> str:
  return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'


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


def _bases(arms, settings) -> dict[str, stats.Point]:
  """What each arm is compared with: one sample of its generator where there is one, else its own
  first step."""
  bases = {}
  for arm in arms:
    own = settings[arm.name]['generator']
    same = [a for a in arms if a.ladder and settings[a.name]['generator'] == own]
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


def _grids(rows):
  """For each arm: names of the budgets and, per traced prompt, (prompt, [(pixels, right?)])."""
  grids = []
  for name in dict.fromkeys(r['arm'] for r in rows if 'grid' in r):
    own = sorted((r for r in rows if r['arm'] == name and 'grid' in r), key=lambda r: r['id'])
    keep = _thin(len(own[0]['grid']))
    columns = [f'{own[0]["curve"][i]["generator"]:,.0f}' for i in keep]
    entries = []
    for r in own:
      pixels = [_pixels(r['root'] / r['grid'][i]) for i in keep]
      entries.append(
        (r['prompt'], [(p, bool(r['curve'][i]['correct'])) for p, i in zip(pixels, keep)])
      )
    grids.append((name, columns, entries))
  return grids


def _pixels(path: epath.Path) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


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


def _genealogies(rows, most: int = 6):
  """Family trees of a traced prompt of each arm, those with more than one step first."""
  found = []
  for name in dict.fromkeys(r['arm'] for r in rows if 'trace' in r):
    row = next(r for r in rows if r['arm'] == name and 'trace' in r)
    with (row['root'] / row['trace']).open('rb') as file, np.load(file) as arrays:
      trace = dict(arrays)
    found.append((len(trace['winner']), f'{name}: {row["prompt"]}', trace))
  found.sort(key=lambda f: -f[0])
  return [{'title': t, 'src': _uri(plots.genealogy(trace), 'png')} for _, t, trace in found[:most]]
