"""One training loop for every small model that we train: AdamW, warm-up, cosine, EMA, exact resume.

A batch is a pure function of the step, randomness is `fold_in(key(seed), step)`, and a checkpoint
(Orbax) holds parameters, averages and optimiser state. So a run that is killed and started again
computes what it would have computed. `export_weights` writes what is shipped, rounded to float16.
"""

import argparse
import functools
import os
import time

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from vtts_jax.checkpoints.files import write_weights
from vtts_jax.models import modules


def build_parser(steps, out, batch=64, rate=1e-3, **more):
  """Returns the command line that all training scripts share.

  Args:
    steps, batch, rate: defaults of the flags of these names.
    out: default of `--out`, the folder of the results.
    more: further flags with their defaults; a flag has the type of its default.
  """
  parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  common = {'steps': steps, 'batch': batch, 'rate': rate, 'seed': 0, 'workdir': 'checkpoints',
            'out': out}
  for name, value in {**common, **more}.items():
    parser.add_argument(f'--{name}', type=type(value), default=value)
  return parser


def train_model(loss, params, batches, *, steps, rate=1e-3, seed=0, warmup=200, clip=1.0,
                decay=0.01, ema=0.999, folder=None, every=1000, log=200, evaluate=None):
  """Minimises a loss and returns the exponential average of the parameters.

  Args:
    loss: `loss(params, batch, key, progress) -> (scalar, {name: scalar})`; progress is in [0, 1].
    params: nested dict of arrays.
    batches: pure function of a step (int) that returns a pytree of numpy arrays.
    steps: number of updates.
    rate: peak learning rate; it falls to 1 % along a cosine.
    seed: seed of the keys of the steps.
    warmup: steps until the rate is reached, at most half of all.
    clip: largest norm of a gradient.
    decay: weight decay.
    ema: decay of the averages, shorter at the start; 0 returns the last parameters.
    folder: where checkpoints are written and resumed from; None keeps none.
    every, log: steps between checkpoints, and between lines of output.
    evaluate: called as `evaluate(averages, step)` at each checkpoint, for instance to export.
  """
  # short runs warm up for half of their steps at most
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, rate, min(warmup, steps // 2), steps, rate / 100)
  tx = optax.chain(optax.clip_by_global_norm(clip),
                   optax.adamw(schedule, b2=0.99, weight_decay=decay))
  root = jax.random.key(seed)

  @functools.partial(jax.jit, donate_argnums=0)
  def update_state(state, batch, step):
    # from the step and not from a carried key, so that a resumed run draws the same
    key = jax.random.fold_in(root, step)
    (value, info), grad = jax.value_and_grad(loss, has_aux=True)(
      state['params'], batch, key, step / steps)
    change, opt = tx.update(grad, state['opt'], state['params'])
    new = optax.apply_updates(state['params'], change)
    # a young average has a short memory, else the initial parameters would stay in it
    rate_of_mean = jnp.maximum(1 - ema, 1 / (1 + step / 4))
    mean = jax.tree.map(lambda m, p: m + rate_of_mean * (p - m), state['ema'], new)
    return {'params': new, 'ema': mean, 'opt': opt}, {'loss': value, **info}

  # copies: the state is donated, and the caller keeps its parameters
  params = jax.tree.map(jnp.array, params)
  state = {'params': params, 'ema': jax.tree.map(jnp.array, params), 'opt': tx.init(params)}
  manager, start = None, 0
  if folder is not None:
    manager = ocp.CheckpointManager(os.path.abspath(folder), options=ocp.CheckpointManagerOptions(
      max_to_keep=2, enable_async_checkpointing=False))
    if manager.latest_step() is not None:
      start = manager.latest_step()
      # Orbax restores into the shapes and dtypes of a state like this one
      shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
      state = manager.restore(start, args=ocp.args.StandardRestore(shapes))
      print(f'resumed at step {start} of {steps}', flush=True)
      # a run that was killed in its last evaluation
      if start == steps and evaluate is not None:
        evaluate(state['ema'] if ema else state['params'], start)
  begun, since, totals = time.time(), start, {}
  for step in range(start, steps):
    state, info = update_state(state, batches(step), step)
    # sums stay on the device until a line is printed, so that steps are not waited for
    totals = {k: totals.get(k, 0.0) + v for k, v in info.items()}
    done = step + 1
    if done % log == 0 or done == steps:
      n, seconds = done - since, time.time() - begun
      text = ' '.join(f'{k} {float(v) / n:.4f}' for k, v in totals.items())
      print(f'step {done}/{steps} {text} | {n / seconds:.2f} steps/s', flush=True)
      begun, since, totals = time.time(), done, {}
    if done % every == 0 or done == steps:
      if manager is not None:
        manager.save(done, args=ocp.args.StandardSave(state))
      if evaluate is not None:
        evaluate(state['ema'] if ema else state['params'], done)
      # the clock of a fresh line does not count the time of saving and evaluating
      begun = time.time() if done == since else begun
  if manager is not None:
    manager.close()
  return state['ema'] if ema else state['params']


def round_weights(params, dtype=jnp.float16):
  """Rounds weights as `export_weights` and loading do: shipped metrics are measured on these."""
  return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)


def export_weights(path, params, *, kind, config, **card):
  """Writes float16 weights with the metadata from which the model is rebuilt.

  Args:
    path: of the safetensors file.
    params: nested dict of arrays.
    kind: name of the module that has `Config` and `build_model`.
    config: the fields of that `Config`.
    card: metrics, command, seed, defaults; any JSON values.
  """
  metadata = {'kind': kind, 'config': config, **card}
  write_weights(str(path), params, metadata, dtype=jnp.float16)
  print(f'wrote {path}: {modules.count_parameters(params):,} parameters', flush=True)
