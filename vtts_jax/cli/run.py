"""Run a study; the same command resumes it.

Settings are those of the config file: --config=FILE[:ARGS] --config.KEY=VALUE ...
With --help as well as --config, all settings of that config are printed.
"""

import argparse
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from vtts_jax.errors import ConfigError

ALLOWED = '--config=FILE[:ARGS], --config.KEY=VALUE, --distributed'


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('-h', '--help', action='store_true', help='print this help, or the settings')
  parser.add_argument(
    '--config', metavar='FILE[:ARGS]', help='a config file, e.g. configs/scenes.py:demo'
  )
  parser.add_argument(
    '--distributed', action='store_true', help='one process of many, see launch/'
  )
  parser.set_defaults(print_help=parser.print_help)


def run_command(args: argparse.Namespace, rest: list[str]) -> int:
  if args.help and args.config is None:
    args.print_help()
    return 0
  config = read_config(([] if args.config is None else [f'--config={args.config}']) + rest)
  help_text = config.pop('help', '')
  if args.help:
    print(help_text, json.dumps(config, indent=1))
    return 0
  return run_study(config, args.distributed)


def run_study(config: dict, distributed: bool = False) -> int:
  """Runs a study, writes its report and prints the final table; returns the exit code."""
  import jax

  from vtts_jax.report import console, page
  from vtts_jax.study.arms import build_study
  from vtts_jax.study.execute import execute_study
  from vtts_jax.study.progress import StudyProgress
  from vtts_jax.study.store import Store

  if distributed:  # before any device is used
    join_processes()
  study = build_study(config)
  process, processes = jax.process_index(), jax.process_count()
  store = Store(config['workdir'], config, read_environment(), process, processes)
  with StudyProgress(study, store, quiet=process != 0) as progress:
    execute_study(study, store, progress.show_batch)
  if distributed:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices('all prompts done')
  if process == 0:
    page.write_report(store.root)
    console.print_summary(store.root)
  return 0


def join_processes() -> None:
  """Makes this process one of many; on a TPU pod none of the three variables need be set."""
  import jax

  def number(name):
    return int(os.environ[name]) if name in os.environ else None

  jax.distributed.initialize(
    os.environ.get('JAX_COORDINATOR_ADDRESS'), number('JAX_NUM_PROCESSES'), number('JAX_PROCESS_ID')
  )


def read_environment() -> dict[str, str]:
  """What ran: git revision, versions, device kind."""
  import jax

  root = Path(__file__).parents[2]
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


# ---------------------------------------------------------------------------------------- configs


def read_config(argv: list[str]) -> dict:
  """The config that the flags ask for, as a plain dictionary.

  Raises:
    ConfigError: no or an unreadable config file, an unknown key, a value of the wrong type.
  """
  named = [a for a in argv if a.startswith('--config=')]
  if not named:
    raise ConfigError('--config=FILE[:ARGS] is missing, e.g. --config=configs/scenes.py:demo')
  config = _parse_flags(named)
  for argument in argv:
    _check_key(argument.split('=')[0], config)
  return json.loads(json.dumps(_parse_flags(argv).to_dict()))


def _parse_flags(argv: list[str]):
  """The `ConfigDict` of a file with the values that flags change."""
  from absl import flags
  from ml_collections import config_flags

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
  if not flag.startswith('-') or flag == '--config':
    return
  first, *keys = flag.lstrip('-').split('.')
  if first != 'config':
    raise ConfigError(f'unknown flag {flag}; allowed: {ALLOWED}')
  for i, key in enumerate(keys):
    if not hasattr(config, 'keys') or key not in config:
      beside = ', '.join(config.keys()) if hasattr(config, 'keys') else 'nothing below it'
      raise ConfigError(f'unknown flag {flag}; allowed in {".".join([first, *keys[:i]])}: {beside}')
    config = config[key]
