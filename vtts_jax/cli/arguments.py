"""What the commands share: errors in one line, numbers within bounds, `--verifier.KEY=VALUE`."""

import argparse
import ast
from collections.abc import Sequence

from vtts_jax.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
  """A parser whose errors are `ConfigError`s."""

  def error(self, message: str):
    raise ConfigError(message)


def refuse_unknown(rest: Sequence[str], command: str, allowed: Sequence[str]) -> None:
  """Raises `ConfigError` where there is an argument that a command does not have."""
  if rest:
    flag = rest[0].partition('=')[0]
    kind = 'flag' if flag.startswith('-') else 'argument'
    raise ConfigError(f'unknown {kind} {flag}; allowed for vtts {command}: {", ".join(allowed)}')


def integer_from(low: int):
  """A type of argument: integers of at least `low`."""

  def read(text: str) -> int:
    if not text.lstrip('-').isdigit() or int(text) < low:
      raise argparse.ArgumentTypeError(f'must be an integer >= {low}, got {text!r}')
    return int(text)

  return read


# ------------------------------------------------------------------------------------- verifiers


def add_verifier(parser: argparse.ArgumentParser) -> None:
  """Adds `--verifier=NAME`; its settings stay in the rest, see `build_verifier`."""
  parser.add_argument(
    '--verifier',
    metavar='NAME',
    default='',
    help='a verifier of the package, e.g. verifiers.clip, or a module of yours; its settings are '
    '--verifier.KEY=VALUE (vtts list NAME shows them)',
  )


def build_verifier(name: str, rest: Sequence[str], command: str, flags: Sequence[str]):
  """The verifier that the arguments ask for, which must score pictures alone.

  Args:
    name: of `--verifier`.
    rest: arguments that argparse left.
    command, flags: the command and its own flags, for messages.

  Raises:
    ConfigError: an unknown argument, no verifier, a setting that the verifier refuses.
  """
  from vtts_jax import components, core

  settings, unknown = {}, []
  for argument in rest:
    flag, given, value = argument.partition('=')
    if flag.startswith('--verifier.') and given:
      settings[flag.removeprefix('--verifier.')] = _python_value(value)
    else:
      unknown.append(argument)
  refuse_unknown(unknown, command, ('--verifier=NAME', '--verifier.KEY=VALUE', *flags))
  if not name:
    known = (n for n in components.list_components() if n.startswith('verifiers.'))
    allowed = ', '.join(known)
    raise ConfigError(f'--verifier=NAME is missing; allowed: {allowed}, or a module of yours')
  verifier = components.load(name, **settings)
  if not isinstance(verifier, core.Verifier):
    raise ConfigError(f'--verifier={name}: must be a verifier')
  if verifier.needs != frozenset({'image'}):
    needs = ', '.join(sorted(verifier.needs - {'image'})) or 'no image'
    raise ConfigError(f'--verifier={name}: needs {needs} of a generator; must score pictures alone')
  verifier.check()
  return verifier


def build_scorer(verifier):
  """A scorer on all devices of this process."""
  import jax

  from vtts_jax.engine import sharding
  from vtts_jax.engine.scorer import Scorer

  return Scorer(verifier, sharding.make_mesh() if len(jax.local_devices()) > 1 else None)


def _python_value(text: str):
  """A number, a tuple ... where the text is one in Python, else the text itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
