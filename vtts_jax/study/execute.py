"""A study: arms (generator x verifier x search) over prompts and seeds, with held-out measurements.

An arm is the base config with some of its settings replaced. For each (arm, seed, batch of prompts)
the search runs, then every snapshot of its result (best-of-N: each smaller budget; other
algorithms: each step) is rendered, scored by the verifiers of `config.measure` and graded by
`config.metric`, none of which the search has seen; then the lines are written. Of best-of-N every
single sample is graded, see `samples.py`.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax import components, core
from vtts_jax.core import Cost
from vtts_jax.engine import search as run
from vtts_jax.engine import sharding
from vtts_jax.engine.step import signals
from vtts_jax.errors import ConfigError
from vtts_jax.search.best_of_n import BestOfN
from vtts_jax.study import genealogy, grading
from vtts_jax.study import graded_samples as samples
from vtts_jax.study.store import Store
from vtts_jax.verifiers import ensemble

PARTS = ('generator', 'verifier', 'search')


@dataclasses.dataclass(frozen=True)
class Arm:
  """One arm, built: its name, its parts, the driver's settings and its bill per prompt."""

  name: str
  gen: core.Generator
  ver: core.Verifier
  algo: core.Algorithm
  measure: core.Verifier
  mode: str
  batch: int
  render_chunk: int
  stop: float
  cost: Cost


def arms(config: Mapping[str, Any]) -> list[Arm]:
  """Builds and checks every arm before anything is compiled.

  Raises:
    ConfigError: an unknown component or setting, an impossible value, parts that do not fit, or a
      search whose bill is above `config.budget`; the message starts with the arm.
  """
  texts = [entry['prompt'] for entry in prompts(config)]
  grading.metric(config['metric'], texts)
  made = []
  for name, changes in (config['arms'] or {'': {}}).items():
    settings = merge(config, changes)
    try:
      gen, ver, algo = (build(settings[part], part) for part in PARTS)
      measure = ensemble.build(members=settings['measure'], mode='minmax')
      run.validate(algo, gen, ver, settings['mode'])
      run.validate(BestOfN(), gen, measure, 'stepped')  # measures only
      run.tokenize(gen, ver, texts)
      run.tokenize(gen, measure, texts)
      cost = sum(run.bill(algo, gen, ver), Cost())
      run.check_budget(cost, settings['budget'])
      for field in ('batch', 'render_chunk'):
        if settings[field] < 0:
          raise ConfigError(f'{field}={settings[field]}: must be >= 0')
    except ConfigError as err:
      raise ConfigError(f'arm {name}: {err}' if name else str(err)) from None
    mode, batch, chunk = (settings[k] for k in ('mode', 'batch', 'render_chunk'))
    stop = settings.get('stop')
    stop = float('inf') if stop is None else float(stop)
    made.append(Arm(name or 'main', gen, ver, algo, measure, mode, batch, chunk, stop, cost))
  return made


def merge(base: Mapping, changes: Mapping) -> dict:
  """`base` with nested `changes`; a changed `name` of a component replaces all of its settings."""
  out = dict(base)
  for key, value in changes.items():
    if key not in base:
      raise ConfigError(f'arms: unknown setting {key!r}; allowed: {", ".join(base)}')
    if not isinstance(value, Mapping) or (key in PARTS and 'name' in value):
      out[key] = value
    else:
      out[key] = {**base[key], **value}
  return out


def build(settings: Mapping, part: str):
  """A component from its settings, `name` among them."""
  settings = dict(settings)
  if 'name' not in settings:
    raise ConfigError(f'{part}.name: missing; allowed: {", ".join(components.components())}')
  name = settings.pop('name')
  try:
    return components.load(name, **settings)
  except ConfigError as err:
    raise ConfigError(f'{part}: {err}') from None


def prompts(config: Mapping[str, Any]) -> list[dict]:
  """The prompt set: a list of GenEval-style metadata, each with its global `id`."""
  settings = dict(config['prompts'])
  name = settings.pop('name')
  try:
    entries = components.module(name, 'prompts').prompts(**settings)
  except (TypeError, ValueError) as err:
    raise ConfigError(f'prompts: {err}') from None
  return [{'id': i, **entry} for i, entry in enumerate(entries)]


@functools.cache
def parameters(part) -> Any:
  """Loaded once for each component, on the device."""
  return jax.tree.map(jnp.asarray, part.load())


# ---------------------------------------------------------------------------------------- snapshots


