"""Components by name: a module path and its settings. There is no registry.

A component is a module with one generator, verifier or algorithm: a frozen dataclass whose fields
are its settings. A package is the component whose class it exports. A module whose component must
do more than take its settings has a `build(**settings)`. Prompt sets are modules with
`prompts(**settings)`, and metrics are modules with `grade(outputs, prompts)`. Both are named in the
same way.

`vtts list` reads the source of the package's own components and imports none of them.
"""

import ast
import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

from vtts_jax.core import Algorithm, Generator, Verifier
from vtts_jax.errors import ConfigError

FOLDERS = ('generators', 'verifiers', 'search', 'scenes')
ROLES = (Generator, Verifier, Algorithm)
RENAMED = {  # what 0.1.0 called them
  'generators.scenes_ar': 'scenes.ar',
  'generators.scenes_flow': 'scenes.flow',
  'generators.flextok_ar': 'generators.flextok',
  'verifiers.scenes_clip': 'scenes.clip',
  'verifiers.scenes_detector': 'scenes.detector',
  'verifiers.scenes_quality': 'scenes.quality',
  'verifiers.spatial': 'verifiers.geneval',
  'data.scenes': 'scenes.world',
  'metrics.scenes': 'scenes.oracle',
}


def load(name: str, **settings):
  """Builds a component by its module path, as in `load('search.beam', width=5)`.

  A setting that is a mapping with a `name` is itself a component, and is built first.

  Raises:
    ConfigError: an unknown component, an unknown setting, or a value that the component refuses.
  """
  module = find_module(name)
  # first, because a module with a `build` may define several classes to choose from
  if hasattr(module, 'build'):
    return module.build(**settings)
  return build_component(component_class(module), **settings)


def build_component(cls, **settings):
  """Builds an instance of a component's class.

  Lists become tuples, and mappings with a `name` become components.

  Raises:
    ConfigError: an unknown setting, or a required one that is missing.
  """
  fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
  where = cls.__module__.removeprefix('vtts_jax.')
  for name, value in settings.items():
    if name not in fields:
      raise ConfigError(
        f'{where}: unknown setting {name}={value!r}; allowed: {", ".join(fields)}'
      )
  # before the class is called: Python's own message would not name the component
  missing = [name for name, field in fields.items() if _is_required(field) and name not in settings]
  if missing:
    raise ConfigError(f'{where}: {missing[0]} is missing')
  return cls(**{name: _freeze_setting(value) for name, value in settings.items()})


def _freeze_setting(value):
  """A setting that can be hashed, since a component is a static argument of `jax.jit`."""
  if isinstance(value, list | tuple):
    return tuple(_freeze_setting(v) for v in value)
  if isinstance(value, Mapping):
    inner = {key: _freeze_setting(v) for key, v in value.items()}
    return load(inner.pop('name'), **inner) if 'name' in inner else inner
  return value


# --------------------------------------------------------------------------------------- by name


def find_module(name: str, function: str = ''):
  """Imports the module of a component, prompt set or metric.

  A name that starts with one of the package's folders stands for `vtts_jax.<name>`. Any other name
  is imported as it is, so that a part of yours is one module on the Python path.

  Args:
    name: the module path.
    function: what the module must define, 'prompts' or 'grade'; '' for nothing.

  Raises:
    ConfigError: there is no such module, it lacks the function, or it has been renamed.
  """
  if name in RENAMED:
    raise ConfigError(f'component {name!r} is now called {RENAMED[name]!r}')
  inside = name.split('.')[0] in (*FOLDERS, 'data', 'metrics')
  path = f'vtts_jax.{name}' if inside else name
  try:
    module = importlib.import_module(path)
  except ModuleNotFoundError as err:
    # a module that exists and lacks an import of its own is another error, which must not hide
    if err.name and (path == err.name or path.startswith(err.name + '.')):
      allowed = _allowed_names(function)
      raise ConfigError(f'unknown component {name!r}; allowed: {allowed}') from None
    raise
  if function and not hasattr(module, function):
    allowed = _allowed_names(function)
    raise ConfigError(f'component {name!r} has no {function}(); allowed: {allowed}')
  return module


def _allowed_names(function: str) -> str:
  """What a message says may be named."""
  if function:
    return f'a module with a {function}()'
  return f'{", ".join(list_components())}, or a module of yours with one component'


