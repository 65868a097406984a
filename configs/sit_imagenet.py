"""SiT-XL/2 on ImageNet: search over noise, as in arXiv 2501.09732.

    vtts run --config=configs/sit_imagenet.py:random           best of 64 noises of each class, by
                                                               DINOv2's logit of the class
    vtts run --config=configs/sit_imagenet.py:random,clip      by zero-shot CLIP
    vtts run --config=configs/sit_imagenet.py:random,self      by self-consistency, without labels
    vtts run --config=configs/sit_imagenet.py:zero_order_2     another search: zero_order_2 or _4,
                                                               paths_2 or _4, first_order,
                                                               noise_bandit, evolution, cma_es
    vtts run --config=configs/sit_imagenet.py:figures          the paper's searches at rising
                                                               budgets, up to 8,000 evaluations
    vtts run --config=configs/sit_imagenet.py:random,runlocal  tiny random weights, no files

The paper's settings: Heun's method with 50 evaluations, guidance 1, every class. Weights of SiT are
saved as safetensors first (models/sit/README.md): --config.generator.weights=PATH. CLIP wants
--config.verifier.class_names=FILE, whose line i names class i.

Each search spends about the 3,200 evaluations of 64 samples; noise_bandit (7,680) and evolution
(5,000) have their papers' settings. The bill is the search NFE; the paper adds a last sample of 250
evaluations, which is no other picture but a finer one.

Each verifier is a held-out measure of a search by the others: one that rises alone is hacked.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.generators.sit import TINY
from vtts_jax.study.sweep import build_grid, vary_setting

VERIFIERS = {
  'dino': default_settings('verifiers.dino_logit'),
  'clip': default_settings('verifiers.clip_classifier'),
  'self': default_settings('verifiers.self_consistency'),
}
# the search and what runlocal makes of it, for a generator of three stages
SEARCHES = {
  'random': (default_settings('search.best_of_n', n=64), {'n': 4}),
  # the paper keeps its pivot; the default draws a new one, as tt-scale-flux does
  'zero_order_2': (
    default_settings('search.zero_order', neighbours=2, rounds=32, patience=0), {'rounds': 2},
  ),
  'zero_order_4': (
    default_settings('search.zero_order', neighbours=4, rounds=16, patience=0), {'rounds': 2},
  ),
  'paths_2': (
    default_settings('search.paths', paths=2, expansions=12),
    {'expansions': 2, 'start': 0.4, 'forward': 0.3, 'backward': 0.6},
  ),
  'paths_4': (
    default_settings('search.paths', paths=4, expansions=6),
    {'expansions': 2, 'start': 0.4, 'forward': 0.3, 'backward': 0.6},
  ),
  'first_order': (default_settings('search.first_order', rounds=16), {'rounds': 2}),
  'noise_bandit': (default_settings('search.noise_bandit'), {'arms': 2, 'rounds': 2}),
  'evolution': (
    default_settings('search.evolution'),
    {'schedule': (0.0, 0.4), 'sizes': (3, 2, 2), 'elites': 1},
  ),
  'cma_es': (
    default_settings('search.cma_es', generations=4),
    {'population': 2, 'generations': 2, 'block': 2},
  ),
}  # fmt: skip
# the paper's curves: random search holds its smaller budgets, of the others a run is a point
FIGURES = {
  'random': vary_setting('search.best_of_n', 'n', (160,)),
  **{
    f'zero_order_{n}': vary_setting(
      'search.zero_order', 'rounds', rounds, neighbours=n, patience=0
    )
    for n, rounds in ((2, (8, 32, 80)), (4, (4, 16, 40)))
  },
  **{
    f'paths_{n}': vary_setting('search.paths', 'expansions', expansions, paths=n)
    for n, expansions in ((2, (3, 12, 31)), (4, (2, 6, 15)))
  },
}
EARLY_AT = 20  # of 25 steps: the low noise level whose prediction self-consistency reads


def get_config(arg: str = 'random') -> ConfigDict:
  """The config of a search with its options, as in 'random,clip,runlocal'.

  Raises:
    ValueError: an unknown search or option.
  """
  what, *options = (arg or 'random').split(',')
  chosen = [o for o in options if o in VERIFIERS]
  unknown = [o for o in options if o not in (*VERIFIERS, 'runlocal')]
  if what not in (*SEARCHES, 'figures') or unknown or len(chosen) > 1:
    raise ValueError(
      f'configs/sit_imagenet.py:{arg}: must be one of {", ".join(SEARCHES)}, figures, then at most '
      f'one of {", ".join(VERIFIERS)}, runlocal'
    )
  local = 'runlocal' in options
  which = chosen[0] if chosen else 'dino'
  search, smaller = SEARCHES['random' if what == 'figures' else what]
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
    'arms': build_grid(FIGURES) if what == 'figures' else {},
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
    if what == 'figures':
      config['arms'] = {
        name: {'search': dict(SEARCHES[name][0]) | SEARCHES[name][1]}
        for name in ('random', 'zero_order_2', 'paths_2')
      }
    config['batch'] = 2
  return ConfigDict(config)