def prefixes(arm: Arm, result: run.SearchResult) -> list[np.ndarray]:
  """Totals `[P, n]` of best-of-N's first n samples, for n = 1, 2, 4 .. N; -inf where not finite."""
  step, samples = result.steps[0], arm.algo.n
  valid = np.isfinite(step.totals)
  totals = []
  for n in sorted({2**i for i in range(samples.bit_length())} | {samples}):
    scores = {k: np.where(valid, v, 0)[:, :n] for k, v in step.scores.items()}
    own = np.asarray(arm.ver.total(scores, valid[:, :n]))
    totals.append(np.where(valid[:, :n], own, -np.inf))
  return totals


def snapshots(arm: Arm, result: run.SearchResult):
  """The best candidates at each budget: (costs `[P, S, 4]` in the order of `Cost`, slim states `[P,
  S, ...]`, stages and totals `[P, S]`).

  Best-of-N holds every smaller budget as its prefix; of the others, the best after each step, from
  the first on at which there is a picture to hand out.
  """
  algo, gen, ver = arm.algo, arm.gen, arm.ver
  if is_ladder(algo):
    found = prefixes(arm, result)
    sized = [dataclasses.replace(algo, n=totals.shape[1]) for totals in found]
    costs = [dataclasses.astuple(sum(run.bill(a, gen, ver), Cost())) for a in sized]
    costs = np.broadcast_to(costs, (len(found[0]), len(sized), len(costs[0])))
    index = np.stack([totals.argmax(axis=1) for totals in found], axis=1)
    states = jax.tree.map(lambda x: x[np.arange(len(x))[:, None], index], result.steps[0].shown)
    stages = np.full(index.shape, gen.num_stages, np.int32)
    return costs, states, stages, np.stack([t.max(axis=1) for t in found], axis=1)
  first = next((i for i, step in enumerate(result.steps) if np.any(step.final)), 0)
  done = range(first, len(result.steps))
  costs = result.spent()[:, first:]
  # to stop at a step is to render the best there; the last step has that, for whom it ran
  unpaid = np.ones(costs.shape[:2], bool)
  unpaid[:, -1] = ~np.asarray(result.steps[-1].active)
  costs = costs + unpaid[..., None] * np.array(dataclasses.astuple(gen.cost('render')))
  bests = [result.steps[i].best for i in done]
  states = jax.tree.map(lambda *x: np.stack(x, axis=1), *(b.state for b in bests))
  stages = np.stack([b.stage for b in bests], axis=1)
  totals = np.stack([b.total for b in bests], axis=1)
  return costs, states, stages, totals


def searched(ver, measure) -> str:
  """What is searched on, joined by '+', by the names that it has among the measured verifiers."""
  parts = [ver]
  if isinstance(ver, ensemble.Ensemble):
    parts = [member for name, member in ver.members if dict(ver.weights)[name]]
  known = {member: name for name, member in measure.members}
  return '+'.join(known.get(part, part.names[0]) for part in parts)


def is_ladder(algo) -> bool:
  """Whether one run holds every smaller budget as its prefix (candidates known from a single
  step)."""
  return isinstance(algo, BestOfN) and algo.per_step == algo.n


def observe(gen, measure, params, prompts, states, stages):
  """Renders and measures snapshots: images `[P, S, H, W, 3]` and `{name: [P, S]}`."""
  images, told = _rendered(gen, measure, params['generator'], prompts, states, stages)
  call = _measured if measure.jittable else _measured.__wrapped__
  return images, call(measure, params['measure'], prompts['measure'], images, told)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rendered(gen, measure, params, prompts, states, stages):
  ctx = gen.encode(params, prompts['generator'])
  images = gen.render(params, ctx, states, stages)
  return images, signals(gen, measure, params, ctx, states, stages)


@functools.partial(jax.jit, static_argnums=0)
def _measured(measure, params, prompt, images, told):
  return measure.score(params, measure.encode(params, prompt), images, **told)


# -------------------------------------------------------------------------------------------
# running


