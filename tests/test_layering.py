"""The house: every module has its layer, and imports go one way."""

import ast
import pathlib
import subprocess
import sys
import textwrap

import vtts_jax

ROOT = pathlib.Path(vtts_jax.__file__).parent
LAYERS = {  # what a module may import besides itself; the longest prefix of its name counts
  '': {'components', 'core', 'engine', 'errors', 'testing'},  # the lazy face
  'errors': set(),
  'keys': set(),
  'token_sampling': {'errors'},
  'core': {'errors', 'keys'},
  'components': {'errors', 'core'},
  'search': {'errors', 'core'},
  'checkpoints': {'errors', 'media'},
  'media': {'errors'},
  'data': {'errors', 'media'},
  'models': {'errors', 'checkpoints', 'media', 'data', 'token_sampling'},
  # the golden files of a diffusion model hold its sampler's trajectories
  'models.sit.replay': {'errors', 'models', 'generators'},
  'metrics': {'errors', 'checkpoints', 'media', 'data', 'models'},
  'generators': {'errors', 'core', 'token_sampling', 'checkpoints', 'data', 'models'},
  'verifiers': {
    'errors', 'core', 'checkpoints', 'media', 'data', 'models', 'metrics', 'components',
    'search.select',
  },
  'engine': {'errors', 'core', 'media', 'data'},
  'study': {
    'errors', 'core', 'components', 'search', 'media', 'data', 'metrics', 'verifiers', 'engine',
  },
  'report': {'errors', 'core', 'components', 'media', 'study'},
  'train': {'errors', 'core', 'checkpoints', 'models'},
  'scenes': {
    'errors', 'core', 'token_sampling', 'checkpoints', 'media', 'models', 'metrics', 'generators',
    'verifiers', 'train', 'engine', 'search', 'components', 'data',
  },
  'games': {'search'},
  'cli': {
    'errors', 'core', 'components', 'media', 'data', 'engine', 'study', 'report',
  },
  'testing.hlo': set(),
  'testing.replay': {'errors', 'checkpoints', 'models'},
  'testing.offers': {'errors', 'core'},
  'testing.laws': {'errors', 'core', 'engine', 'search', 'testing.offers'},
  'testing.toys': {'errors', 'core', 'components', 'token_sampling'},
}  # fmt: skip
ROOT_MODULES = {'__init__', 'core', 'errors', 'keys', 'components', 'token_sampling'}


def module_name(file: pathlib.Path) -> str:
  parts = file.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def layer_of(name: str) -> str | None:
  """The longest prefix of a module's name that is a layer."""
  parts = name.split('.')
  prefixes = ['.'.join(parts[:n]) for n in range(len(parts), 0, -1)]
  return next((p for p in prefixes if p in LAYERS), '' if not name else None)


def imports_of(file: pathlib.Path):
  """Names that a file imports, those of the package without `vtts_jax.`."""
  for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
    if isinstance(node, ast.ImportFrom) and node.module:
      yield from (f'{node.module}.{alias.name}' for alias in node.names)
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


def test_every_module_has_its_layer_and_imports_go_one_way():
  wrong = []
  for file in sorted(ROOT.rglob('*.py')):
    name = module_name(file)
    layer = layer_of(name)
    if layer is None:
      empty = not file.read_text(encoding='utf-8').strip()
      wrong += [] if empty else [f'{name}: has no layer']
      continue
    for used in imports_of(file):
      assert used.split('.')[0] not in ('torch', 'tensorflow'), f'{name} imports {used}'
      if not used.startswith('vtts_jax.'):
        continue
      used = used.removeprefix('vtts_jax.')
      inside = used == layer or (layer and used.startswith(f'{layer}.'))
      allowed = any(used == a or used.startswith(f'{a}.') for a in LAYERS[layer])
      if not inside and not allowed:
        wrong.append(f'{name} imports {used}')
  assert not wrong, '\n'.join(wrong)


def test_no_layer_imports_one_above_it():
  """The table itself has no circle."""
  order, left = [], dict(LAYERS)
  while left:
    ready = [n for n, used in left.items() if not any(u in left and u != n for u in used)]
    assert ready, f'a circle among {sorted(left)}'
    order += ready
    left = {n: used for n, used in left.items() if n not in ready}


def test_six_modules_at_the_root():
  assert {file.stem for file in ROOT.glob('*.py')} == ROOT_MODULES


def test_importing_the_package_loads_no_model_and_no_torch():
  code = 'import sys, vtts_jax; print(sorted(m for m in sys.modules if m.split(".")[0] in '
  code += '("torch", "tensorflow", "jax", "transformers") or m.startswith("vtts_jax.")))'
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == '[]'


def test_the_face_is_there_whatever_was_imported_before():
  """`search` is a function of the face and a folder of the package."""
  code = """
    import vtts_jax as vtts
    before = vtts.search
    beam = vtts.load('search.beam', width=2, branch=2)   # imports the folder
    import vtts_jax.search.beam as module
    from vtts_jax.testing import toys
    found = vtts.search(beam, toys.Tokens(), toys.Target(), ['a'])
    assert before(beam, toys.Tokens(), toys.Target(), ['a']).best.total == found.best.total
    assert vtts.search.beam is module and module.Beam is type(beam)
    print(sum(vtts.bill(beam, toys.Tokens(), toys.Target()), vtts.Cost()).observe)
  """
  command = [sys.executable, '-c', textwrap.dedent(code)]
  out = subprocess.run(command, capture_output=True, text=True, check=False)
  assert out.returncode == 0, out.stderr
  assert float(out.stdout) > 0
