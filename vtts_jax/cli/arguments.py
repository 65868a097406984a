"""Arguments that several commands share, read so that every mistake is one line on stderr."""

import argparse
import ast
from collections.abc import Sequence

from vtts_jax.errors import ConfigError


class OneLineParser(argparse.ArgumentParser):
  """A parser whose errors are `ConfigError`s."""

  def error(self, message: str):
    """Raises `ConfigError`."""
    # argparse would print the usage of the command and end the process
    raise ConfigError(message)


def refuse_unknown(rest: Sequence[str], command: str, allowed: Sequence[str]) -> None:
  """Raises `ConfigError` for arguments that the command does not have.

  Args:
    rest: arguments that argparse has left.
    command: name of the command.
    allowed: what the message says is allowed.
  """
  if rest:
    flag = rest[0].partition('=')[0]
    kind = 'flag' if flag.startswith('-') else 'argument'
    raise ConfigError(f'unknown {kind} {flag}; allowed for vtts {command}: {", ".join(allowed)}')


def integer_at_least(low: int):
  """A `type` for argparse: integers >= `low`."""

  def parse_integer(text: str) -> int:
    # no `int(text)` first: it takes ' 3' and '1_000', which are slips on a command line
    if not text.lstrip('-').isdigit() or int(text) < low:
      raise argparse.ArgumentTypeError(f'must be an integer >= {low}, got {text!r}')
    return int(text)

  return parse_integer


# ------------------------------------------------------------------------------------- verifiers


def add_verifier_flag(parser: argparse.ArgumentParser) -> None:
  """Adds `--verifier=NAME`; the settings of the verifier stay in the rest for `build_verifier`."""
  parser.add_argument(
    '--verifier',
    metavar='NAME',
    default='',
    help='a verifier of the package, e.g. verifiers.clip, or a module of yours; its settings are '
    '--verifier.KEY=VALUE (vtts list NAME shows them)',
  )


def build_verifier(name: str, rest: Sequence[str], command: str, flags: Sequence[str]):
  """Builds the verifier that the arguments ask for; it must score pictures alone.

  Args:
    name: value of `--verifier`.
    rest: arguments that argparse has left, the settings of the verifier among them.
    command, flags: the command and its own flags, for messages.

  Raises:
    ConfigError: an unknown argument, no verifier, a setting that the verifier refuses, or a
      verifier that needs more than a picture.
  """
  from vtts_jax import components, core

  # which settings there are is known only once the verifier is, so argparse cannot have read them
  settings, unknown = {}, []
  for argument in rest:
    flag, given, value = argument.partition('=')
    if flag.startswith('--verifier.') and given:
      settings[flag.removeprefix('--verifier.')] = _parse_value(value)
    else:
      unknown.append(argument)
  refuse_unknown(unknown, command, ('--verifier=NAME', '--verifier.KEY=VALUE', *flags))
  if not name:
    known = (n for n in components.list_components() if n.startswith('verifiers.'))
    allowed = ', '.join(known)
    raise ConfigError(f'--verifier=NAME is missing; allowed: {allowed}, or a module of yours')
  verifier = components.load(name, **settings)
  # files have pictures only: no log-probability, no tokens, and nothing of a generator
  if not isinstance(verifier, core.Verifier):
    raise ConfigError(f'--verifier={name}: must be a verifier')
  if verifier.needs != frozenset({'image'}):
    needs = ', '.join(sorted(verifier.needs - {'image'})) or 'no image'
    raise ConfigError(f'--verifier={name}: needs {needs} of a generator; must score pictures alone')
  verifier.check()
  return verifier


def build_scorer(verifier):
  """A scorer of the verifier on all devices of this process."""
  import jax

  from vtts_jax.engine import sharding
  from vtts_jax.engine.scorer import Scorer

  return Scorer(verifier, sharding.make_mesh() if len(jax.local_devices()) > 1 else None)


def _parse_value(text: str):
  """The number, tuple ... that the text is in Python; if it is none, the text itself."""
  # a path or a name need not stand in quotes
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
