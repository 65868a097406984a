"""Stable Diffusion 3 and 3.5 on GenEval: search over noise, graded by GenEval's rules.

    vtts run --config=configs/sd35_geneval.py:random             best of 16 noises of each of the
                                                                 553 prompts, by ImageReward
    vtts run --config=configs/sd35_geneval.py:random,clip        by another verifier: clip, vqa,
                                                                 geneval (an oracle) or ensemble
    vtts run --config=configs/sd35_geneval.py:random,3.5_large   medium, 3.5_medium (the default),
                                                                 3.5_large or 3.5_large_turbo
    vtts run --config=configs/sd35_geneval.py:random,runlocal    tiny random weights, no files, a
                                                                 minute on a CPU

Options follow the search in any order. Settings are those of the releases: 40 steps and guidance
4.5 for 3.5 medium, shift 3, 1024 x 1024 pixels. `ensemble` searches by the ranks of clip and
image_reward. The weights are gated (models/sd3/README.md).

What comes out: runs/sd3-<model>-<search>-<verifier>-<hash>/ with report.html, curve.png, grid.png
and one line for each (arm, seed, prompt). Pictures are graded by GenEval's rules on what OWL-ViT
sees, which the report calls not official; a search by `geneval` is called an oracle's. No run with
released weights has been timed.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.generators.sd3 import RELEASES, TINY

VERIFIERS = {
  'image_reward': default_settings('verifiers.image_reward'),
  'clip': default_settings('verifiers.clip'),
  'vqa': default_settings('verifiers.vqa_score'),
  'geneval': default_settings('verifiers.geneval'),
}
MEASURED = ('image_reward', 'clip')  # held-out scores of every search, and the ensemble's members
# the search and what runlocal makes of it
SEARCHES = {
  'random': (default_settings('search.best_of_n', n=16, round=8), {'n': 4, 'round': 2}),
}
LOCAL_PROMPTS = ('a photo of a bench', 'a photo of two dogs')
# accuracy is right or wrong; the partial credit that a search climbs is another number
GRADED = {'name': 'verifiers.geneval', 'output': 'strict'}


def get_config(arg: str = 'random') -> ConfigDict:
  """The config of a search with its options, as in 'random,clip,runlocal'.

  Raises:
    ValueError: an unknown search or option.
  """
  what, *options = (arg or 'random').split(',')
  names = ('ensemble', *VERIFIERS)
  chosen = [o for o in options if o in names]
  models = [o for o in options if o in RELEASES]
  unknown = [o for o in options if o not in (*names, *RELEASES, 'runlocal')]
  if what not in SEARCHES or unknown or max(len(chosen), len(models)) > 1:
    raise ValueError(
      f'configs/sd35_geneval.py:{arg}: must be one of {", ".join(SEARCHES)}, then at most one of '
      f'{", ".join(names)}, at most one of {", ".join(RELEASES)}, runlocal'
    )
  which, model = (chosen or ['image_reward'])[0], (models or ['3.5_medium'])[0]
  search, smaller = SEARCHES[what]
  measures = {
    name: dict(settings)
    for name, settings in VERIFIERS.items()
    if name in MEASURED or name == which
  }
  generator = default_settings('generators.sd3', **RELEASES[model])
  name = f'sd3-{model}-{what}-{which}'
  prompts = {'name': 'data.prompts', 'path': 'geneval', 'texts': (), 'count': 0}
  metric = dict(GRADED)
  if 'runlocal' in options:
    name += '-runlocal'
    prompts.update(path='', texts=LOCAL_PROMPTS)
    generator.update(**TINY, steps=3)
    metric['weights'] = 'random:tiny'
    for verifier in measures.values():
      verifier.update({key: 'random:tiny' for key in verifier if key.endswith('weights')})
  members = {name: measures[name] for name in MEASURED}
  verifier = measures.get(which) or default_settings('verifiers.ensemble', members=members)
  return ConfigDict({
    'name': name,
    'workdir': 'runs',
    'prompts': prompts,
    'generator': generator,
    'verifier': verifier,
    'measure': measures,
    'metric': metric,
    'search': search | (smaller if 'runlocal' in options else {}),
    'arms': {},
    'seeds': (0,),
    'batch': 2 if 'runlocal' in options else 1,
    'render_chunk': 8,
    'mode': 'stepped',
    'mesh': {'model': 1},  # devices that share one copy of the weights
    'stop': placeholder(float),  # a score at which a prompt's search ends
    'budget': {'generator': 0.0, 'observe': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 6,
  })  # fmt: skip
