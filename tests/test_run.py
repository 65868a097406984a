"""The drivers: budgets, batches, compilations, devices, host verifiers, the layering."""

import ast
import json
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

import vtts_jax
from vtts_jax.engine import drivers, step
from vtts_jax.engine import search as run
from vtts_jax.errors import ConfigError
from vtts_jax.search.beam import Beam
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.testing import laws, toys

KEY = jax.random.key(5)
PROMPTS = [f'prompt {i}' for i in range(5)]
TOKENS, TARGET = toys.Tokens(), toys.Target()
NONE = {'generator': {}, 'verifier': {}}
BEAM = Beam(width=2, branch=3, schedule='linear', size=2)


def test_a_search_above_budget_is_refused_with_the_bill_before_any_compile():
  made = run.Program.made
  with pytest.raises(
    ConfigError, match=r'budget.generator=11 per prompt .*generator 12, render 19'
  ):
    run.search(BEAM, TOKENS, TARGET, NONE, PROMPTS, KEY, budget={'generator': 11})
  with pytest.raises(ConfigError, match=r'budget.nfe=1: no such limit; allowed: generator'):
    run.search(BEAM, TOKENS, TARGET, NONE, PROMPTS, KEY, budget={'nfe': 1})
  assert run.Program.made == made
  run.search(BEAM, TOKENS, TARGET, NONE, PROMPTS, KEY, budget={'generator': 12, 'flops': 0})


def test_nothing_is_compiled_twice():
  run.search(BEAM, TOKENS, TARGET, NONE, PROMPTS, KEY, batch=3)
  made = run.Program.made
  run.search(
    BEAM, TOKENS, TARGET, NONE, PROMPTS[::-1], jax.random.key(9), batch=3, ids=range(9, 14)
  )
  run.search(
    Beam(width=2, branch=3, schedule='linear', size=2),
    toys.Tokens(),
    TARGET,
    NONE,
    ['another'],
    KEY,
    batch=3,
  )
  assert run.Program.made == made  # other prompts, ids and seeds, a padded batch, equal parts
  uniform = Beam(width=2, branch=2, schedule='fixed')
  made = run.Program.made
  run.search(uniform, TOKENS, TARGET, NONE, PROMPTS, KEY, mode='stepped')
  assert run.Program.made == made + 4  # encode, begin, one program for all six steps, finish


def test_fused_search_makes_no_host_transfer():
  job = step.Job(BEAM, TOKENS, TARGET)
  prompts = {'generator': TOKENS.tokenize(PROMPTS), 'verifier': TARGET.tokenize(PROMPTS)}
  initial = np.zeros((5, 0), np.int32)
  lowered = jax.jit(drivers.fused, static_argnums=0).lower(
    job, NONE, prompts, np.arange(5), KEY, initial
  )
  text = lowered.compile().as_text()
  assert not any(word in text for word in ('callback', 'infeed', 'outfeed', 'host-transfer'))


def test_host_verifiers_are_scored_between_ask_and_tell():
  from vtts_jax.verifiers.host import Host

  seen = []

  def judge(prompts, images):
    seen.append(len(prompts))
    vctx = TARGET.encode({}, TARGET.tokenize(prompts))
    return np.asarray(TARGET.score({}, vctx, images[:, None])['target'])[:, 0].tolist()

  host = Host(score_fn=judge, batch=16)
  got = run.search(BEAM, TOKENS, host, NONE, PROMPTS, KEY, mode='stepped', batch=2)
  want = run.search(BEAM, TOKENS, TARGET, NONE, PROMPTS, KEY)
  laws.same(got.best.state, want.best.state, 'host against fused')
  assert max(seen) <= 16
  with pytest.raises(ConfigError, match="mode='fused': Host scores on the host"):
    run.search(BEAM, TOKENS, host, NONE, PROMPTS, KEY)


