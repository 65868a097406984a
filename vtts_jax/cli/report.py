"""Write the report of a run, or one report of several runs."""

import argparse

from vtts_jax.cli.arguments import refuse_unknown


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the run directories and `--out`."""
  parser.add_argument('runs', nargs='*', metavar='RUN', help='run directories')
  parser.add_argument(
    '--out',
    metavar='DIR',
    default=None,
    help='where to write report.html; the run itself by default, and for several runs the '
    "directory 'report' beside the first",
  )


def run_command(args: argparse.Namespace, rest: list[str]) -> int:
  """Writes the report; returns the exit code."""
  from vtts_jax.errors import ConfigError
  from vtts_jax.report import console, page

  refuse_unknown(rest, 'report', ('--out=DIR',))
  if not args.runs:
    raise ConfigError('give run directories: vtts report runs/NAME [runs/OTHER ...] [--out=DIR]')
  # the table is of one run, as `vtts run` prints it; several runs have their page alone
  written = page.write_report(*args.runs, out=args.out)
  if len(args.runs) == 1 and args.out is None:
    console.print_summary(args.runs[0])
  else:
    print(written)
  return 0
