"""RandAR on ImageNet: search over what to draw, and over where to draw next.

    vtts run --config=configs/randar_imagenet.py:bon              best of 64 pictures of each class,
                                                                  each in a random order of its own
    vtts run --config=configs/randar_imagenet.py:beam             4 beams of 4 children, at every
                                                                  eighth of the cells; a child goes
                                                                  on in an order of its own
    vtts run --config=configs/randar_imagenet.py:parallel         best of 64, in 88 steps of several
                                                                  cells
    vtts run --config=configs/randar_imagenet.py:beam,clip        another verifier: dino (default),
                                                                  clip
    vtts run --config=configs/randar_imagenet.py:bon,0.3b         the small model: 0.3b, 0.7b
    vtts run --config=configs/randar_imagenet.py:bon,runlocal     tiny random weights, no files,
                                                                  half a minute on a CPU
    vtts run --config=configs/randar_imagenet.py:beam --config.generator.order=raster

Settings are those of the release (arXiv 2412.01827): 256 cells, temperature 1, guidance that grows
from 1 to 4.0 (0.7B) or 3.4 (0.3B). The release searches nothing; best-of-N and the beam are the
baselines of this library, and the orders `candidate`, `prompt` and `raster` tell what the freedom
of the order is worth at the same cost. The prior is released as safetensors; the tokenizer is saved
as such first (models/llamagen/README.md): --config.generator.tokenizer_weights=PATH. CLIP wants
--config.verifier.class_names=FILE, whose line i names class i.

What comes out: runs/randar-<search>-<model>-<verifier>-<hash>/ with report.html, curve.png,
grid.png and one line for each (arm, seed, prompt).

How long: no run with released weights has been timed.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.generators.randar import TINY

FILES = 'ziqipang/RandAR/randar_{}_llamagen_360k_bs_1024_lr_0.0004.safetensors'
MODELS = {
  '0.3b': {'prior_weights': FILES.format('0.3b'), 'guidance': 3.4},
  '0.7b': {'prior_weights': FILES.format('0.7b'), 'guidance': 4.0},
}
VERIFIERS = {
  'dino': default_settings('verifiers.dino_logit'),
  'clip': default_settings('verifiers.clip_classifier'),
}
BEST_OF_64 = default_settings('search.best_of_n', n=64)
# candidates are looked at as complete pictures: half a picture says little
BEAM = default_settings(
  'search.beam', width=4, branch=4, schedule='linear', size=32, branch_at='first', lookahead=-1,
)  # fmt: skip
# generator, search and what runlocal makes of the two
SEARCHES = {
  'bon': ('generators.randar', BEST_OF_64, {}, {'n': 4}),
  'beam': ('generators.randar', BEAM, {}, {'width': 2, 'branch': 2, 'size': 3}),
  'parallel': ('generators.randar_parallel', BEST_OF_64, {'steps': 4}, {'n': 4}),
}


def get_config(arg: str = 'bon') -> ConfigDict:
  """The config of a search with its options, as in 'beam,clip,runlocal'.

  Raises:
    ValueError: an unknown search or option.
  """
  what, *options = (arg or 'bon').split(',')
  chosen = [o for o in options if o in VERIFIERS]
  models = [o for o in options if o in MODELS]
  unknown = [o for o in options if o not in (*VERIFIERS, *MODELS, 'runlocal')]
  if what not in SEARCHES or unknown or max(len(chosen), len(models)) > 1:
    raise ValueError(
      f'configs/randar_imagenet.py:{arg}: must be one of {", ".join(SEARCHES)}, then at most one '
      f'of {", ".join(VERIFIERS)}, at most one of {", ".join(MODELS)}, runlocal'
    )
  which, model = (chosen or ['dino'])[0], (models or ['0.7b'])[0]
  component, search, tiny, smaller = SEARCHES[what]
  # CLIP needs a file of names, so it measures only what it also searches
  measures = {name: dict(v) for name, v in VERIFIERS.items() if name in (which, 'dino')}
  config = {
    'name': f'randar-{what}-{model}-{which}',
    'workdir': 'runs',
    'prompts': {
      'name': 'data.prompts', 'path': '', 'texts': tuple(map(str, range(1000))), 'count': 0,
    },
    'generator': default_settings(component, **MODELS[model]),
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
    config['name'] = f'randar-{what}-{which}-runlocal'
    config['prompts']['texts'] = ('0', '3')
    config['generator'].update(**TINY, **tiny)
    for verifier in measures.values():
      verifier.update({key: 'random:tiny' for key in verifier if key.endswith('weights')})
    config['search'].update(smaller)
    config['batch'] = 2
  return ConfigDict(config)
