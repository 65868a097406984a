"""VAR on ImageNet: search over the scales of a picture.

    vtts run --config=configs/var_imagenet.py:bon             best of 64 pictures of each class
    vtts run --config=configs/var_imagenet.py:beam            4 beams of 4 at every scale, judged by
                                                              the picture so far
    vtts run --config=configs/var_imagenet.py:lookahead       the same, judged by completed pictures
    vtts run --config=configs/var_imagenet.py:beam,clip       by zero-shot CLIP
    vtts run --config=configs/var_imagenet.py:beam,d16        VAR-d16; d20, d24, d30 (the default)
                                                              and d36_512
    vtts run --config=configs/var_imagenet.py:beam,runlocal   tiny random weights, no files, half a
                                                              minute on two cores

Sampling is the published one for FID: guidance 1.5, top-k 900, top-p 0.96. The weights are saved as
safetensors first (models/var/README.md) and lie in this folder, or where
--config.generator.weights=PATH and --config.generator.tokenizer_weights=PATH say. CLIP wants
--config.verifier.class_names=FILE, whose line i names class i.

Each verifier is a held-out measure of a search by the other: one that rises alone is hacked.

Time: not measured at full size, since no released weights could be read where this was written.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.generators.var import TINY

VERIFIERS = {
  'dino': default_settings('verifiers.dino_logit'),
  'clip': default_settings('verifiers.clip_classifier'),
}
# d36 is the model of 512 x 512 pixels
WEIGHTS = {
  **{size: f'var_{size}.safetensors' for size in ('d16', 'd20', 'd24', 'd30')},
  'd36_512': 'var_d36.safetensors',
}


def _beam(**settings):
  # a step is a scale
  fixed = {'width': 4, 'branch': 4, 'schedule': 'linear', 'size': 1}
  return default_settings('search.beam', **fixed | settings)


# the search and what runlocal makes of it
SEARCHES = {
  'bon': (default_settings('search.best_of_n', n=64), {'n': 4}),
  'beam': (_beam(), {'width': 2, 'branch': 2}),
  'lookahead': (_beam(lookahead=-1), {'width': 2, 'branch': 2}),
}


def get_config(arg: str = 'bon') -> ConfigDict:
  """The config of a search with its options, as in 'beam,clip,runlocal'.

  Raises:
    ValueError: an unknown search or option.
  """
  what, *options = (arg or 'bon').split(',')
  chosen = [o for o in options if o in VERIFIERS]
  sizes = [o for o in options if o in WEIGHTS]
  unknown = [o for o in options if o not in (*VERIFIERS, *WEIGHTS, 'runlocal')]
  if what not in SEARCHES or unknown or len(chosen) > 1 or len(sizes) > 1:
    raise ValueError(
      f'configs/var_imagenet.py:{arg}: must be one of {", ".join(SEARCHES)}, then at most one of '
      f'{", ".join(VERIFIERS)}, one of {", ".join(WEIGHTS)}, runlocal'
    )
  which = chosen[0] if chosen else 'dino'
  search, smaller = SEARCHES[what]
  # CLIP needs a file of names, so it measures only what it also searches
  measures = {name: dict(v) for name, v in VERIFIERS.items() if name in (which, 'dino')}
  weights = WEIGHTS[sizes[0] if sizes else 'd30']
  config = {
    'name': f'var-{what}-{which}',
    'workdir': 'runs',
    'prompts': {
      'name': 'data.prompts', 'path': '', 'texts': tuple(map(str, range(1000))), 'count': 0,
    },
    # 32 bits would double the caches of the candidates
    'generator': default_settings('generators.var', weights=weights, dtype='bfloat16'),
    'verifier': measures[which],
    'measure': measures,
    'metric': 'data.prompts',
    'search': dict(search),
    'arms': {},
    'seeds': (0,),
    'batch': 1,
    'render_chunk': 16,
    'mode': 'stepped',
    'mesh': {'model': 1},  # devices that share one copy of the weights
    'stop': placeholder(float),  # a score at which a prompt's search ends
    'budget': {'generator': 0.0, 'observe': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 6,
  }  # fmt: skip
  if 'runlocal' in options:
    config['name'] = f'var-{what}-{which}-runlocal'
    config['prompts']['texts'] = ('0', '3')
    # 16 codes; a host computes in 32 bits faster
    config['generator'].update(**TINY, top_k=8, dtype='float32')
    for verifier in measures.values():
      verifier.update({key: 'random:tiny' for key in verifier if key.endswith('weights')})
    config['search'].update(smaller)
    config['batch'] = 2
  return ConfigDict(config)