def execute(config: Mapping[str, Any], built: list[Arm], store: Store, on_batch=None) -> int:
  """Runs what is not done yet; returns how many lines were written.

  Prompts are cut into the same batches in every session, so a batch that was cut off is run again
  whole and gives the same numbers; only its missing lines are written.
  """
  entries = prompts(config)
  metric = grading.metric(config['metric'])
  mesh = sharding.make_mesh() if len(jax.local_devices()) > 1 else None
  written = 0
  for arm in built:
    size = arm.batch or len(entries)
    for seed in config['seeds']:
      batches = [entries[low : low + size] for low in range(0, len(entries), size)]
      batches = batches[store.process :: store.processes]
      wanted = {e['id'] for e in entries if (arm.name, seed, e['id']) not in store.done}

      def one(batch, arm=arm, seed=seed, size=size):
        begun = time.perf_counter()
        rows, timing = _batch(config, arm, seed, batch, size, mesh, metric, store)
        return rows, {**timing, 'total_seconds': time.perf_counter() - begun}

      todo = [batch for batch in batches if any(e['id'] in wanted for e in batch)]
      made = run.ahead(one, todo, arm.ver)
      for batch in batches:
        rows = []
        if batch in todo:
          rows, timing = next(made)
          rows = [r for r in rows if r['id'] in wanted]
          store.timing.append([timing])
          store.results.append(rows)
        written += len(rows)
        if on_batch:
          on_batch(arm, seed, batch, len(rows))
  return written


def _batch(config, arm, seed, batch, size, mesh, metric, store):
  texts = [e['prompt'] for e in batch]
  params = {'generator': parameters(arm.gen), 'verifier': parameters(arm.ver)}
  result = run.search(
    arm.algo,
    arm.gen,
    arm.ver,
    params,
    texts,
    jax.random.key(seed),
    ids=[e['id'] for e in batch],
    mesh=mesh,
    mode=arm.mode,
    batch=size,
    render_chunk=arm.render_chunk,
    stop=arm.stop,
    trace=True,
  )
  costs, states, stages, totals = snapshots(arm, result)
  arrays = {'generator': arm.gen.tokenize(texts), 'measure': arm.measure.tokenize(texts)}
  pad = lambda x: np.asarray(x)[np.minimum(np.arange(size), len(batch) - 1)]
  arrays, states, stages = jax.tree.map(pad, (arrays, states, stages))
  held = {'generator': params['generator'], 'measure': parameters(arm.measure)}
  images, measured = jax.tree.map(
    np.asarray, observe(arm.gen, arm.measure, held, arrays, states, stages)
  )
  images = np.where(np.isfinite(images), images, 0)
  count, graded = costs.shape[1], None
  if is_ladder(arm.algo):
    cut = prefixes(arm, result)
    drawn = jax.tree.map(pad, result.steps[0].shown)
    graded = samples.grade(arm, held, arrays, drawn, np.isfinite(cut[-1]), batch, metric)
    picked = np.stack([t.argmax(axis=1) for t in cut], axis=1)
    correct = np.take_along_axis(graded.correct, picked, axis=1)
  else:
    correct = metric.score(
      images[: len(batch)].reshape(-1, *images.shape[2:]), [e for e in batch for _ in range(count)]
    ).reshape(len(batch), count)
  rows = []
  for i, entry in enumerate(batch):
    name = f'{arm.name}/{seed}/{entry["id"]:05d}'
    done = bool(np.isfinite(totals[i, -1]))
    row = {'arm': arm.name, 'seed': seed, 'id': entry['id'], 'prompt': entry['prompt']}
    row |= {'tag': entry.get('tag', ''), 'found': done}
    row['bad'] = {k: int(v[i]) for k, v in result.bad.items() if v[i]}
    row['searched'] = searched(arm.ver, arm.measure)
    row['ladder'] = is_ladder(arm.algo)
    row['stage'] = int(result.best.stage[i])
    row['scores'] = {k: _number(v[i]) for k, v in result.best.scores.items()}
    row['curve'] = [
      {
        **Cost(*costs[i, j].tolist()).asdict(),
        'total': _number(totals[i, j]),
        'correct': int(correct[i, j]) if np.isfinite(totals[i, j]) else 0,
        'measured': {k: _number(v[i, j]) for k, v in measured.items()},
      }
      for j in range(count)
    ]
    if graded:
      row['samples'] = samples.record(graded, cut, i)
    if done:
      row['image'] = store.save_image(name, images[i, -1])
    if i < config['traces'] and entry['id'] < config['traces'] and seed == config['seeds'][0]:
      row['grid'] = [store.save_image(f'{name}-{j}', images[i, j]) for j in range(count)]
      found = genealogy.tree(result, i)
      found['images'] = genealogy.pictures(arm.gen, params['generator'], result, i, found)
      row['trace'] = store.save_trace(name, found)
    rows.append(row)
  timing = {'arm': arm.name, 'seed': seed, 'first_id': batch[0]['id'], **result.seconds}
  return rows, timing


def _number(value) -> float | None:
  """JSON has no NaN: what is not finite is null."""
  return float(value) if np.isfinite(value) else None
