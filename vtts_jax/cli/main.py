"""The command line: `vtts run`, `report`, `score`, `serve`, `list`.

Each command is a module of `cli/` that is named in `COMMANDS`. It has a docstring, which is its
help, and two functions: `add_arguments(parser)`, and `run_command(args, rest)`, which returns the
exit code. `rest` holds the arguments that argparse does not know: settings of a config or of a
component. A command that cannot run prints one line on stderr, and its exit code is 2.
"""

import argparse
import sys

from vtts_jax.cli import list as list_command
from vtts_jax.cli import report, run, score, serve
from vtts_jax.cli.arguments import OneLineParser
from vtts_jax.errors import ConfigError

COMMANDS = {
  'run': run,
  'report': report,
  'score': score,
  'serve': serve,
  'list': list_command,
}
SETTING_PREFIXES = ('--config.', '--verifier.')
EXAMPLES = """\
examples:
  vtts run --config=configs/scenes.py:demo                      the embedded study, two minutes
  vtts run --config=configs/scenes.py:beam,runlocal --config.search.width=8
  vtts run --config=FILE --help                                 every setting of a config
  vtts report runs/RUN                                          write its report.html again
  vtts score --verifier=verifiers.clip pictures/ --prompts=prompts.txt
  vtts list search.beam                                         the settings of a component
"""


def run_cli(argv: list[str] | None = None) -> int:
  """Runs the command that the arguments name; returns the exit code.

  It is the entry point of the console script `vtts`.
  """
  argv = sys.argv[1:] if argv is None else list(argv)
  parser = build_parser()
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(parser.format_help())
    return 0
  if argv[0] not in COMMANDS:
    return _print_failure(f'unknown command {argv[0]!r}; allowed: {", ".join(COMMANDS)}')
  # settings of a config or a component are not argparse's, which takes one with a space for a file
  settings = [a for a in argv if a.startswith(SETTING_PREFIXES)]
  try:
    args, rest = parser.parse_known_args([a for a in argv if not a.startswith(SETTING_PREFIXES)])
    return COMMANDS[argv[0]].run_command(args, settings + rest)
  except ConfigError as err:
    return _print_failure(f'{argv[0]}: {err}')
  # argparse ends the process once it has printed the help of a command
  except SystemExit as stop:
    return stop.code or 0


def build_parser() -> argparse.ArgumentParser:
  """The parser of all commands."""
  parser = OneLineParser(
    'vtts',
    description='Visual test-time scaling via search, in JAX.',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(metavar='COMMAND', required=True)
  # a command's help is the docstring of its module, so that the two cannot disagree
  for name, module in COMMANDS.items():
    summary, _, details = module.__doc__.partition('\n')
    command = commands.add_parser(
      name,
      help=summary,
      description=f'{summary}\n{details}',
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      # the help of `run` may have to list the settings of a config, so it prints its own
      add_help=module is not run,
    )
    module.add_arguments(command)
  return parser


def _print_failure(message: str) -> int:
  """Prints why a command cannot run; returns its exit code."""
  print(f'vtts: {message}', file=sys.stderr)
  return 2


if __name__ == '__main__':
  sys.exit(run_cli())
