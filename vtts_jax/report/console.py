"""The final table of a run, on the terminal: accuracy, searched score and cost of every arm."""

import collections

from rich.console import Console
from rich.table import Table

from vtts_jax.report import runs, stats
from vtts_jax.study import grading
from vtts_jax.study.store import read_results, read_run_info


def print_summary(root) -> None:
  """Prints the table of a run directory, what was lost, and where the report is."""
  rows = runs.align_curves(read_results(root))
  graded = read_run_info(root)['config']['metric'] != grading.UNGRADED
  # a pipe has no width: without one rich would wrap the table at 80 columns
  console = Console(width=None if Console().is_terminal else 140)
  table = Table(
    'arm', 'pass@1', 'accuracy (95 %)', 'searched score', 'NFE', 'GFLOP', 'prompts x seeds'
  )
  for arm in stats.arm_statistics(rows):
    table.add_row(*_summary_cells(arm, graded))
  console.print(table)

  # losses stand below the table, because a mean hides them
  bad: collections.Counter[str] = collections.Counter()
  for row in rows:
    bad.update(row['bad'])
  for name, count in bad.items():
    console.print(f'[red]{count} NaN or infinite scores of {name}; never selected[/red]')
  lost = [(r['arm'], r['seed'], r['id']) for r in rows if not r['found']]
  if lost:
    console.print(f'[red]no finite score, no output: (arm, seed, prompt) {lost[:8]}[/red]')
  console.print(f'{root}/report.html')


def _summary_cells(arm: stats.ArmStats, graded: bool) -> tuple[str, ...]:
  """One row of the table."""
  first, last = arm.points[0].accuracy, arm.points[-1]
  accuracy = last.accuracy
  interval = f'{accuracy.mean:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]'
  return (
    arm.name,
    # only best-of-N begins with a single sample
    f'{first.mean:.3f}' if arm.holds_all_budgets and graded else '',
    interval if graded else 'not graded',
    f'{last.total.mean:.3f}',
    f'{last.cost["generator"]:,.0f}',
    f'{last.cost["flops"] / 1e9:,.2f}',
    f'{arm.prompts} x {arm.seeds}',
  )
