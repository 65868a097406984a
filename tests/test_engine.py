"""The engine: budgets, capabilities, batches, compilations, what is collected, devices, host
verifiers, checkpoints."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtts_jax import core
from vtts_jax.engine import fused, stepped
from vtts_jax.engine.compilation import compile_log
from vtts_jax.engine.program import SearchProgram
from vtts_jax.engine.search import bill, prepare_search, search
from vtts_jax.errors import ConfigError
from vtts_jax.search.beam import Beam
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.search.mcts import MCTS
from vtts_jax.search.rollover import Rollover
from vtts_jax.search.smc import SMC
from vtts_jax.testing import laws, toys

KEY = jax.random.key(5)
PROMPTS = [f'prompt {i}' for i in range(5)]
TOKENS, TARGET = toys.Tokens(), toys.Target()
BEAM = Beam(width=2, branch=3, schedule='linear', size=2)
PROGRAMS = ('run_fused', 'encode_batch', 'begin_batch', 'advance_batch', 'finish_batch')


def compiled() -> dict[str, int]:
  """How often each of the engine's programs was compiled."""
  programs = compile_log().programs
  return {name: programs[f'jit({name})'] + programs[name] for name in PROGRAMS}


def test_a_search_above_budget_is_refused_with_the_bill_before_any_compile():
  before = compiled()
  message = r'budget.generator=11 per prompt .*generator 12, observe 19'
  with pytest.raises(ConfigError, match=message):
    search(BEAM, TOKENS, TARGET, PROMPTS, budget={'generator': 11})
  with pytest.raises(ConfigError, match=r'budget.nfe=1: no such limit; allowed: generator'):
    search(BEAM, TOKENS, TARGET, PROMPTS, budget={'nfe': 1})
  assert compiled() == before
  search(BEAM, TOKENS, TARGET, PROMPTS, budget={'generator': 12, 'flops': 0})


def test_nothing_is_compiled_twice():
  search(BEAM, TOKENS, TARGET, PROMPTS, seed=5, batch=3)
  before = compiled()
  assert before['run_fused'], 'the log must see the programs'
  search(BEAM, TOKENS, TARGET, PROMPTS[::-1], seed=9, batch=3, ids=range(9, 14))
  equal = Beam(width=2, branch=3, schedule='linear', size=2)
  search(equal, toys.Tokens(), TARGET, ['another'], batch=3)
  assert compiled() == before  # other prompts, ids and seeds, a padded batch, equal parts
  search(Beam(width=2, branch=2, schedule='fixed'), TOKENS, TARGET, PROMPTS, mode='stepped')
  stepped = {name: count - before[name] for name, count in compiled().items()}
  assert stepped == dict.fromkeys(PROGRAMS, 1) | {'run_fused': 0}  # one program for all six steps


def test_fused_search_makes_no_host_transfer():
  program = SearchProgram(BEAM, TOKENS, TARGET)
  prompts = core.as_prompts(PROMPTS)
  arrays = {'generator': TOKENS.tokenize(prompts), 'verifier': TARGET.tokenize(prompts)}
  params, initial = {'generator': {}, 'verifier': {}}, np.zeros((5, 0), np.int32)
  lowered = fused.run_fused.lower(program, None, params, arrays, np.arange(5), KEY, initial)
  text = lowered.compile().as_text()
  assert not any(word in text for word in ('callback', 'infeed', 'outfeed', 'host-transfer'))


class HostTarget(toys.Target):
  """The same scores from the host."""

  jittable = False
  gives = frozenset()

  def score(self, params, vctx, observed):
    assert isinstance(observed['image'], jax.Array) and set(observed) == {'image'}
    return super().score(params, vctx, observed)


def test_host_verifiers_are_scored_between_ask_and_tell():
  host = HostTarget(rows=6)
  got = search(BEAM, TOKENS, host, PROMPTS, mode='stepped', batch=2)
  want = search(BEAM, TOKENS, TARGET, PROMPTS)
  laws.assert_same(got.best.state, want.best.state, 'host against fused')
  with pytest.raises(ConfigError, match="mode='fused': HostTarget scores on the host"):
    search(BEAM, TOKENS, host, PROMPTS)


