"""Makes the output of a result line again, from the state that its run kept: tokens or noise.

    remake_output('runs/scenes-demo-0123456789', 'beam', seed=0, prompt_id=7)

The generator decodes the stored state. The search is not repeated and no verifier is loaded, so
that a winner can be decoded in more steps or saved in another format long after the run.
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
  """The first output of what a search found, without the axes of prompts and candidates.

  Args:
    root: the run directory.
    arm, seed, prompt_id: of the result line.
    changes: settings of the generator to decode with, such as more decoder steps.

  Raises:
    ConfigError: no such run, no such line, or a line whose search found nothing.
  """
  config = store.read_run_info(root)['config']
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
  """The first output of a state, without the axes of prompts and candidates.

  Args:
    gen, params: the generator and its weights.
    prompt: the prompt row that the state was found for.
    kept: arrays by name, as `Store.save_state` writes them.
  """
  tokens = gen.tokenize([prompt])
  # a file has leaves without their tree; an empty candidate of the generator has the tree
  shapes = jax.eval_shape(functools.partial(_empty_state, gen), params, tokens)
  wanted, structure = jax.tree_util.tree_flatten_with_path(shapes)
  leaves = []
  for path, shape in wanted:
    leaf = kept[f'state{jax.tree_util.keystr(path)}']
    # .npz does not know bfloat16, and returns its bytes without a type
    leaf = leaf.view(shape.dtype) if leaf.dtype.kind == 'V' else leaf.astype(shape.dtype)
    leaves.append(jnp.asarray(leaf)[None, None])  # one prompt, one candidate
  state, stage = jax.tree.unflatten(structure, leaves), jnp.asarray(kept['stage'])[None, None]
  return np.asarray(_decode_candidate(gen, params, tokens, state, stage))[0, 0]


def _empty_state(gen, params, tokens):
  """The state of one candidate at stage 0, as states are stored: without caches."""
  keys = core.candidate_keys(jax.random.split(jax.random.key(0), 1), jnp.arange(1))
  return gen.drop_cache(gen.init(params, gen.encode(params, tokens), keys))


@functools.partial(jax.jit, static_argnums=0)
def _decode_candidate(gen, params, tokens, state, stage):
  """The first output `[1, 1, ...]` of a state of one candidate."""
  name = next(iter(gen.outputs))
  return gen.observe(params, gen.encode(params, tokens), state, stage, (name,))[name]
