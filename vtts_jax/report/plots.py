"""The figures of a report; each function returns the bytes of a PNG.

They are scaling curves, selection rules, fitted laws, outputs by budget, and genealogies.
"""

import io
import math
import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage, TextArea
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from vtts_jax.report.budgets import COST_AXES

COLOURS = ('#1f6fb4', '#d9622b', '#2e9f4e', '#8a55b5', '#b8952a', '#c2407e', '#3aa6a6', '#666666')
RIGHT, WRONG, WINNER = '#2e9f4e', '#cc4b3b', '#d9622b'  # frames of outputs
MOST_STEPS = 24  # that a genealogy draws


def _encode_figure(figure: Figure) -> bytes:
  """The PNG of a figure."""
  # a canvas of its own: pyplot would keep every figure, and ask for a display
  buffer = io.BytesIO()
  FigureCanvasAgg(figure).print_png(buffer)
  return buffer.getvalue()


def _line_style(i: int) -> dict:
  """Colour and dashes of the i-th line; colours repeat after eight, with other dashes."""
  return {'color': COLOURS[i % len(COLOURS)], 'ls': ('-', '--', ':')[i // len(COLOURS) % 3]}


def _finish_axis(axis, label: str) -> None:
  """Labels the abscissa and leaves of the frame what is read."""
  axis.set_xlabel(label)
  axis.grid(alpha=0.25)
  axis.spines[['top', 'right']].set_visible(False)


def _scale_by_doublings(axis) -> None:
  """Makes the abscissa logarithmic, with powers of two written out."""
  axis.set_xscale('log', base=2)
  axis.xaxis.set_major_formatter(lambda x, _: f'{x:g}')


def plot_rules(found, names, most: int = 4) -> bytes:
  """Accuracy by N of each selection rule, one panel for each best-of-N arm.

  Args:
    found: `tables.RuleCurves`.
    names: `{rule: label}`.
    most: panels at most.
  """
  found = found[:most]
  figure = Figure(figsize=(max(3.6 * len(found), 6.5), 3.9), dpi=110, layout='constrained')
  axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
  colours = {'any': '#999999', 'single': '#999999'}
  colours |= dict(zip(('best', 'weighted', 'medoid'), COLOURS))
  for axis, rules in zip(axes, found):
    for rule, points in rules.curves.items():
      # what frames the rules is no rule itself: it is grey, and has no band to hide theirs
      bound = rule in ('any', 'single')
      mean, low, high = np.array(points).T
      line = (
        {'ls': '--' if rule == 'any' else ':', 'lw': 1.4} if bound else {'marker': 'o', 'ms': 4}
      )
      axis.plot(rules.sizes, mean, color=colours[rule], label=names[rule], **line)
      if not bound:
        axis.fill_between(rules.sizes, low, high, color=colours[rule], alpha=0.1, lw=0)
    _scale_by_doublings(axis)
    _finish_axis(axis, 'samples N')
    axis.set_title(rules.arm, size=10)
  axes[0].set_ylabel('accuracy')
  handles = axes[0].get_legend_handles_labels()
  figure.legend(*handles, loc='outside lower center', ncols=3, frameon=False, fontsize=9)
  return _encode_figure(figure)


def plot_laws(found) -> bytes:
  """Errors (left) and searched scores (right) by budget, with the laws fitted to them.

  Args:
    found: `tables.FittedLaws`.
  """
  figure = Figure(figsize=(11, 4.2), dpi=110, layout='constrained')
  left, right = figure.subplots(1, 2)
  for i, law in enumerate(found):
    style, fine = _line_style(i), np.geomspace(1, law.k.max(), 60)
    # no error at all has no place on a log axis, so it is drawn at 0.001
    mean, low, high = np.maximum(np.array(law.errors).T, 1e-3)
    left.errorbar(
      law.k, mean, [mean - low, high - mean], fmt='o', ms=4, capsize=2, color=style['color'], lw=0.8
    )
    a, b, c = (e.value for e in law.power[:3])
    left.plot(fine, np.maximum(a * fine**-b + c, 1e-3), lw=1.6, label=law.name, **style)
    if law.log:
      # families are searched on different verifiers, so scores are drawn as gains in their spread
      start = law.scores[law.k.argmin()]
      right.plot(law.k, (law.scores - start) / law.spread, 'o', ms=4, color=style['color'])
      line = law.log.alpha.value * np.log(fine) + law.log.beta.value
      right.plot(fine, (line - start) / law.spread, lw=1.6, **style)
  left.set_yscale('log')
  left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5), numticks=10))
  left.yaxis.set_major_formatter(lambda y, _: f'{y:g}')
  left.yaxis.set_minor_formatter(NullFormatter())
  left.set_ylabel('error (1 - accuracy)')
  right.set_ylabel('searched score gained, standard deviations')
  for axis in (left, right):
    _scale_by_doublings(axis)
    _finish_axis(axis, 'compute, in units of the smallest budget')
  handles = left.get_legend_handles_labels()
  figure.legend(*handles, loc='outside lower center', ncols=5, frameon=False, fontsize=9)
  return _encode_figure(figure)


