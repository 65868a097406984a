"""Makes the output of a result line again, from the state that its run kept: tokens or noise.

    remake_output('runs/scenes-demo-0123456789', 'beam', seed=0, prompt_id=7)

The search is not repeated, and no verifier is loaded: the generator decodes the state. So a winner
can be shown at another size or in another format, long after the run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from vtts_jax import core
from vtts_jax.engine.search import load_parameters
from vtts_jax.errors import ConfigError
from vtts_jax.study import arms, store


def remake_output(root, arm: str, seed: int, prompt_id: int, **changes) -> np.ndarray:
  """The first output of what a search found, as its generator shows it.

  Args:
    root: run directory.
    arm, seed, prompt_id: of the result line.
    changes: settings of the generator to decode with, such as more decoder steps.

  Raises:
    ConfigError: no such run or line, or one whose search found nothing.
  """
  config = store.read_about(root)['config']
  wanted = (arm, seed, prompt_id)
  rows = store.read_results(root)
  row = next((r for r in rows if (r['arm'], r['seed'], r['id']) == wanted), None)
  if row is None or 'state' not in row:
    raise ConfigError(f'{root}: no state of arm {arm!r}, seed {seed}, prompt {prompt_id}')
  prompt = next(p for p in arms.read_prompts(config['prompts']) if p['id'] == prompt_id)
  settings = arms.settings_by_arm(config)[arm]['generator']
  gen = arms.build_part({**settings, **changes}, 'generator')
  with (epath.Path(root) / row['state']).open('rb') as file, np.load(file) as arrays:
    kept = dict(arrays)
  return decode_state(gen, load_parameters(gen), prompt, kept)


def decode_state(gen: core.Generator, params, prompt: core.Prompt, kept) -> np.ndarray:
  """The first output of a state, given as `Store.save_state` writes it."""
  tokens = gen.tokenize([prompt])
  shapes = jax.eval_shape(functools.partial(_empty_state, gen), params, tokens)
  wanted, structure = jax.tree_util.tree_flatten_with_path(shapes)
  leaves = []
  for path, shape in wanted:
    leaf = kept[f'state{jax.tree_util.keystr(path)}']
    # .npz does not know bfloat16, and returns its bytes without a type
    leaf = leaf.view(shape.dtype) if leaf.dtype.kind == 'V' else leaf.astype(shape.dtype)
    leaves.append(jnp.asarray(leaf)[None, None])
  state, stage = jax.tree.unflatten(structure, leaves), jnp.asarray(kept['stage'])[None, None]
  return np.asarray(_decode(gen, params, tokens, state, stage))[0, 0]


def _empty_state(gen, params, tokens):
  keys = core.candidate_keys(jax.random.split(jax.random.key(0), 1), jnp.arange(1))
  return gen.drop_cache(gen.init(params, gen.encode(params, tokens), keys))


@functools.partial(jax.jit, static_argnums=0)
def _decode(gen, params, tokens, state, stage):
  name = next(iter(gen.outputs))
  return gen.observe(params, gen.encode(params, tokens), state, stage, (name,))[name]
