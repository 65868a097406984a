"""The command line: `vtts run`, `report`, `score`, `serve`, `list`."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HELP = """\
vtts: visual test-time scaling via search, in JAX

  vtts run --config=FILE[:ARGS] [--config.KEY=VALUE ...]   run a study; the same command resumes it
     ... --distributed                                     one process of many (see launch/)
  vtts report RUN [RUN ...] [--out=DIR]                    write report.html; several runs in one
  vtts score --verifier=NAME [--verifier.KEY=VALUE ...] IMAGES [--prompts=FILE_OR_TEXT]
     [--out=FILE.jsonl] [--batch=32]                       score a folder or .jsonl of pictures
  vtts serve --verifier=NAME [--port=8500] [--host=...]    a verifier in its own process, for
                                                           verifiers.host --verifier.url=...
  vtts list [NAME]                                         components; the settings of one

  vtts run --config=configs/scenes.py:demo                 the embedded study, two minutes
  vtts run --config=configs/scenes.py:beam,runlocal --config.search.width=8
  vtts run --config=FILE --help                            every setting of a config
"""


def cli(argv: list[str] | None = None) -> int:
  """Entry point of the console script; returns the exit code (2 for a setting that cannot be
  run)."""
  argv = sys.argv[1:] if argv is None else argv
  commands = {
    'run': command_run,
    'report': command_report,
    'score': command_score,
    'serve': command_serve,
    'list': command_list,
  }
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(HELP)
    return 0
  from vtts_jax.errors import ConfigError

  if argv[0] not in commands:
    return _fail(f'unknown command {argv[0]!r}; allowed: {", ".join(commands)}')
  try:
    return commands[argv[0]](argv[1:])
  except ConfigError as err:
    return _fail(f'{argv[0]}: {err}')


def _fail(message: str) -> int:
  print(f'vtts: {message}', file=sys.stderr)
  return 2


# -----------------------------------------------------------------------------------------------
# run


def command_run(argv: list[str]) -> int:
  distributed = '--distributed' in argv
  config = read_config([a for a in argv if a != '--distributed'])
  if config is None:
    return 0
  from vtts_jax.report import page as report
  from vtts_jax.study import execute as study
  from vtts_jax.study import progress
  from vtts_jax.study.store import Store

  built = study.arms(config)
  import jax

  if distributed:  # on a TPU pod nothing needs to be set; elsewhere these three
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    jax.distributed.initialize(
      os.environ.get('JAX_COORDINATOR_ADDRESS'),
      number('JAX_NUM_PROCESSES'),
      number('JAX_PROCESS_ID'),
    )
  process, processes = jax.process_index(), jax.process_count()
  store = Store(config['workdir'], config, environment(), process, processes)
  show = progress.Progress(config, built, store, quiet=process != 0)
  with show:
    study.execute(config, built, store, on_batch=show.batch)
  if distributed:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices('all prompts done')
  if process == 0:
    report.write(store.root)
    progress.table(store.root)
  return 0


def read_config(argv: list[str]) -> dict | None:
  """The config that the flags ask for, as a plain dictionary; None when only help was wanted.

  Raises:
    ConfigError: no or an unreadable config file, an unknown key, a value of the wrong type.
  """
  from vtts_jax.errors import ConfigError

  if not any(a.startswith('--config=') for a in argv) and '--config' not in argv:
    raise ConfigError('--config=FILE[:ARGS] is missing, e.g. --config=configs/scenes.py:demo')
  wants_help = any(a in ('-h', '--help') for a in argv)
  argv = [a for a in argv if a not in ('-h', '--help')]
  plain = _parse([a for a in argv if a.split('=')[0] in ('--config', '-config')])
  for flag in (a.split('=')[0] for a in argv):
    _check_key(flag, plain)
  config = _parse(argv).to_dict()
  help_text = config.pop('help', '')
  if wants_help:
    print(help_text, json.dumps(config, indent=1))
    return None
  return json.loads(json.dumps(config))


def _parse(argv: list[str]):
  from absl import flags
  from ml_collections import config_flags

  from vtts_jax.errors import ConfigError

  full = ['vtts run', *argv]
  values = flags.FlagValues()
  try:
    holder = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=full)
    rest = values(full)
    config = holder.value
    config.keys()  # a file that failed to load fails here, not at its first use
  except Exception as err:  # a config file is the user's code, so it may raise anything
    said = ' '.join(str(err).split()) or repr(err)
    raise ConfigError(f'{" ".join(argv)}: {said}') from None
  if len(rest) > 1:
    raise ConfigError(f'unknown argument {rest[1]!r}; settings are --config.KEY=VALUE')
  return config


def _check_key(flag: str, config) -> None:
  """Raises `ConfigError` where a flag names no setting, with the settings that stand beside it."""
  from vtts_jax.errors import ConfigError

  if not flag.startswith('-') or flag == '--config':
    return
  first, *keys = flag.lstrip('-').split('.')
  if first != 'config':
    allowed = '--config=FILE[:ARGS], --config.KEY=VALUE, --distributed'
    raise ConfigError(f'unknown flag {flag}; allowed: {allowed}')
  for i, key in enumerate(keys):
    if not hasattr(config, 'keys') or key not in config:
      beside = ', '.join(config.keys()) if hasattr(config, 'keys') else 'nothing below it'
      raise ConfigError(f'unknown flag {flag}; allowed in {".".join([first, *keys[:i]])}: {beside}')
    config = config[key]


def environment() -> dict[str, str]:
  """What ran: git revision, versions, device kind."""
  import jax

  root = Path(__file__).parents[1]
  revision = subprocess.run(
    ['git', 'rev-parse', 'HEAD'], cwd=root, capture_output=True, text=True, check=False
  ).stdout.strip()
  return {
    'vtts_jax': metadata.version('vtts_jax'),
    'revision': revision or 'unknown',
    'jax': jax.__version__,
    'flax': metadata.version('flax'),
    'python': platform.python_version(),
    'device': f'{jax.local_device_count()} x {jax.devices()[0].device_kind}',
    'host': f'{platform.machine()}, {os.cpu_count()} cores',
  }


# ------------------------------------------------------------------------------------ report and
# list


def command_report(argv: list[str]) -> int:
  from vtts_jax.errors import ConfigError
  from vtts_jax.report import page as report
  from vtts_jax.study import progress

  out = [a.removeprefix('--out=') for a in argv if a.startswith('--out=')]
  roots = [a for a in argv if not a.startswith('--out=')]
  unknown = [a for a in roots if a.startswith('-')]
  if unknown:
    raise ConfigError(f'unknown flag {unknown[0]}; allowed: --out=DIR')
  if not roots or len(out) > 1:
    raise ConfigError('give run directories: vtts report runs/NAME [runs/OTHER ...] [--out=DIR]')
  page = report.write(*roots, out=out[0] if out else None)
  if len(roots) == 1 and not out:
    progress.table(roots[0])
  else:
    print(page)
  return 0


def command_score(argv: list[str]) -> int:
  from vtts_jax.engine import scorer as score

  return score.command_score(argv)


def command_serve(argv: list[str]) -> int:
  from vtts_jax.engine import scorer as score

  return score.command_serve(argv)


def command_list(argv: list[str]) -> int:
  from rich.console import Console
  from rich.table import Table

  from vtts_jax import components
  from vtts_jax.errors import ConfigError

  known = components.components()
  if argv:
    if argv[0] not in known:
      raise ConfigError(f'unknown component {argv[0]!r}; allowed: {", ".join(known)}')
    print(components.describe(argv[0]))
    return 0
  table = Table('component', 'what it is', box=None, pad_edge=False)
  for name, line in known.items():
    table.add_row(name, line)
  Console(width=None if sys.stdout.isatty() else 140).print(table)
  return 0


if __name__ == '__main__':
  sys.exit(cli())