def test_on_step_sees_every_step():
  seen = []
  remember = lambda i, trace: seen.append((i, float(trace.best.total[0])))
  search(BEAM, TOKENS, TARGET, PROMPTS, mode='stepped', on_step=remember)
  assert [i for i, _ in seen] == [0, 1, 2] and seen == sorted(seen)


FLOW, SCALES, WORDS = toys.Flow(), toys.Scales(), toys.Words()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'prompts': []}, 'prompts: must hold at least one'),
    ({'prompts': [3]}, 'prompts: entry 0 is 3; must be a text or a mapping'),
    ({'prompts': [{'label': 3}]}, "prompt 0 has no 'text'"),
    ({'ids': [1, 1, 2, 3, 4]}, 'ids: must be 5 different integers'),
    ({'mode': 'fast'}, "mode='fast': must be 'fused' or 'stepped'"),
    ({'on_step': print}, "on_step: needs mode='stepped'"),
    ({'seed': 2**32}, r'seed=4294967296: must be an integer in 0 .. 2\*\*32 - 1'),
    ({'seed': True}, 'seed=True: must be'),
    ({'stop': float('nan')}, 'stop=nan: must be a number above -inf'),
    ({'batch': -1}, 'batch=-1: must be an integer >= 0'),
    ({'budget': {'flops': float('nan')}}, 'budget.flops=nan: must be a number >= 0'),
    ({'checkpoint': 'here'}, "checkpoint: needs mode='stepped'"),
    ({'collect': ('pictures',)}, "'pictures' is none of scores, best"),
    ({'gen': FLOW, 'algo': Beam(replace=False)}, 'search.replace=False'),
    ({'gen': FLOW, 'algo': BestOfN(initial=1), 'initial': np.zeros((5, 1), int)}, 'initial'),
    ({'gen': SCALES, 'algo': Rollover()}, 'Rollover needs ragged_stages; Scales offers fork'),
    ({'gen': SCALES, 'algo': MCTS()}, 'MCTS needs ragged_stages; Scales offers'),
    ({'algo': MCTS(mix=0.5, rollout='small')}, 'MCTS needs rollout, value; Tokens offers'),
    ({'gen': WORDS}, 'verifier Target: needs image, which Words does not show; it shows text'),
    ({'ver': toys.Brightness(), 'algo': SMC(diverse=(0,))}, 'needs features; .*gives gradient'),
    ({'measure': HostTarget()}, 'measure: HostTarget scores on the host'),
  ],
)
def test_what_does_not_fit_is_one_clear_error(change, message):
  given = {'algo': BEAM, 'gen': TOKENS, 'ver': TARGET, 'prompts': PROMPTS} | change
  parts = [given.pop(name) for name in ('algo', 'gen', 'ver', 'prompts')]
  with pytest.raises(ConfigError, match=message):
    search(*parts, **given)


# ------------------------------------------------------------------------------------- what is kept


@dataclasses.dataclass(frozen=True)
class Counting(toys.Tokens):
  """Counts the candidates that are decoded, on the device."""

  def observe(self, params, ctx, state, stage, names):
    if 'image' in names:
      count = lambda shape: DECODED.append(int(shape))
      jax.debug.callback(count, jnp.int32(state.tokens.shape[0] * state.tokens.shape[1]))
    return super().observe(params, ctx, state, stage, names)


DECODED: list[int] = []
ALL = ('best', 'states', 'samples', 'measured', 'leaders')


