"""SiT-XL/2 on ImageNet: search over noise, as in arXiv 2501.09732.

    vtts run --config=configs/sit_imagenet.py:random           best of 64 noises of each class, by
                                                               DINOv2's logit of the class
    vtts run --config=configs/sit_imagenet.py:random,clip      by zero-shot CLIP
    vtts run --config=configs/sit_imagenet.py:random,self      by self-consistency, without labels
    vtts run --config=configs/sit_imagenet.py:random,runlocal  tiny random weights, no files

The paper's settings: Heun's method with 50 evaluations, guidance 1, every class. Weights of SiT are
saved as safetensors first (models/sit/README.md): --config.generator.weights=PATH. CLIP wants
--config.verifier.class_names=FILE, whose line i names class i.

Each verifier is a held-out measure of a search by the others: one that rises alone is hacked.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.generators.sit import TINY

VERIFIERS = {
  'dino': default_settings('verifiers.dino_logit'),
  'clip': default_settings('verifiers.clip_classifier'),
  'self': default_settings('verifiers.self_consistency'),
}
# the search and what runlocal makes of it
SEARCHES = {'random': (default_settings('search.best_of_n', n=64), {'n': 4})}
EARLY_AT = 20  # of 25 steps: the low noise level whose prediction self-consistency reads


def get_config(arg: str = 'random') -> ConfigDict:
  """The config of a search with its options, as in 'random,clip,runlocal'.

  Raises:
    ValueError: an unknown search or option.
  """
  what, *options = (arg or 'random').split(',')
  chosen = [o for o in options if o in VERIFIERS]
  unknown = [o for o in options if o not in (*VERIFIERS, 'runlocal')]
  if what not in SEARCHES or unknown or len(chosen) > 1:
    raise ValueError(
      f'configs/sit_imagenet.py:{arg}: must be one of {", ".join(SEARCHES)}, then at most one of '
      f'{", ".join(VERIFIERS)}, runlocal'
    )
  local = 'runlocal' in options
  which = chosen[0] if chosen else 'dino'
  search, smaller = SEARCHES[what]
  # CLIP needs a file of names, so it measures only what it also searches
  measures = {name: dict(v) for name, v in VERIFIERS.items() if name in (which, 'dino')}
  generator = default_settings('generators.sit', guidance=1.0)
  if which == 'self':
    generator['early_at'] = EARLY_AT
  config = {
    'name': f'sit-{what}-{which}',
    'workdir': 'runs',
    'prompts': {
      'name': 'data.prompts', 'path': '', 'texts': tuple(map(str, range(1000))), 'count': 0,
    },
    'generator': generator,
    'verifier': measures[which],
    'measure': measures,
    'metric': 'data.prompts',
    'search': dict(search),
    'arms': {},
    'seeds': (0,),
    'batch': 1,
    'render_chunk': 8,
    'mode': 'stepped',
    'mesh': {'model': 1},  # devices that share one copy of the weights
    'stop': placeholder(float),  # a score at which a prompt's search ends
    'budget': {'generator': 0.0, 'observe': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 6,
  }  # fmt: skip
  if local:
    config['name'] = f'sit-{what}-{which}-runlocal'
    config['prompts']['texts'] = ('0', '3')
    generator.update(**TINY, steps=3)
    generator['early_at'] = min(generator['early_at'], 2)
    for verifier in measures.values():
      # self-consistency's '' stands for a released DINO
      verifier.update({key: 'random:tiny' for key in verifier if key.endswith('weights')})
    config['search'].update(smaller)
    config['batch'] = 2
  return ConfigDict(config)
