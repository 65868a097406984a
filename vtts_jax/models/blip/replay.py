"""Replays golden files of the families `blip` (tests/golden) and `cyclereward`: every stage of
pictures and texts."""

import jax
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.blip import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture; `testing.replay` passes the arguments."""
  cycle = config['model'] == 'cyclereward'
  sizes = convert.config_of(source, **(_options_of(config) if cycle else config['options']))
  params = convert.load_weights(source, sizes)
  run_model = _run_cycle_reward if cycle else _run_image_reward
  # numpy's int64 ids are int32 in jax
  inputs = {k: v if v.dtype.kind == 'f' else v.astype(np.int32) for k, v in inputs.items()}
  run = jax.jit(
    lambda params, inputs: run_model(
      modules.bind_module(modeling.build_model, sizes, params), inputs
    )
  )
  return {name: np.asarray(value) for name, value in run(params, inputs).items()}


def _options_of(config):
  """Returns what no tensor of a CycleReward tells, under our names."""
  sizes = config['params']
  names = {'vision_heads': 'vision_heads', 'text_heads': 'heads', 'text_len': 'length'}
  return {ours: sizes[theirs] for theirs, ours in names.items()}


def _run_image_reward(model, inputs):
  """The picture's trunk's input, the tower's output, the text layers and the reward."""
  image = model.vision(inputs['images'])
  text = model.encode_text(inputs['ids'], inputs['mask'])
  first, states = model.fuse_image(text, inputs['mask'], image)
  return {
    'tokens': model.vision.embed_patches(inputs['images']),
    'image': image,
    'embedded': model.embed_tokens(inputs['ids']),
    'states': states,
    'first': first,
    'reward': model.predict_reward(first),
  }


def _run_cycle_reward(model, inputs):
  """The tower's output, all words after the last layer, the first of them and its reward."""
  image, mask = model.vision(inputs['image'].transpose(0, 2, 3, 1)), inputs['text_mask']
  text = model.encode_text(inputs['text_ids'], mask)
  first, _ = model.fuse_image(text, mask, image)
  return {
    'image_embeds': image,
    'text_last_hidden': model.last(model.fuse_words(text, mask, image)[0], image),
    'cls_hidden': first,
    'score': model.predict_reward(first)[:, None],
  }