@pytest.mark.parametrize('mode', ['fused', 'stepped'])
def test_collecting_decodes_nothing_twice(mode):
  DECODED.clear()
  gen, prompts = Counting(), PROMPTS[:3]
  found = search(
    BEAM, gen, TARGET, prompts, measure=toys.Brightness(), collect=ALL, mode=mode, render_chunk=3
  )
  jax.effects_barrier()
  assert sum(DECODED) == 3 * sum(bill(BEAM, gen, TARGET), core.Cost()).observe
  plain = search(BEAM, TOKENS, TARGET, prompts)
  laws.assert_same(found.best.state, plain.best.state, 'collected against not')
  for trace in found.steps:
    pictures = trace.outputs['image']
    assert pictures.dtype == np.uint8 and pictures.shape[:2] == trace.totals.shape
    brightness = pictures.mean((2, 3, 4)) / 255
    np.testing.assert_allclose(trace.measured['brightness'], brightness, atol=1 / 255)
    # the leaders are the kept ones, in their order, then the others by their totals
    index = trace.leaders['index']
    np.testing.assert_array_equal(index[:, : trace.kept.shape[1]], trace.kept)
    rest = np.take_along_axis(trace.totals, index[:, trace.kept.shape[1] :], 1)
    assert (np.diff(rest, axis=1) <= 0).all() and all(len(set(row)) == len(row) for row in index)
    shown = np.take_along_axis(pictures, index[:, :, None, None, None], 1)
    np.testing.assert_array_equal(trace.leaders['outputs']['image'], shown)
  # the best after each step, as it was seen when it was found
  last = found.steps[-1].best
  picture = np.round(found.images * 255).astype(np.uint8)
  np.testing.assert_array_equal(last.shown['outputs']['image'], picture)
  brightness = found.images.mean((1, 2, 3))
  np.testing.assert_allclose(last.shown['measured']['brightness'], brightness, atol=1e-6)


def test_prepared_searches_run_any_rows():
  """Prompts are tokenized once, and a part of them gives the same as all."""
  prepared = prepare_search(BEAM, TOKENS, TARGET, PROMPTS, batch=2)
  whole, part = prepared.run(seed=3), prepared.run([3, 1], seed=3)
  np.testing.assert_array_equal(part.best.total, whole.best.total[[3, 1]])
  assert [prompt['text'] for prompt in part.prompts] == ['prompt 3', 'prompt 1']
  assert part.ids.tolist() == [3, 1]


@dataclasses.dataclass(frozen=True)
class Loading(toys.Tokens):
  """Counts how often its weights are read."""

  def load(self):
    LOADED.append(1)
    return {'scale': np.ones(3, np.float32)}


LOADED: list[int] = []


def test_weights_are_loaded_and_placed_once():
  prepared = prepare_search(BEAM, Loading(), TARGET, PROMPTS, batch=2)
  for seed in (0, 1):
    prepared.run(seed=seed)
  search(BEAM, Loading(), TARGET, PROMPTS[:2])
  assert len(LOADED) == 1
  assert isinstance(prepared.params['generator']['scale'], jax.Array)


def test_a_stepped_search_holds_one_state():
  """The state is donated from step to step."""
  prepared = prepare_search(SMC(particles=4, size=2), TOKENS, TARGET, PROMPTS)
  program, params = prepared.program, prepared.params
  contexts = stepped.encode_batch(program, None, params, prepared.arrays)
  state = stepped.begin_batch(
    program, None, params, contexts, np.arange(5), KEY, prepared.initial
  )
  phase = program.algo.plan(program.gen)[0]
  row = tuple(np.asarray(x) for x in phase.rows[0])
  after, _ = stepped.advance_batch(program, None, phase.shape, (), params, contexts, state, row)
  assert state.frontier.state.tokens.is_deleted() and state.frontier.keys.is_deleted()
  assert not after.frontier.state.tokens.is_deleted()
  assert not KEY.is_deleted(), "the user's key"


def test_a_result_can_be_saved_and_read(tmp_path):
  from vtts_jax.media import files

  found = search(BEAM, TOKENS, TARGET, PROMPTS)
  path = found.save(str(tmp_path / 'best.png'), row=2)
  picture = files.image_floats(files.read_image(str(path)))
  np.testing.assert_allclose(picture, found.images[2], atol=1 / 255)
  line = found.lineage(2)
  assert line[0]['total'] == pytest.approx(found.best.total[2])
  assert line[0]['stage'] == found.best.stage[2]
  assert [entry['step'] for entry in line] == list(range(len(line)))[::-1]
  assert found._repr_html_().count('<img') == 5


def test_text_that_ends_early_is_measured_below_its_bill():
  algo = BestOfN(n=8)
  found = search(algo, WORDS, toys.Letters(), PROMPTS, collect=('states',))
  letters = np.asarray(found.steps[0].states)
  ended = np.argmax(np.concatenate([letters, np.zeros_like(letters[..., :1])], -1) == 0, -1) + 1
  needed = np.minimum(ended, WORDS.num_stages).sum(1)
  np.testing.assert_array_equal(found.measured_evals, needed)
  assert found.costs[0].generator == 8 * 5 and (needed < 40).any()
  assert found.outputs['text'].shape == (5, 5)


