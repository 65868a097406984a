"""What a person sees while a study runs and when it is done: the bill, a bar with an ETA, a
table."""

import json

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from vtts_jax.report import stats
from vtts_jax.study import execute as study
from vtts_jax.study import grading
from vtts_jax.study.store import read_results


class Progress:
  """A progress bar over all (arm, seed, prompt); silent when `quiet` (every process but the
  first)."""

  def __init__(self, config, arms, store, quiet=False):
    self.console = Console(quiet=quiet, stderr=True)
    entries = len(study.prompts(config))
    bill = Table('arm', 'generator evals', 'renders', 'verifier evals', 'GFLOP', title='per prompt')
    for arm in arms:
      c = arm.cost
      numbers = (c.generator, c.render, c.verify)
      bill.add_row(arm.name, *(f'{n:,.0f}' for n in numbers), f'{c.flops / 1e9:,.2f}')
    self.console.print(f'run directory: {store.root}')
    for key, (then, now) in store.changed.items():
      self.console.print(f'[yellow]resumed with another {key}: {then} then, {now} now[/yellow]')
    self.console.print(bill)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[rate]}'))
    self.bar = Bar(
      TextColumn('{task.description}'), *columns, TimeRemainingColumn(), console=self.console
    )
    self.task = self.bar.add_task('', total=entries * len(arms) * len(config['seeds']), rate='')

  def __enter__(self):
    self.bar.start()
    return self

  def __exit__(self, *exc):
    self.bar.stop()

  def batch(self, arm, seed, batch, ran):
    self.bar.update(self.task, advance=len(batch), description=f'{arm.name} seed {seed}')
    speed = self.bar.tasks[0].finished_speed or self.bar.tasks[0].speed
    if speed:
      self.bar.update(self.task, rate=f'{speed:.1f} prompts/s')


def table(root) -> None:
  """The final table: accuracy with its interval, score and cost of every arm."""
  rows = read_results(root)
  config = json.loads((epath.Path(root) / 'config.json').read_text())['config']
  graded = config['metric'] != grading.NONE
  console = Console(width=None if Console().is_terminal else 140)
  out = Table(
    'arm', 'pass@1', 'accuracy (95 %)', 'searched score', 'NFE', 'GFLOP', 'prompts x seeds'
  )
  for arm in stats.arms(rows):
    first, last = arm.points[0], arm.points[-1]
    out.add_row(
      arm.name,
      f'{first.accuracy.mean:.3f}' if arm.ladder and graded else '',
      f'{last.accuracy.mean:.3f} [{last.accuracy.low:.3f}, {last.accuracy.high:.3f}]'
      if graded
      else 'not graded',
      f'{last.total.mean:.3f}',
      f'{last.cost["generator"]:,.0f}',
      f'{last.cost["flops"] / 1e9:,.2f}',
      f'{arm.prompts} x {arm.seeds}',
    )
  console.print(out)
  bad: dict[str, int] = {}
  for row in rows:
    for name, count in row['bad'].items():
      bad[name] = bad.get(name, 0) + count
  for name, count in bad.items():
    console.print(f'[red]{count} NaN or infinite scores of {name}; never selected[/red]')
  lost = [(r['arm'], r['seed'], r['id']) for r in rows if not r['found']]
  if lost:
    console.print(f'[red]no finite score, no picture: (arm, seed, prompt) {lost[:8]}[/red]')
  console.print(f'{root}/report.html')
