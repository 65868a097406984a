"""The report: one run directory, or several merged, as one self-contained page with its figures
beside it."""

import io
import json

import jinja2
import numpy as np
from etils import epath
from PIL import Image

from vtts_jax import components
from vtts_jax.media import files
from vtts_jax.report import budgets, plots, stats, tables
from vtts_jax.report.runs import Runs, read_runs
from vtts_jax.study import grading


def write_report(*roots, out=None) -> epath.Path:
  """Writes report.html, curve.png and grid.png (and rules.png, laws.png where there is enough to
  show) from the lines of the runs; returns the page's path.

  Args:
    roots: run directories; of several, arms are joined or told apart, see `runs`.
    out: the directory to write to; None for the run's own, or for several runs the directory
      'report' beside the first.

  Raises:
    ConfigError: there are no results yet, or the runs do not fit each other.
  """
  runs = read_runs(roots)
  default = epath.Path(roots[0])
  out = epath.Path(out or (default if len(roots) == 1 else default.parent / 'report'))
  rows = runs.rows
  arms = stats.arm_statistics(rows)
  seconds = budgets.seconds_per_prompt(runs.timing)
  searched = {r['arm']: r['searched'] for r in rows}

  # figures, each also a file of its own
  families, ids, tags = budgets.family_series(rows, seconds)
  rules, laws = tables.rule_curves(rows), tables.fit_laws(families, tags)
  figures = {'curve': plots.plot_curves(stats.group_families(arms), _family_seconds(arms, seconds))}
  if rules:
    figures['rules'] = plots.plot_rules(rules, tables.RULE_LABELS)
  if laws:
    figures['laws'] = plots.plot_laws(laws)
  grids = _output_grids(rows)
  drawn = figures | ({'grid': plots.plot_grid(grids)} if grids else {})
  for name, data in drawn.items():
    files.write_atomic(out / f'{name}.png', data)

  # of the measured scores those that all arms have
  shared = [set(a.points[0].measured) for a in arms]
  measures = [m for m in arms[0].points[0].measured if all(m in own for own in shared)]
  matrix, warnings = _matrix_rows(arms, _base_points(arms, runs.settings), searched, measures)
  page = _template().render(
    title=' + '.join(dict.fromkeys(a['config']['name'] for a in runs.about)),
    lines=len(rows),
    runs=[{'name': n, **a['environment']} for n, a in zip(runs.names, runs.about)],
    configs=[
      {'name': n, 'text': json.dumps(a['config'], indent=1)} for n, a in zip(runs.names, runs.about)
    ],
    metric=_metric_label(runs),
    figures={name: files.data_uri(data, 'image/png') for name, data in figures.items()},
    arms=[_arm_row(a, searched[a.name]) for a in arms],
    tags=list(dict.fromkeys(t for a in arms for t in a.points[0].categories)),
    measures=measures,
    matrix=matrix,
    warnings=warnings,
    grids=[_grid_html(g) for g in grids],
    genealogies=_genealogies(rows),
    bill=[_bill_row(a, seconds.get(a.name)) for a in arms],
    rules=tables.rule_rows(rules),
    laws=tables.law_rows(laws),
    **_budget_tables(runs, arms, families, ids, tags),
  )
  files.write_atomic(out / 'report.html', page.encode())
  return out / 'report.html'


def _metric_label(runs: Runs) -> str:
  metric = runs.about[0]['config']['metric']
  if isinstance(metric, str):
    return grading.metric_label(metric)
  parts = [dict(own['verifier']) for own in runs.settings.values()]
  return grading.metric_label(metric, [components.load(p.pop('name'), **p) for p in parts])


def _budget_tables(runs: Runs, arms, families, ids, tags) -> dict:
  """What the page says at equal budgets and by difficulty."""
  ladders = {a.family for a in arms if a.ladder}
  base = budgets.find_baselines(families, ladders, runs.settings)
  by_difficulty = tables.difficulty_tables(runs.rows, families, ids, tags, ladders, runs.settings)
  return {
    'prompts': len(ids),
    'paired': bool(base),
    'equal': tables.equal_budget_tables(families, tags, base),
    'difficulty': by_difficulty,
  }


