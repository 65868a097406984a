"""What a person sees while a study runs: its bill, and a bar with the time that is left."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from vtts_jax.study.arms import Study
from vtts_jax.study.store import Store


class StudyProgress:
  """A progress bar over all (arm, seed, prompt) of a study; use it in a `with` block.

  Args:
    study: what runs.
    store: where it writes.
    quiet: whether nothing is printed; so in every process but the first.
  """

  def __init__(self, study: Study, store: Store, quiet: bool = False):
    # stderr, so that the final table alone stands on stdout
    self.console = Console(quiet=quiet, stderr=True)
    self.console.print(f'run directory: {store.root}')
    for key, (then, now) in store.changed.items():
      self.console.print(f'[yellow]resumed with another {key}: {then} then, {now} now[/yellow]')
    self.console.print(_bill_table(study))
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn('{task.fields[rate]}'))
    self.bar = Bar(
      TextColumn('{task.description}'), *columns, TimeRemainingColumn(), console=self.console
    )
    total = len(study.prompts) * len(study.arms) * len(study.config['seeds'])
    self.task = self.bar.add_task('', total=total, rate='')

  def __enter__(self):
    self.bar.start()
    return self

  def __exit__(self, *exc):
    self.bar.stop()

  def show_batch(self, arm, seed, prompts) -> None:
    """Moves the bar on by one batch."""
    self.bar.update(self.task, advance=len(prompts), description=f'{arm.name} seed {seed}')
    # rich knows a speed only after two updates
    speed = self.bar.tasks[0].finished_speed or self.bar.tasks[0].speed
    if speed:
      self.bar.update(self.task, rate=f'{speed:.1f} prompts/s')


def _bill_table(study: Study) -> Table:
  """The bill of every arm, which is exact before anything runs."""
  columns = ('arm', 'generator evals', 'observations', 'verifier evals', 'GFLOP')
  table = Table(*columns, title='per prompt')
  for arm in study.arms:
    numbers = (arm.cost.generator, arm.cost.observe, arm.cost.verify)
    table.add_row(arm.name, *(f'{n:,.0f}' for n in numbers), f'{arm.cost.flops / 1e9:,.2f}')
  return table
