"""Components by name: what is listed, what a module must define, what is said when it does not."""

import dataclasses
import sys
import types

import pytest

from vtts_jax import components, core
from vtts_jax.errors import ConfigError
from vtts_jax.search.best_of_n import BestOfN


def make_module(monkeypatch, name, **contents):
  """A module outside the package, as a user's would be."""
  module = types.ModuleType(name, f'The module {name}.')
  for key, value in contents.items():
    if isinstance(value, type) and value.__module__ == __name__:
      value.__module__ = name
    setattr(module, key, value)
  monkeypatch.setitem(sys.modules, name, module)
  return module


def make_class(base=core.Algorithm):
  @dataclasses.dataclass(frozen=True)
  class Mine(base):
    """Mine.

    Attributes:
      width: of it.
      inner: another one.
    """

    width: int
    inner: core.Algorithm | None = None
    sizes: tuple[int, ...] = (1, 2)

  return Mine


def test_components_are_listed_without_importing_them():
  found = components.list_components()
  assert {'search.beam', 'search.mcts', 'scenes.ar', 'verifiers.ensemble'} <= set(found)
  assert all(found.values()), 'a component without a docstring'
  folders = [name.split('.')[0] for name in found]
  assert list(dict.fromkeys(folders)) == list(components.FOLDERS)
  not_components = {'scenes.world', 'scenes.oracle', 'search.select', 'generators.token'}
  assert not not_components & set(found)


@pytest.mark.parametrize('name', sorted(components.list_components()))
def test_every_listed_component_has_one_class_with_described_settings(name):
  settings = components.default_settings(name)
  assert settings.pop('name') == name
  said = components.describe_component(name)
  assert all(f'  {key} = ' in said for key in settings)


def test_a_module_of_yours_is_a_component(monkeypatch):
  make_module(monkeypatch, 'mine', Mine=make_class(), BestOfN=BestOfN)  # imported: not its own
  made = components.load('mine', width=3, sizes=[4, 5], inner={'name': 'search.best_of_n', 'n': 2})
  assert (made.width, made.sizes, made.inner) == (3, (4, 5), BestOfN(n=2))
  assert hash(made) == hash(dataclasses.replace(made))
  assert components.default_settings('mine', width=1) == {
    'name': 'mine', 'inner': None, 'sizes': (1, 2), 'width': 1,
  }  # fmt: skip
  assert 'width: required' in components.describe_component('mine')


def test_the_derived_class_is_the_component_and_build_comes_first(monkeypatch):
  base = make_class()
  derived = make_class(base)
  make_module(monkeypatch, 'mine', Base=base, Derived=derived)
  assert isinstance(components.load('mine', width=1), derived)
  make_module(monkeypatch, 'built', Base=base, build=lambda **given: given)
  assert components.load('built', a=1) == {'a': 1}


@pytest.mark.parametrize(
  ('name', 'settings', 'message'),
  [
    ('mine', {'widht': 1}, 'mine: unknown setting widht=1; allowed: width, inner, sizes'),
    ('mine', {}, 'mine: width is missing'),
    ('several', {}, "'several': must define one Generator, .* it defines A, B"),
    ('empty', {}, "'empty': must define one Generator, .* it defines none"),
    ('search.beams', {}, "unknown component 'search.beams'; allowed: generators"),
    ('not.there', {}, "unknown component 'not.there'; allowed: .*, or a module of yours"),
    ('generators.scenes_ar', {}, "component 'generators.scenes_ar' is now called 'scenes.ar'"),
    ('verifiers.spatial', {}, "is now called 'verifiers.geneval'"),
  ],
)
def test_what_cannot_be_loaded_is_named(name, settings, message, monkeypatch):
  make_module(monkeypatch, 'mine', Mine=make_class())
  make_module(monkeypatch, 'several', A=make_class(), B=make_class())
  make_module(monkeypatch, 'empty')
  sys.modules['several'].A.__name__, sys.modules['several'].B.__name__ = 'A', 'B'
  with pytest.raises(ConfigError, match=message):
    components.load(name, **settings)


def test_old_names_say_the_new_ones():
  listed = components.list_components()
  for new in components.RENAMED.values():
    if new in ('scenes.world', 'scenes.oracle'):
      components.find_module(new)
    else:
      assert new in listed
  with pytest.raises(ConfigError, match='has no grade'):
    components.find_module('search.beam', 'grade')


def test_an_import_that_fails_inside_a_component_is_not_hidden(tmp_path, monkeypatch):
  (tmp_path / 'broken_toy.py').write_text('import nothing_of_this_name\n')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ModuleNotFoundError, match='nothing_of_this_name'):
    components.load('broken_toy')