def component_class(module) -> type:
  """The class of a component: the one that its module defines, or that its package exports.

  Raises:
    ConfigError: there is no such class, or there are several.
  """

  def is_own(cls):
    return f'{cls.__module__}.'.startswith(f'{module.__name__}.')

  # a module may import other components, to build on them or to search inside them
  public = [c for key, c in vars(module).items() if isinstance(c, type) and key[0] != '_']
  found = [c for c in dict.fromkeys(public) if issubclass(c, ROLES) and is_own(c)]
  # of a class and the base that it is derived from, the derived one is the component
  found = [c for c in found if not any(c in other.__mro__[1:] for other in found)]
  name = module.__name__.removeprefix('vtts_jax.')
  if len(found) != 1:
    said = ', '.join(c.__name__ for c in found) or 'none'
    raise ConfigError(
      f'component {name!r}: must define one Generator, Verifier or Algorithm, or a build(); it '
      f'defines {said}'
    )
  return found[0]


# -------------------------------------------------------------------------------------- settings


def default_settings(name: str, **settings) -> dict[str, Any]:
  """A config section for a component: its name and all of its settings.

  Args:
    name: of the component.
    settings: values that are not the defaults.
  """
  defaults = _defaults_of(component_class(find_module(name)))
  # the name comes first for the reader, and last because a setting may be called 'name' too
  return {'name': name} | defaults | settings | {'name': name}


def describe_component(name: str) -> str:
  """The docstring of a component, its settings with their defaults, and what they mean."""
  module = find_module(name)
  cls = component_class(module)
  lines = [module.__doc__ or '', 'Settings:']
  lines += [f'  {key} = {value!r}' for key, value in _defaults_of(cls).items()]
  lines += [f'  {f.name}: required' for f in dataclasses.fields(cls) if f.init and _is_required(f)]
  return '\n'.join([*lines, '', cls.__doc__ or ''])


def _defaults_of(cls) -> dict[str, Any]:
  """Settings of a component's class that have a default, with it."""
  fields = [f for f in dataclasses.fields(cls) if f.init and not _is_required(f)]
  return {
    f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in fields
  }


def _is_required(field) -> bool:
  """Whether a field of a dataclass has no default."""
  return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


# --------------------------------------------------------------------------------------- listing


@functools.cache
def list_components() -> dict[str, str]:
  """Names of the package's own components, each with the first line of its docstring."""
  # importing them would load every family, which takes seconds and may need extras
  root = pathlib.Path(__file__).parent
  trees = {
    path.relative_to(root): ast.parse(path.read_text(encoding='utf-8'))
    for folder in FOLDERS
    for path in sorted((root / folder).rglob('*.py'))
  }
  bases = {
    node.name: [_last_name(base) for base in node.bases]
    for tree in trees.values()
    for node in tree.body
    if isinstance(node, ast.ClassDef)
  }
  # a class that another is derived from is a base and no component
  derived_from = {base for names in bases.values() for base in names}
  found = {}
  for path, tree in trees.items():
    parts = path.with_suffix('').parts
    if len(parts) == 2 and _holds_component(tree, bases):
      found['.'.join(parts)] = (ast.get_docstring(tree) or '').split('\n')[0]
    # a package is a component where it exports a class that is no base of others
    elif len(parts) == 3 and parts[-1] == '__init__':
      imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
      }
      if any(_has_role(name, bases) for name in imported - derived_from):
        found['.'.join(parts[:2])] = (ast.get_docstring(tree) or '').split('\n')[0]
  return dict(sorted(found.items(), key=lambda item: FOLDERS.index(item[0].split('.')[0])))


def _holds_component(tree, bases) -> bool:
  """Whether the source of a module has a `build`, or a public class derived from a role."""
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name == 'build':
      return True
    if isinstance(node, ast.ClassDef) and node.name[0] != '_' and _has_role(node.name, bases):
      return True
  return False


def _has_role(name, bases, seen=()) -> bool:
  """Whether a class of this name is derived from one of the roles."""
  # a class may have the name of its base, and would be looked up for ever
  if name in seen:
    return False
  roles = {role.__name__ for role in ROLES}
  above = bases.get(name, [])
  return any(base in roles or _has_role(base, bases, (*seen, name)) for base in above)


def _last_name(node) -> str:
  """The name of a base class in the source: 'Verifier' of `Verifier` and of `core.Verifier`."""
  return getattr(node, 'attr', getattr(node, 'id', ''))
