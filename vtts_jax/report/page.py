"""The page of a report: one run directory, or several merged, in one self-contained file.

A section of the page is a function that makes plain values of result lines (here, or in `tables`
for the long ones), one argument of `render` below, and its place in `report.html.j2`.
"""

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
  """Writes report.html and its figures; returns the path of the page.

  The figures are curve.png and grid.png, and rules.png and laws.png where there is enough to draw.

  Args:
    roots: run directories; `runs` says how several are joined.
    out: the directory to write to. By default that is the run's own, or for several runs the
      directory 'report' beside the first.

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

  # figures stand in the page, so that it can be sent as one file, and beside it for papers
  families, ids, tags = budgets.family_series(rows, seconds)
  rules, laws = tables.rule_curves(rows), tables.fit_laws(families, tags)
  figures = {'curve': plots.plot_curves(stats.group_families(arms), _family_seconds(arms, seconds))}
  if rules:
    figures['rules'] = plots.plot_rules(rules, tables.RULE_LABELS)
  if laws:
    figures['laws'] = plots.plot_laws(laws)
  grids = _output_grids(rows)
  # the page shows every output as a picture of its own, so the grid of them is a file only
  images = figures | ({'grid': plots.plot_grid(grids)} if grids else {})
  for name, data in images.items():
    files.write_atomic(out / f'{name}.png', data)

  # merged runs may have measured with different verifiers; the matrix has what all arms share
  shared = [set(a.points[0].measured) for a in arms]
  measures = [m for m in arms[0].points[0].measured if all(m in own for own in shared)]
  matrix, warnings = _matrix_rows(arms, _base_points(arms, runs.settings), searched, measures)
  page = _load_template().render(
    title=' + '.join(dict.fromkeys(info['config']['name'] for info in runs.infos)),
    lines=len(rows),
    runs=[{'name': n, **info['environment']} for n, info in zip(runs.names, runs.infos)],
    configs=[
      {'name': n, 'text': json.dumps(info['config'], indent=1)}
      for n, info in zip(runs.names, runs.infos)
    ],
    metric=_metric_label(runs),
    figures={name: files.data_uri(data, 'image/png') for name, data in figures.items()},
    arms=[_arm_row(a, searched[a.name]) for a in arms],
    tags=list(dict.fromkeys(t for a in arms for t in a.points[0].categories)),
    measures=measures,
    matrix=matrix,
    warnings=warnings,
    grids=[_grid_html(g) for g in grids],
    genealogies=_draw_genealogies(rows),
    bill=[_bill_row(a, seconds.get(a.name)) for a in arms],
    rules=tables.rule_rows(rules),
    laws=tables.law_rows(laws),
    **_budget_tables(runs, arms, families, ids, tags),
  )
  # a browser may have the page open while a run writes it again
  files.write_atomic(out / 'report.html', page.encode())
  return out / 'report.html'


def _metric_label(runs: Runs) -> str:
  """What the page calls the metric, which all runs share."""
  metric = runs.infos[0]['config']['metric']
  if isinstance(metric, str):
    return grading.metric_label(metric)
  # a verifier as metric is labelled by what the searches have seen of it
  parts = [dict(own['verifier']) for own in runs.settings.values()]
  return grading.metric_label(metric, [components.load(p.pop('name'), **p) for p in parts])


def _budget_tables(runs: Runs, arms, families, ids, tags) -> dict:
  """The page's values at equal budgets and by difficulty."""
  best_of_n = {a.family_name for a in arms if a.holds_all_budgets}
  base = budgets.find_baselines(families, best_of_n, runs.settings)
  by_difficulty = tables.difficulty_tables(runs.rows, families, ids, tags, best_of_n, runs.settings)
  return {
    'prompts': len(ids),
    'paired': bool(base),
    'equal': tables.equal_budget_tables(families, tags, base),
    'difficulty': by_difficulty,
  }


def _load_template() -> jinja2.Template:
  """The template of the page."""
  # prompts are anyone's text: what looks like HTML in them must not become part of the page
  text = (epath.resource_path('vtts_jax') / 'report' / 'report.html.j2').read_text()
  return jinja2.Environment(autoescape=True).from_string(text)


def _family_seconds(arms, seconds) -> dict[str, list[float]]:
  """`{family: seconds per prompt of each of its points}`, over all prompts that an arm has."""
  points: dict[str, list[tuple[float, float]]] = {}
  for arm in arms:
    if arm.name not in seconds:
      continue
    # as in `budgets`: a prefix of best-of-N was not timed, it gets its share by FLOPs
    full = arm.points[-1].cost
    for p in arm.points if arm.holds_all_budgets else arm.points[-1:]:
      share = p.cost['flops'] / full['flops'] if full['flops'] else 1.0
      own = points.setdefault(arm.family_name, [])
      own.append((p.cost['generator'], seconds[arm.name][0] * share))
  # in the order of `stats.group_families`, whose points they are drawn with
  return {k: [s for _, s in sorted(v)] for k, v in points.items()}