def _template() -> jinja2.Template:
  text = (epath.resource_path('vtts_jax') / 'report' / 'report.html.j2').read_text()
  return jinja2.Environment(autoescape=True).from_string(text)


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
  cells = [f'{c[k]:,.0f}' for k in ('generator', 'observe', 'verify')]
  cells += [f'{c["flops"] / 1e9:,.3f}']
  cells += [f'{seconds[0]:.3f}', f'{seconds[1]:.1f}'] if seconds else ['', '']
  return {'name': arm.name, 'cells': cells}


def _base_points(arms, settings) -> dict[str, stats.Point]:
  """What each arm is compared with: one sample of its generator where there is one, else its own
  first step."""
  bases = {}
  for arm in arms:
    own = settings[arm.name]['generator']
    same = [a for a in arms if a.ladder and settings[a.name]['generator'] == own]
    bases[arm.name] = (same or [arm])[0].points[0]
  return bases


def _matrix_rows(arms, bases, searched, measures):
  """Rows of the verifier x metric matrix, and a warning for each sign of verifier hacking."""
  rows, warnings = [], []
  for arm in arms:
    first, last = bases[arm.name], arm.points[-1]
    change = last.accuracy.mean - first.accuracy.mean
    cells = [{'text': f'{100 * change:+.1f}', 'own': False, 'kind': _mark(change, 0.01)}]
    # search that raises its own score while another falls fits the verifier, not the prompt
    falls, own_gain = [], 0.0
    for name in measures:
      a, b = first.measured[name], last.measured[name]
      spread = first.spread[name]
      gain = (b.mean - a.mean) / spread if spread > 0 else 0.0
      own = name in searched[arm.name].split('+')
      cells.append({'text': f'{gain:+.2f}', 'own': own, 'kind': _mark(gain, 0.05)})
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


def _mark(value: float, threshold: float) -> str:
  return 'up' if value > threshold else 'down' if value < -threshold else ''


def _output_grids(rows):
  """For each arm: names of the budgets and, per traced prompt, (prompt, [(output, right?)]); an
  output is a picture in 8 bits or a text."""
  grids = []
  for name in dict.fromkeys(r['arm'] for r in rows if 'grid' in r):
    own = sorted((r for r in rows if r['arm'] == name and 'grid' in r), key=lambda r: r['id'])
    keep = _thin(len(own[0]['grid']))
    columns = [f'{own[0]["curve"][i]["generator"]:,.0f}' for i in keep]
    entries = []
    for r in own:
      outputs = [_read_output(r['root'] / r['grid'][i]) for i in keep]
      right = [bool(r['curve'][i]['correct']) for i in keep]
      entries.append((r['prompt'], list(zip(outputs, right))))
    grids.append((name, columns, entries))
  return grids


def _read_output(path: epath.Path) -> np.ndarray | str:
  """A picture (of a video the first frame) as pixels; anything else in a few words."""
  if path.suffix == '.webp':
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert('RGB'))
  if path.suffix in ('.txt', '.json'):
    return path.read_text()[:200]
  return path.name


def _thin(count: int, most: int = 9) -> list[int]:
  """At most `most` of the places 0 .. count - 1, the first and the last among them."""
  return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _grid_html(grid):
  name, columns, entries = grid
  rows = []
  for prompt, outputs in entries:
    cells = [
      {'kind': 'right' if right else 'wrong', **_output_html(output)} for output, right in outputs
    ]
    rows.append({'prompt': prompt, 'cells': cells})
  return {'arm': name, 'columns': columns, 'rows': rows}


def _output_html(output) -> dict[str, str]:
  if isinstance(output, str):
    return {'text': output}
  return {'src': files.data_uri(files.encode_png(output), 'image/png')}


def _genealogies(rows, most: int = 6):
  """Family trees of a traced prompt of each arm, those with more than one step first."""
  found = []
  for name in dict.fromkeys(r['arm'] for r in rows if 'trace' in r):
    row = next(r for r in rows if r['arm'] == name and 'trace' in r)
    with (row['root'] / row['trace']).open('rb') as file, np.load(file) as arrays:
      trace = dict(arrays)
    found.append((len(trace['winner']), f'{name}: {row["prompt"]}', trace))
  found.sort(key=lambda f: -f[0])
  return [
    {'title': title, 'src': files.data_uri(plots.plot_genealogy(trace), 'image/png')}
    for _, title, trace in found[:most]
  ]
