"""Stable Diffusion XL and 1.5: FK steering and its relatives by ImageReward, against best-of-n.

    vtts run --config=configs/sdxl_fk.py:fk             XL, 4 particles (arXiv 2501.06848)
    vtts run --config=configs/sdxl_fk.py:fk,sd15        1.5; or sd21, or sdxl, the default
    vtts run --config=configs/sdxl_fk.py:das            DAS without its gradient (2501.05803)
    vtts run --config=configs/sdxl_fk.py:svdd           SVDD-PM: the best of 20 at each step
                                                        (2408.08252)
    vtts run --config=configs/sdxl_fk.py:bfs            the best point of 2505.23614's grid
    vtts run --config=configs/sdxl_fk.py:fk,clip        by CLIPScore instead of ImageReward
    vtts run --config=configs/sdxl_fk.py:fk,runlocal    tiny random weights, no files, a minute on a
                                                        CPU

Options follow the search in any order. Two arms run on the same prompts: the search, and
`best-of-n` with as many pictures as it has particles (for SVDD, as its evaluations pay for). FK's
settings are those of the authors' launch: DDIM with eta 1, 100 steps, 4 particles, strength 10,
potential 'max', resampled after steps 21, 41, 61 and 81; guidance is the pipelines' own, 5 for XL
and 7.5 for the others. --config.generator.weights=FILE.safetensors reads an original single file,
and needs --config.generator.tokenizer.

What comes out: runs/<model>-<search>-<verifier>-<hash>/ with report.html, curve.png, grid.png and
one line for each (arm, seed, prompt). Prompts are GenEval's; pictures are graded by its rules on
what OWL-ViT sees, which the report calls not official. Both verifiers measure every arm: the one
that does not search is held out. No run with released weights has been timed.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.generators.unet import RELEASES, TINY, TINY_XL
from vtts_jax.search.smc import PRESETS

VERIFIERS = {name: default_settings(f'verifiers.{name}') for name in ('image_reward', 'clip')}
STEPS = 100
FK_TIMES = (21, 41, 61, 81, STEPS)  # the authors' steps count from 0, and they weigh after a step


def smc_settings(preset: str, **settings) -> dict:
  """Particles with the settings of a paper."""
  return default_settings('search.smc', **PRESETS[preset] | settings)


# the search, pictures of best-of-n, and what runlocal makes of the search
SEARCHES = {
  'fk': (smc_settings('fk', schedule=FK_TIMES), 4, {'schedule': (2, 3), 'particles': 3}),
  'das': (smc_settings('das'), 4, {'particles': 3}),
  'svdd': (smc_settings('svdd'), 21, {'branch': 2}),
  'bfs': (smc_settings('best', particles=4, schedule=FK_TIMES), 4, {'schedule': (2, 3)}),
}
LOCAL_PROMPTS = ('a photo of a bench', 'a photo of two dogs')
# accuracy is right or wrong; the partial credit that a search climbs is another number
GRADED = {'name': 'verifiers.geneval', 'output': 'strict'}


def get_config(arg: str = 'fk') -> ConfigDict:
  """The config of a search with its options, as in 'fk,sd15,runlocal'.

  Raises:
    ValueError: an unknown search or option.
  """
  what, *options = (arg or 'fk').split(',')
  chosen = [o for o in options if o in VERIFIERS]
  models = [o for o in options if o in RELEASES]
  unknown = [o for o in options if o not in (*VERIFIERS, *RELEASES, 'runlocal')]
  if what not in SEARCHES or unknown or max(len(chosen), len(models)) > 1:
    raise ValueError(
      f'configs/sdxl_fk.py:{arg}: must be one of {", ".join(SEARCHES)}, then at most one of '
      f'{", ".join(VERIFIERS)}, at most one of {", ".join(RELEASES)}, runlocal'
    )
  which, model = (chosen or ['image_reward'])[0], (models or ['sdxl'])[0]
  search, pictures, smaller = SEARCHES[what]
  measures = {name: dict(settings) for name, settings in VERIFIERS.items()}
  # copies of a particle diverge by the noise of their steps
  settings = RELEASES[model] | {'sampler': 'ddim', 'eta': 1.0, 'steps': STEPS}
  generator, metric = default_settings('generators.unet', **settings), dict(GRADED)
  name = f'{model}-{what}-{which}'
  prompts = {'name': 'data.prompts', 'path': 'geneval', 'texts': (), 'count': 0}
  if 'runlocal' in options:
    name += '-runlocal'
    prompts.update(path='', texts=LOCAL_PROMPTS)
    generator.update(**TINY_XL if model == 'sdxl' else TINY, steps=3)
    metric['weights'] = 'random:tiny'
    for verifier in measures.values():
      verifier.update({key: 'random:tiny' for key in verifier if key.endswith('weights')})
    search, pictures = search | smaller, 3
  return ConfigDict({
    'name': name,
    'workdir': 'runs',
    'prompts': prompts,
    'generator': generator,
    'verifier': measures[which],
    'measure': measures,
    'metric': metric,
    'search': search,
    'arms': {
      what: {'search': search},
      'best-of-n': {'search': {'name': 'search.best_of_n', 'n': pictures}},
    },
    'seeds': (0,),
    'batch': 2 if 'runlocal' in options else 1,
    'render_chunk': 4,
    'mode': 'stepped',
    'mesh': {'model': 1},  # devices that share one copy of the weights
    'stop': placeholder(float),  # a score at which a prompt's search ends
    'budget': {'generator': 0.0, 'observe': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 6,
  })  # fmt: skip