def _arm_row(arm, searched):
  """One row of the first table: an arm at its least and at its full budget."""
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
  """One row of the bill; no seconds where none were measured."""
  c = arm.points[-1].cost
  cells = [f'{c[k]:,.0f}' for k in ('generator', 'observe', 'verify')]
  cells += [f'{c["flops"] / 1e9:,.3f}']
  cells += [f'{seconds[0]:.3f}', f'{seconds[1]:.1f}'] if seconds else ['', '']
  return {'name': arm.name, 'cells': cells}


def _base_points(arms, settings) -> dict[str, stats.Point]:
  """The point that each arm is compared with: a single sample, or else its own first step."""
  bases = {}
  for arm in arms:
    # the first prefix of a best-of-N arm of the same generator is a single sample
    own = settings[arm.name]['generator']
    same = [a for a in arms if a.holds_all_budgets and settings[a.name]['generator'] == own]
    bases[arm.name] = (same or [arm])[0].points[0]
  return bases


def _matrix_rows(arms, bases, searched, measures):
  """Rows of the matrix of searched and measured scores, and warnings of verifier hacking."""
  rows, warnings = [], []
  for arm in arms:
    first, last = bases[arm.name], arm.points[-1]
    change = last.accuracy.mean - first.accuracy.mean
    cells = [{'text': f'{100 * change:+.1f}', 'own': False, 'css': _css_class(change, 0.01)}]
    # search that raises its own score while another falls fits the verifier, not the prompt
    falls, own_gain = [], 0.0
    for name in measures:
      a, b = first.measured[name], last.measured[name]
      # scores of different verifiers have no common unit but their own spread
      spread = first.spread[name]
      gain = (b.mean - a.mean) / spread if spread > 0 else 0.0
      own = name in searched[arm.name].split('+')
      cells.append({'text': f'{gain:+.2f}', 'own': own, 'css': _css_class(gain, 0.05)})
      own_gain = max(own_gain, gain) if own else own_gain
      # intervals that do not meet: a fall by chance is no warning
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


def _css_class(value: float, threshold: float) -> str:
  """Class of a table cell: 'up' or 'down' where a change is worth a colour."""
  return 'up' if value > threshold else 'down' if value < -threshold else ''


def _output_grids(rows):
  """Outputs by budget: `[(arm, budgets, [(prompt, [(output, is it right?)])])]`.

  An output is a picture in 8 bits or a text.
  """
  grids = []
  for name in dict.fromkeys(r['arm'] for r in rows if 'grid' in r):
    own = sorted((r for r in rows if r['arm'] == name and 'grid' in r), key=lambda r: r['id'])
    # a search of 32 steps has 32 columns, of which a page shows a few
    keep = _thin_places(len(own[0]['grid']))
    columns = [f'{own[0]["curve"][i]["generator"]:,.0f}' for i in keep]
    entries = []
    for r in own:
      outputs = [_read_output(r['root'] / r['grid'][i]) for i in keep]
      right = [bool(r['curve'][i]['correct']) for i in keep]
      entries.append((r['prompt'], list(zip(outputs, right))))
    grids.append((name, columns, entries))
  return grids


def _read_output(path: epath.Path) -> np.ndarray | str:
  """Pixels of a picture or of the first frame of a video; of anything else a few words."""
  if path.suffix == '.webp':
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert('RGB'))
  if path.suffix in ('.txt', '.json'):
    return path.read_text()[:200]
  return path.name


def _thin_places(count: int, most: int = 9) -> list[int]:
  """At most `most` of the places 0 .. count - 1, the first and the last among them."""
  return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _grid_html(grid):
  """One arm's grid of outputs as the page takes it."""
  name, columns, entries = grid
  rows = []
  for prompt, outputs in entries:
    cells = [
      {'css': 'right' if right else 'wrong', **_output_html(output)} for output, right in outputs
    ]
    rows.append({'prompt': prompt, 'cells': cells})
  return {'arm': name, 'columns': columns, 'rows': rows}


def _output_html(output) -> dict[str, str]:
  """An output as the page takes it: a text, or the source of a picture."""
  if isinstance(output, str):
    return {'text': output}
  return {'src': files.data_uri(files.encode_png(output), 'image/png')}


def _draw_genealogies(rows, most: int = 6):
  """Genealogies of the first traced prompt of each arm, those with the most steps first."""
  found = []
  for name in dict.fromkeys(r['arm'] for r in rows if 'trace' in r):
    row = next(r for r in rows if r['arm'] == name and 'trace' in r)
    with (row['root'] / row['trace']).open('rb') as file, np.load(file) as arrays:
      trace = dict(arrays)
    found.append((len(trace['winner']), f'{name}: {row["prompt"]}', trace))
  # where there are more arms than room, best-of-N has the least to show: its one step
  found.sort(key=lambda f: -f[0])
  return [
    {'title': title, 'src': files.data_uri(plots.plot_genealogy(trace), 'image/png')}
    for _, title, trace in found[:most]
  ]