def test_on_step_sees_every_step():
  seen = []
  run.search(
    BEAM,
    TOKENS,
    TARGET,
    NONE,
    PROMPTS,
    KEY,
    mode='stepped',
    on_step=lambda i, trace: seen.append((i, float(trace.best.total[0]))),
  )
  assert [i for i, _ in seen] == [0, 1, 2] and seen == sorted(seen)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'prompts': []}, 'prompts: must hold at least one text'),
    ({'ids': [1, 1, 2, 3, 4]}, 'ids: must be 5 different integers'),
    ({'mode': 'fast'}, "mode='fast': must be 'fused' or 'stepped'"),
    ({'on_step': print}, "on_step: needs mode='stepped'"),
    ({'gen': toys.Flow(), 'algo': Beam(replace=False)}, 'search.replace=False'),
    ({'gen': toys.Flow(), 'algo': BestOfN(initial=1), 'initial': np.zeros((5, 1), int)}, 'initial'),
  ],
)
def test_what_does_not_fit_is_one_clear_error(change, message):
  given = {'algo': BEAM, 'gen': TOKENS, 'prompts': PROMPTS} | change
  algo, gen, prompts = given.pop('algo'), given.pop('gen'), given.pop('prompts')
  with pytest.raises(ConfigError, match=message):
    run.search(algo, gen, TARGET, NONE, prompts, KEY, **given)


def test_one_device_equals_eight():
  script = """
    import json, sys, jax, numpy as np
    from vtts_jax import run, sharding
    from vtts_jax.testing import toys
    from vtts_jax.search.beam import Beam
    algo = Beam(width=2, branch=3, schedule='linear', size=2)
    found = {}
    for gen in (toys.Tokens(), toys.Flow()):
      for name, options in {
          'one': {}, 'eight': {'mesh': sharding.make_mesh()},
          'stepped': {'mesh': sharding.make_mesh(model=2), 'mode': 'stepped', 'batch': 4}}.items():
        r = run.search(algo, gen, toys.Target(), {'generator': {}, 'verifier': {}},
                       [f'prompt {i}' for i in range(11)], jax.random.key(5), **options)
        state = jax.tree.leaves(r.best.state)[0]
        found.setdefault(type(gen).__name__, {})[name] = [np.asarray(state).tolist(),
        r.best.total.tolist()]
    print(json.dumps([jax.device_count(), found]))
  """
  flags = '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0'
  out = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(script)],
    env={**__import__('os').environ, 'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
    check=False,
  )
  assert out.returncode == 0, out.stderr
  devices, found = json.loads(out.stdout.splitlines()[-1])
  assert devices == 8
  for runs in found.values():
    for name in ('eight', 'stepped'):
      for a, b in zip(runs['one'], runs[name]):
        np.testing.assert_allclose(a, b, atol=1e-6)


LAYERS = {
  'search': {'core', 'components', 'select', 'search'},
  'keys': set(),
  'core': {'keys'},
  'select': {'core'},
  'sampling': {'core'},
  'components': {'core'},
  'step': {'core'},
  'drivers': {'core', 'step'},
  'run': {'core', 'step', 'drivers'},
  'sharding': {'core'},
  'images': {'core'},
  'models': {'models', 'weights', 'checkpoints', 'data', 'core', 'sampling', 'images'},
  'generators': {'core', 'components', 'sampling', 'models', 'weights', 'data', 'generators'},
  'verifiers': {'core', 'components', 'select', 'models', 'weights', 'data', 'images', 'verifiers'},
  'data': {'data', 'core'},
  'metrics': {'metrics', 'models', 'weights', 'images', 'data', 'core'},
  'weights': {'core', 'checkpoints'},
  'checkpoints': {'core'},
}


def test_layering_is_one_way():
  """`core, select <- search <- run <- main` and `models <- generators, verifiers`, from the
  imports."""
  root = pathlib.Path(vtts_jax.__file__).parent
  for file in root.rglob('*.py'):
    layer = file.relative_to(root).parts[0].removesuffix('.py')
    if layer not in LAYERS:
      continue
    for node in ast.walk(ast.parse(file.read_text())):
      names = []
      if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith('vtts_jax'):
        names = [f'{node.module}.{a.name}' for a in node.names]
      elif isinstance(node, ast.Import):
        names = [a.name for a in node.names if a.name.startswith('vtts_jax')]
        assert not any(a.name.split('.')[0] in ('torch', 'tensorflow') for a in node.names), file
      for name in names:
        used = name.split('.')[1]
        assert used in LAYERS[layer], f'{file.relative_to(root)} imports {name}'


def test_importing_the_package_loads_no_model_and_no_torch():
  code = 'import sys, vtts_jax; print(sorted(m for m in sys.modules if m.split(".")[0] in '
  code += '("torch", "tensorflow", "jax", "transformers") or m.startswith("vtts_jax.")))'
  out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == '[]'
