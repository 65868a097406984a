"""Run a study; the same command resumes it.

Settings are those of the config file: --config=FILE[:ARGS] --config.KEY=VALUE ...
With both --config and --help, all settings of that config are printed.
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
  """Adds `--config`, `--distributed` and a help of its own."""
  parser.add_argument('-h', '--help', action='store_true', help='print this help, or the settings')
  parser.add_argument(
    '--config', metavar='FILE[:ARGS]', help='a config file, e.g. configs/scenes.py:demo'
  )
  parser.add_argument(
    '--distributed', action='store_true', help='one process of many, see launch/'
  )
  parser.set_defaults(print_help=parser.print_help)


def run_command(args: argparse.Namespace, rest: list[str]) -> int:
  """Runs the study that the arguments ask for, or prints its settings; returns the exit code."""
  if args.help and args.config is None:
    args.print_help()
    return 0
  # argparse has taken --config, which ml_collections must see together with its settings
  config = read_config(([] if args.config is None else [f'--config={args.config}']) + rest)
  help_text = config.pop('help', '')
  if args.help:
    print(help_text, json.dumps(config, indent=1))
    return 0
  return run_study(config, args.distributed)


def run_study(config: dict, distributed: bool = False) -> int:
  """Runs a study, writes its report and prints the final table; returns the exit code.

  Args:
    config: the settings, a plain nested dictionary.
    distributed: whether this is one process of many.

  Raises:
    ConfigError: a study that cannot run; nothing has been written then.
  """
  import jax

  from vtts_jax.report import console, page
  from vtts_jax.study.arms import build_study
  from vtts_jax.study.execute import execute_study
  from vtts_jax.study.progress import StudyProgress
  from vtts_jax.study.store import Store

  # the processes must find each other before any of them asks JAX for a device
  if distributed:
    join_processes()
  study = build_study(config)
  process, processes = jax.process_index(), jax.process_count()
  store = Store(config['workdir'], config, read_environment(), process, processes)
  with StudyProgress(study, store, quiet=process != 0) as progress:
    execute_study(study, store, progress.show_batch)
  # the report reads the lines of all processes, so the first one waits for the others
  if distributed:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices('all prompts done')
  if process == 0:
    page.write_report(store.root)
    console.print_summary(store.root)
  return 0


def join_processes() -> None:
  """Makes this process one of many.

  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say which; on a TPU pod JAX finds
  out by itself.
  """
  import jax

  def read_integer(name):
    return int(os.environ[name]) if name in os.environ else None

  jax.distributed.initialize(
    os.environ.get('JAX_COORDINATOR_ADDRESS'),
    read_integer('JAX_NUM_PROCESSES'),
    read_integer('JAX_PROCESS_ID'),
  )


def read_environment() -> dict[str, str]:
  """What runs the study: git revision, versions, devices and host."""
  import jax

  # an installed copy stands in no repository; then the version must say what ran
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
  """The config that the flags ask for, as a plain nested dictionary.

  Args:
    argv: `--config=FILE[:ARGS]` and `--config.KEY=VALUE` flags.

  Raises:
    ConfigError: no config file or one that cannot be read, an unknown key, or a value of the wrong
      type.
  """
  named = [a for a in argv if a.startswith('--config=')]
  if not named:
    raise ConfigError('--config=FILE[:ARGS] is missing, e.g. --config=configs/scenes.py:demo')
  # the file is read twice: its own message for an unknown key would not say what is allowed
  config = _parse_flags(named)
  for argument in argv:
    _check_key(argument.split('=')[0], config)
  # through JSON, so that a config is hashed and compared as it will stand in config.json
  return json.loads(json.dumps(_parse_flags(argv).to_dict()))


def _parse_flags(argv: list[str]):
  """The `ConfigDict` of a config file, with the values that flags change.

  Raises:
    ConfigError: whatever the file or the flags raise.
  """
  from absl import flags
  from ml_collections import config_flags

  # flags of its own: absl's global ones would remember the config of an earlier call
  full = ['vtts run', *argv]
  values = flags.FlagValues()
  try:
    holder = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=full)
    rest = values(full)
    config = holder.value
    # a file that failed to load fails here, not at its first use
    config.keys()
  # a config file is the user's code, so it may raise anything
  except Exception as err:
    said = ' '.join(str(err).split()) or repr(err)
    raise ConfigError(f'{" ".join(argv)}: {said}') from None
  if len(rest) > 1:
    raise ConfigError(f'unknown argument {rest[1]!r}; settings are --config.KEY=VALUE')
  return config


def _check_key(flag: str, config) -> None:
  """Raises `ConfigError` for a flag that names no setting; the message has those that there are."""
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