@dataclasses.dataclass(frozen=True)
class Ascent(core.Algorithm):
  """Moves the noise of a flow up the gradient of the verifier: what 'gradient' is for."""

  steps: int = 4
  rate: float = 2.0

  needs = frozenset({'gradient'})

  def plan(self, gen):
    return (core.Phase('ascend', tuple((i,) for i in range(self.steps))),)

  def init(self, sampler, keys, initial):
    roots = core.candidate_keys(keys, jnp.arange(2))
    return core.Frontier(sampler.init(roots), roots, jnp.zeros(roots.shape))

  def _finish(self, sampler, state, keys):
    return sampler.extend(state, keys, 0, sampler.num_stages, greedy=True)

  def ask(self, sampler, frontier, shape, row):
    def total(state):
      done = self._finish(sampler, state, frontier.keys)
      return sampler.score(done, sampler.num_stages).sum()

    moved = frontier.state + self.rate * jax.grad(total)(frontier.state)
    done = self._finish(sampler, moved, frontier.keys)
    none = jnp.full(frontier.keys.shape, -1)
    return core.Candidates(done, sampler.num_stages, none, own=moved)

  def tell(self, sampler, frontier, candidates, totals, shape, row):
    assert set(candidates.scores) == {'target'} and candidates.context.shape[1] == 6
    kept = jnp.broadcast_to(jnp.arange(2), totals.shape)
    return core.Frontier(candidates.own, frontier.keys, totals), kept

  def step_cost(self, gen, shape, row):
    return 2 * 2 * gen.cost('extend', 0, gen.num_stages), 2 * 2


def test_an_algorithm_may_follow_the_gradient_of_a_verifier():
  found = search(Ascent(steps=12), FLOW, TARGET, PROMPTS)
  totals = np.stack([trace.totals.mean(1) for trace in found.steps], 1)
  assert (totals[:, -1] > totals[:, 0]).all(), 'the score must rise'
  with pytest.raises(ConfigError, match='Ascent needs gradient'):
    search(Ascent(), FLOW, HostTarget(), PROMPTS, mode='stepped')


# -------------------------------------------------------------------------------------- checkpoints


class Cut(Exception):
  """The end of a process."""


CHECKPOINTED = {
  'beam': Beam(width=2, branch=3, schedule='fixed'),
  'smc': SMC(particles=(6, 4, 2), size=2),
  'mcts': MCTS(simulations=8, leaves=2, slots=3, size=2),
}


@pytest.mark.parametrize('name', CHECKPOINTED)
def test_a_search_that_was_cut_off_goes_on_to_the_same_result(name, tmp_path):
  algo = CHECKPOINTED[name]

  def cut_off(number, trace):
    if number == 1:
      raise Cut

  options = {'mode': 'stepped', 'collect': ('best',), 'seed': 2}
  want = search(algo, TOKENS, TARGET, PROMPTS, **options)
  options['checkpoint'] = tmp_path
  with pytest.raises(Cut):
    search(algo, TOKENS, TARGET, PROMPTS, on_step=cut_off, **options)
  ran = []
  got = search(
    algo, TOKENS, TARGET, PROMPTS, on_step=lambda number, trace: ran.append(number), **options
  )
  assert ran == list(range(2, len(want.steps))), 'steps that were done are not run again'
  exact = lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  jax.tree.map(exact, (got.best, got.outputs, got.steps), (want.best, want.outputs, want.steps))


def test_prompts_at_rest_are_in_a_checkpoint_too(tmp_path):
  """The batch has shrunk when the search is cut off."""
  algo = BestOfN(n=8, round=1)
  stop = float(np.median(search(algo, TOKENS, TARGET, PROMPTS).best.total)) - 1e-4
  options = {'mode': 'stepped', 'stop': stop, 'checkpoint': tmp_path}
  want = search(algo, TOKENS, TARGET, PROMPTS, mode='stepped', stop=stop)

  def cut_off(number, trace):
    if number == 6:
      raise Cut

  with pytest.raises(Cut):
    search(algo, TOKENS, TARGET, PROMPTS, on_step=cut_off, **options)
  got = search(algo, TOKENS, TARGET, PROMPTS, **options)
  jax.tree.map(np.testing.assert_array_equal, got.best, want.best)
  with pytest.raises(ConfigError, match='it is of another search'):
    search(BEAM, TOKENS, TARGET, PROMPTS, **options)


