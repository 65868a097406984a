"""List the components, or show the settings of one."""

import argparse
import sys

from vtts_jax.cli.arguments import refuse_unknown


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the name of a component."""
  parser.add_argument('name', nargs='?', metavar='NAME', help='a component, e.g. search.beam')


def run_command(args: argparse.Namespace, rest: list[str]) -> int:
  """Prints one component, or the table of all; returns the exit code."""
  from rich.console import Console
  from rich.table import Table

  from vtts_jax import components

  refuse_unknown(rest, 'list', ('NAME',))
  if args.name:
    print(components.describe_component(args.name))
    return 0
  table = Table('component', 'what it is', box=None, pad_edge=False)
  for name, line in components.list_components().items():
    table.add_row(name, line)
  # a pipe has no width: without one rich would cut the lines at 80 columns
  Console(width=None if sys.stdout.isatty() else 140).print(table)
  return 0