def plot_curves(families, seconds) -> bytes:
  """Accuracy with its interval against NFE, FLOPs and seconds per prompt, a line for each family.

  Args:
    families: `stats.Family`.
    seconds: `{family: seconds per prompt of each of its points}`.
  """
  figure = Figure(figsize=(13, 4.4), dpi=110, layout='constrained')
  axes = figure.subplots(1, 3, sharey=True)
  for axis, (key, label) in zip(axes, COST_AXES.items()):
    for i, family in enumerate(families):
      x = seconds.get(family.name) if key == 'seconds' else [p.cost[key] for p in family.points]
      # a family some of whose points have no seconds (runs merged without timing) is left out
      if not x or len(x) != len(family.points):
        continue
      # what costs nothing has no place on a log axis
      paid = np.asarray(x, float) > 0
      x = np.asarray(x, float)[paid]
      mean, low, high = np.array([p.accuracy for p in family.points])[paid].T
      style = _line_style(i)
      axis.fill_between(x, low, high, color=style['color'], alpha=0.12, lw=0)
      axis.plot(x, mean, marker='o', ms=4, lw=1.8, label=family.name, **style)
      # the band of a single point has no width
      if len(x) == 1:
        axis.errorbar(x, mean, [mean - low, high - mean], capsize=3, **style)
    axis.set_xscale('log')
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    axis.xaxis.set_major_formatter(EngFormatter(sep=''))
    axis.xaxis.set_minor_formatter(NullFormatter())
    _finish_axis(axis, f'{label} per prompt')
  axes[0].set_ylabel('accuracy')
  figure.legend(
    *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False
  )
  return _encode_figure(figure)


def plot_grid(grids, most: int = 6) -> bytes:
  """Outputs by budget: a block for each arm, a row for each prompt; green is right, red is wrong.

  Args:
    grids: `[(arm, budgets, [(prompt, [(picture or text, is it right?)])])]`.
    most: rows of a block at most.
  """
  blocks = [(name, columns, entries[:most]) for name, columns, entries in grids]
  rows = sum(len(b[2]) for b in blocks)
  wide = max(len(b[1]) for b in blocks)
  # laid out by hand in inches, from the top down, so that every output has the same size
  figure = Figure(figsize=(3.4 + 0.85 * wide, 0.95 * rows + 0.55 * len(blocks)), dpi=100)
  height, width = figure.get_figheight(), figure.get_figwidth()
  top = height
  for name, columns, entries in blocks:
    top -= 0.5
    figure.text(0.1 / width, (top + 0.12) / height, name, weight='bold', size=11)
    for j, column in enumerate(columns):
      x = 3.4 + 0.85 * j + 0.4
      figure.text(x / width, (top + 0.12) / height, column, ha='center', size=8, color='#555555')
    for prompt, outputs in entries:
      top -= 0.95
      text = textwrap.fill(prompt, 38)
      figure.text(0.1 / width, (top + 0.45) / height, text, va='center', size=9)
      for j, (output, right) in enumerate(outputs):
        box = ((3.4 + 0.85 * j) / width, (top + 0.08) / height, 0.78 / width, 0.78 / height)
        axis = figure.add_axes(box, xticks=[], yticks=[])
        if isinstance(output, str):
          axis.text(0.5, 0.5, textwrap.fill(output, 14), ha='center', va='center', size=5)
        else:
          axis.imshow(output, interpolation='nearest')
        for spine in axis.spines.values():
          spine.set(color=RIGHT if right else WRONG, linewidth=2.5)
  return _encode_figure(figure)


def plot_genealogy(trace) -> bytes:
  """A column for each step, a line from each candidate to its parent, the winner's line framed.

  Args:
    trace: arrays of `study.genealogy.trace_ancestry` and `leader_outputs`.
  """
  totals, parent, winner = (trace[k] for k in ('totals', 'parent', 'winner'))
  # of a long search the steps that the winner came from, the last ones
  shown = np.arange(len(totals))
  if len(totals) > MOST_STEPS:
    shown = np.flatnonzero(winner >= 0)[-MOST_STEPS:]
  place = {int(s): x for x, s in enumerate(shown)}
  # a figure of one candidate or one step would be cut off at its labels
  tallest = max(max(int(np.isfinite(t).sum()) for t in totals), 2)
  width = max(len(shown), 3)
  figure = Figure(figsize=(1.25 * width + 0.6, 0.95 * tallest + 0.6), dpi=100)
  axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
  axis.set(xlim=(-0.6, width - 0.4), ylim=(-tallest + 0.3, 0.95))
  axis.axis('off')
  for s, x in place.items():
    axis.text(
      x, 0.72, f'{int(trace["stage"][s].max())} stages', ha='center', size=8, color='#555555'
    )
    for j in range(totals.shape[1]):
      if not math.isfinite(totals[s, j]):
        continue
      up, own = int(parent[s, j]), winner[s] == j
      # lines end beside the pictures and lie below them; a parent may be several steps back
      back = place.get(int(trace['parent_step'][s, j]), -1)
      if up >= 0 and back >= 0:
        line = {'color': WINNER, 'lw': 2.4} if own else {'color': '#bbbbbb', 'lw': 0.9}
        axis.plot((back + 0.28, x - 0.28), (-up, -j), zorder=1, **line)
      if 'images' in trace:
        pixels = trace['images'][s, j]
        picture = OffsetImage(pixels, zoom=52 / pixels.shape[0], interpolation='nearest')
      else:
        text = textwrap.fill(str(trace['texts'][s, j]), 16)
        picture = TextArea(text, textprops={'size': 6})
      frame = {'edgecolor': WINNER if own else '#999999', 'linewidth': 2.6 if own else 0.6}
      axis.add_artist(AnnotationBbox(picture, (x, -j), pad=0.1, bboxprops=frame))
      axis.text(x, -j - 0.42, f'{totals[s, j]:.2f}', ha='center', va='center', size=7)
  return _encode_figure(figure)
