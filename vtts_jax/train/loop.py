"""The training loop of every script in this folder: AdamW, warm-up, cosine, clipping, Orbax
checkpoints.

A run is a pure function of its settings: the batch and the key of a step depend on the step and the
seed only, and a checkpoint holds parameters, optimiser and moving average, so a run that was killed
and started again ends in the same bits as one that was not. The shipped weights are the parameters
rounded to bfloat16, and what is reported about them is measured after rounding.
"""

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from vtts_jax import weights

ASSETS = pathlib.Path(__file__).parents[1] / 'assets' / 'scenes'


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a run is.

  Attributes:
    name: of the checkpoint folder and of the exported file.
    steps: optimiser steps.
    rate: peak learning rate, reached after `warmup` steps, cosine to a hundredth of it at the end.
    decay: AdamW weight decay, on matrices only.
    ema: decay of a moving average of the parameters; 0 keeps none.
    seed: of parameters, data and noise.
    every: steps between checkpoints.
    note: anything else that changes the result (batch, sizes); a resumed run must have the same.
  """

  name: str
  steps: int
  rate: float = 1e-3
  warmup: int = 300
  decay: float = 0.01
  ema: float = 0.0
  seed: int = 0
  every: int = 1000
  note: str = ''


def schedule(settings):
  """The learning rate as an optax schedule."""
  return optax.warmup_cosine_decay_schedule(
    0.0, settings.rate, min(settings.warmup, settings.steps // 4), settings.steps,
    end_value=settings.rate / 100,
  )  # fmt: skip


def _optimiser(settings):
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      schedule(settings),
      b2=0.98,
      weight_decay=settings.decay,
      mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
    ),
  )


def _named(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def train(settings, params, loss, batch, *, folder='checkpoints', log=100, on_save=None, stop=None):
  """Trains, resuming from `folder/settings.name` if that holds a checkpoint.

  Args:
    settings: a `Settings`.
    params: nested dict, the parameters at step 0.
    loss: `(params, batch, key, step) -> (scalar, dict of scalars)`, traced.
    batch: `step -> pytree of arrays`, on the host, a pure function of the step.
    log: steps between printed lines.
    on_save: called as `on_save(step, params)` at each checkpoint (with the moving average if any).
    stop: leave after this many steps as if killed there (for tests).

  Returns:
    The final parameters: the moving average if `settings.ema`, else the last ones.

  Raises:
    ValueError: the folder holds a run with other settings.
  """
  optimiser = _optimiser(settings)
  state = (params, optimiser.init(params), params if settings.ema else ())
  state = jax.tree.map(jnp.array, state)  # copies: the step donates them
  root = jax.random.key(settings.seed)

  @jax.jit
  def first_key(step):
    return jax.random.fold_in(root, step)

  def one(state, data, key, step):
    params, inner, mean = state
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, extra), grads = grad(params, data, key, step)
    updates, inner = optimiser.update(grads, inner, params)
    params = optax.apply_updates(params, updates)
    if settings.ema:
      slow = jnp.minimum(settings.ema, (1.0 + step) / (10.0 + step))
      mean = jax.tree.map(lambda m, p: slow * m + (1 - slow) * p, mean, params)
    return (params, inner, mean), {'loss': value, **extra}

  one = jax.jit(one, donate_argnums=0)
  result = lambda state: state[2] if settings.ema else state[0]
  path = pathlib.Path(folder).absolute() / settings.name
  path.mkdir(parents=True, exist_ok=True)
  _same_run(path / 'settings.json', settings)
  options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
  with ocp.CheckpointManager(path / 'steps', options=options) as manager:
    start = manager.latest_step() or 0
    if start:
      named = manager.restore(start, args=ocp.args.StandardRestore(_named(state)))
      leaves = [named[k] for k in _named(state)]
      state = jax.tree.unflatten(jax.tree.structure(state), leaves)
      print(f'{settings.name}: resumed at step {start}', flush=True)
    clock, since = time.monotonic(), start
    for step in range(start, settings.steps):
      if stop is not None and step >= stop:
        break
      state, metrics = one(state, batch(step), first_key(step), jnp.int32(step))
      done = step + 1
      if done % log == 0 or done == settings.steps:
        shown = ' '.join(f'{k} {float(v):.4f}' for k, v in metrics.items())
        rate = (done - since) / (time.monotonic() - clock)
        print(f'{settings.name} {done}/{settings.steps} {shown} | {rate:.1f} steps/s', flush=True)
        clock, since = time.monotonic(), done
      if done % settings.every == 0 or done == settings.steps:
        manager.save(done, args=ocp.args.StandardSave(_named(state)))
        manager.wait_until_finished()  # the next step donates the arrays being written
        if on_save:
          on_save(done, result(state))
          clock, since = time.monotonic(), done
  return result(state)


def _same_run(path, settings):
  now = json.dumps(dataclasses.asdict(settings), indent=1)
  if path.exists() and (before := path.read_text()) != now:
    raise ValueError(
      f'{path.parent} holds a run with other settings:\n{before}\nnot\n{now}\n'
      'remove the folder or choose another name'
    )
  path.write_text(now)


def rounded(params):
  """The parameters as they are shipped: rounded to bfloat16, in float32."""
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)


def export(name, params, config, metrics, assets=ASSETS):
  """Writes `assets/name.safetensors` in bfloat16.

  `config` is the model's frozen dataclass; `metrics` a JSON-able dict. Both go into the metadata.
  """
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  about = {'model': type(config).__name__, 'config': json.dumps(dataclasses.asdict(config))}
  path = pathlib.Path(assets) / f'{name}.safetensors'
  weights.save(path, half, {**about, 'metrics': json.dumps(metrics)})
  print(f'{name}: {path} {path.stat().st_size / 1e6:.2f} MB', json.dumps(metrics), flush=True)