# ------------------------------------------------------------------------------------------ devices


def test_any_mesh_gives_the_same(tmp_path):
  """8 x 1, 4 x 2 and 2 x 4 devices: tokens equal, scores to rounding; and a checkpoint of eight
  devices goes on with two."""
  script = """
    import json, sys, jax, numpy as np
    from vtts_jax import components
    from vtts_jax.engine.search import search
    from vtts_jax.engine.sharding import make_mesh
    from vtts_jax.testing import toys
    from vtts_jax.search.beam import Beam
    from vtts_jax.search.best_of_n import BestOfN

    small = Beam(width=2, branch=3, schedule='linear', size=2)
    large = BestOfN(n=2)
    prompts = [f'prompt {i}' for i in range(11)]
    scenes = ['a photo of a red circle', 'a photo of two blue squares', 'a photo of a green ring']
    parts = {
      'tokens': (small, toys.Tokens(), toys.Target(), prompts),
      'scenes': (large, components.load('scenes.ar'), components.load('scenes.clip'), scenes),
    }
    meshes = {'one': None, '8x1': make_mesh(), '4x2': make_mesh(model=2), '2x4': make_mesh(model=4)}
    found, sharded = {}, {}
    for part, given in parts.items():
      for name, mesh in meshes.items():
        options = {'mode': 'stepped', 'batch': 4} if (part, name) == ('tokens', '4x2') else {}
        # the toy has no weights to split, and prompts over 8 devices need no second model
        if (part, name) in (('scenes', '8x1'), ('tokens', '2x4')):
          continue
        if part == 'tokens':
          options |= {'measure': toys.Brightness(), 'collect': ('best', 'samples', 'measured')}
        r = search(*given, seed=5, mesh=mesh, **options)
        state = jax.tree.leaves(r.best.state)[0]
        found.setdefault(part, {})[name] = [np.asarray(state).tolist(), r.best.total.tolist()]
        if part == 'tokens':
          last = r.steps[-1]
          found[part][name] += [last.measured['brightness'].tolist(),
                                last.outputs['image'].tolist(),
                                last.best.shown['outputs']['image'].tolist()]
        if mesh is not None:
          from vtts_jax.engine.search import load_parameters
          placed = jax.tree.leaves(load_parameters(given[1], mesh))
          sharded[f'{part} {name}'] = sum(not x.sharding.is_fully_replicated for x in placed)

    class Cut(Exception): pass
    def cut(number, trace):
      if number == 0: raise Cut
    options = {'mode': 'stepped', 'checkpoint': sys.argv[1], 'seed': 5}
    try: search(*parts['tokens'], mesh=make_mesh(), on_step=cut, **options)
    except Cut: pass
    ran = []
    two = make_mesh(devices=jax.devices()[:2])
    r = search(*parts['tokens'], mesh=two, on_step=lambda i, _: ran.append(i), **options)
    found['tokens']['8 to 2'] = [r.best.state.tokens.tolist(), r.best.total.tolist()]
    print(json.dumps([jax.device_count(), found, sharded, ran]))
  """
  flags = ' --xla_force_host_platform_device_count=8'
  out = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(script), str(tmp_path)],
    env={**os.environ, 'XLA_FLAGS': os.environ.get('XLA_FLAGS', '') + flags},
    capture_output=True,
    text=True,
    check=False,
  )
  assert out.returncode == 0, out.stderr[-4000:]
  devices, found, sharded, ran = json.loads(out.stdout.splitlines()[-1])
  assert devices == 8 and ran == [1, 2]
  for part, runs in found.items():
    want = runs.pop('one')
    for name, got in runs.items():
      for a, b in zip(want, got):
        # weights over 'model' sum in another order; prompts over 'data' do not
        close = 1e-5 if part == 'scenes' else 1e-6
        np.testing.assert_allclose(a, b, atol=close, err_msg=f'{part} {name}')
  assert sharded['scenes 4x2'] > 0 and sharded['scenes 2x4'] > 0, 'weights over model'
