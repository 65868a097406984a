"""Components by name: a module path and its settings, no registry.

A component is a module with a `build(**settings)`; the package's own are listed by reading their
docstrings, so that `vtts list` imports nothing.
"""

import ast
import dataclasses
import importlib
import pathlib
from typing import Any

from vtts_jax.core import Algorithm, Generator, Verifier
from vtts_jax.errors import ConfigError

FOLDERS = ('generators', 'verifiers', 'search', 'scenes')


def load(name: str, **settings):
  """Builds a component by its module path, e.g. `load('search.beam', width=5)`.

  Raises:
    ConfigError: unknown component, unknown setting or a value that the component refuses.
  """
  return module(name, 'build').build(**settings)


def module(name: str, needs: str):
  """The module of a component, which must define `needs` ('build', 'prompts' or 'score').

  A name that starts with one of the package's folders is `vtts_jax.<name>`; any other is imported
  as it stands, so a part of yours needs no registration: one module, found on the Python path.

  Raises:
    ConfigError: there is no such module, or it lacks what is needed.
  """
  inside = name.split('.')[0] in (*FOLDERS, 'data', 'metrics')
  path = f'vtts_jax.{name}' if inside else name
  try:
    found = importlib.import_module(path)
  except ModuleNotFoundError as err:
    if err.name and (path == err.name or path.startswith(err.name + '.')):
      raise ConfigError(f'unknown component {name!r}; {_allowed(needs)}') from None
    raise
  if not hasattr(found, needs):
    raise ConfigError(f'component {name!r} has no {needs}(); {_allowed(needs)}')
  return found


def _allowed(needs: str) -> str:
  if needs != 'build':
    return f'allowed: a module with a {needs}()'
  return f'allowed: {", ".join(components())}, or a module of yours with a {needs}()'


def components() -> dict[str, str]:
  """Names of the package's own components, each with the first line of its docstring."""
  root = pathlib.Path(__file__).parent
  found = {}
  for folder in FOLDERS:
    for file in sorted((root / folder).glob('*.py')):
      tree = ast.parse(file.read_text(encoding='utf-8'))
      if any(
        isinstance(node, ast.FunctionDef | ast.Assign) and _defines(node, 'build')
        for node in tree.body
      ):
        found[f'{folder}.{file.stem}'] = (ast.get_docstring(tree) or '').split('\n')[0]
  return found


def _defines(node, name):
  if isinstance(node, ast.FunctionDef):
    return node.name == name
  return any(isinstance(t, ast.Name) and t.id == name for t in node.targets)


def describe(name: str) -> str:
  """A component's docstring, its settings with their defaults, and what they mean."""
  cls = _class_of(name)
  lines = [module(name, 'build').__doc__ or '', 'Settings:']
  lines += [f'  {key} = {value!r}' for key, value in settings_of(cls).items()]
  lines += [f'  {f.name}: required' for f in dataclasses.fields(cls) if _required(f)]
  return '\n'.join([*lines, '', cls.__doc__ or ''])


def defaults(name: str, **settings) -> dict[str, Any]:
  """A config section for a component: its name, its defaults, and what `settings` change."""
  return {'name': name, **settings_of(_class_of(name)), **settings}


def _class_of(name: str):
  found = module(name, 'build')
  roles = (Generator, Verifier, Algorithm)
  return next(
    c
    for c in vars(found).values()
    if isinstance(c, type) and issubclass(c, roles) and c.__module__ == found.__name__
  )


def settings_of(cls) -> dict[str, Any]:
  """Names and defaults of a component's settings, those without a default left out."""
  return {f.name: f.default for f in dataclasses.fields(cls) if not _required(f)}


def _required(field) -> bool:
  return field.default is dataclasses.MISSING


def build_dataclass(cls, **settings):
  """A component from its settings; lists become tuples, an unknown setting is a `ConfigError`."""
  known = [field.name for field in dataclasses.fields(cls)]
  made = {}
  for name, value in settings.items():
    if name not in known:
      raise ConfigError(
        f'{cls.__module__.removeprefix("vtts_jax.")}: unknown setting {name}={value!r}; '
        f'allowed: {", ".join(known)}'
      )
    made[name] = _frozen(value)
  return cls(**made)


def _frozen(value):
  if isinstance(value, list | tuple):
    return tuple(_frozen(v) for v in value)
  return value
