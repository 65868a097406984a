"""The command line: `vtts run`, `report`, `score`, `serve`, `list`.

Each command is a module of `cli/` with `add_arguments(parser)` and `run_command(args, rest)`, where
`rest` holds the arguments that argparse does not know: settings of a config or a component. A
setting that cannot be run is one line on stderr and exit code 2.
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
SETTINGS = ('--config.', '--verifier.')
EXAMPLES = """\
examples:
  vtts run --config=configs/scenes.py:demo                      the embedded study, two minutes
  vtts run --config=configs/scenes.py:beam,runlocal --config.search.width=8
  vtts run --config=FILE --help                                 every setting of a config
  vtts report runs/RUN                                          write its report.html again
  vtts score --verifier=verifiers.clip pictures/ --prompts=prompts.txt
  vtts list search.beam                                         the settings of a component
"""


def cli(argv: list[str] | None = None) -> int:
  """Entry point of the console script; returns the exit code."""
  argv = sys.argv[1:] if argv is None else list(argv)
  parser = build_parser()
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(parser.format_help())
    return 0
  if argv[0] not in COMMANDS:
    return _fail(f'unknown command {argv[0]!r}; allowed: {", ".join(COMMANDS)}')
  # settings of a config or a component are not argparse's, which takes one with a space for a file
  settings = [a for a in argv if a.startswith(SETTINGS)]
  try:
    args, rest = parser.parse_known_args([a for a in argv if not a.startswith(SETTINGS)])
    return COMMANDS[argv[0]].run_command(args, settings + rest)
  except ConfigError as err:
    return _fail(f'{argv[0]}: {err}')
  except SystemExit as stop:  # argparse has printed the help of a command
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
  for name, module in COMMANDS.items():
    summary, _, details = module.__doc__.partition('\n')
    command = commands.add_parser(
      name,
      help=summary,
      description=f'{summary}\n{details}',
      formatter_class=argparse.RawDescriptionHelpFormatter,
      allow_abbrev=False,
      add_help=module is not run,  # whose --help lists the settings of a config
    )
    module.add_arguments(command)
  return parser


def _fail(message: str) -> int:
  print(f'vtts: {message}', file=sys.stderr)
  return 2


if __name__ == '__main__':
  sys.exit(cli())
