"""SANA-1.5 and Sprint on GenEval: best of 2048 pictures by a judge, as in arXiv 2501.18427.

    vtts run --config=configs/sana_geneval.py:random               best of 2048 for each of the 553
                                                                   prompts, by VQAScore
    vtts run --config=configs/sana_geneval.py:random,judge \\
      --config.verifier.url=http://localhost:8000/v1 --config.verifier.chat_model=NAME
                                                                   by a vision-language model that
                                                                   you serve (vLLM, SGLang ..)
    vtts run --config=configs/sana_geneval.py:random,image_reward  by ImageReward, or by clip
    vtts run --config=configs/sana_geneval.py:random,sprint_1600m  another model: 600m, 1600m,
                                                                   1.5_1600m, 1.5_4800m (default),
                                                                   sprint_600m, sprint_1600m
    vtts run --config=configs/sana_geneval.py:random,runlocal      tiny random weights, no files,
                                                                   a minute on a CPU
    vtts run --config=configs/sana_geneval.py:random --config.search.n=32

Options follow the search in any order. Settings are those of the releases: 20 steps and guidance
4.5, or Sprint's 2 steps, at 1024 x 1024 pixels in bfloat16. Candidates are drawn in rounds of 32,
and the curve has a point after each round: in the paper 32 already lift GenEval from .81 above .90,
and 2048 to .96.

What differs from the paper: its judge is a fine-tuned NVILA-Lite-2B that compares two pictures at a
time, here a judge scores each picture alone; it grades its four best pictures, here the best one.

What comes out: runs/sana-<model>-<search>-<verifier>-<hash>/ with report.html, curve.png, grid.png
and one line for each (arm, seed, prompt). Pictures are graded by GenEval's rules on what OWL-ViT
sees, which the report calls not official.

How long: no run with released weights has been timed. A prompt of best of 2048 takes 40,960 steps:
744 PFLOP with 1.5_4800m and 259 with 1600m; with sprint_1600m 4,096 steps and 29 PFLOP. The
verifier comes on top.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.generators import sana, sana_sprint

MODELS = {
  **{name: ('generators.sana', settings, sana.TINY) for name, settings in sana.RELEASES.items()},
  **{
    f'sprint_{name}': ('generators.sana_sprint', settings, sana_sprint.TINY)
    for name, settings in sana_sprint.RELEASES.items()
  },
}
VERIFIERS = {
  'vqa': default_settings('verifiers.vqa_score'),
  'judge': default_settings('verifiers.vqa_endpoint', key_env=''),
  'image_reward': default_settings('verifiers.image_reward'),
  'clip': default_settings('verifiers.clip'),
}
HELD_OUT = ('image_reward', 'clip')  # measured whatever is searched on: hacking shows here
# the search and what runlocal makes of it
SEARCHES = {
  'random': (default_settings('search.best_of_n', n=2048, round=32), {'n': 4, 'round': 2}),
}
LOCAL_PROMPTS = ('a photo of a bench', 'a photo of two dogs')
# accuracy is right or wrong; the partial credit that a search climbs is another number
GRADED = {'name': 'verifiers.geneval', 'output': 'strict'}


def get_config(arg: str = 'random') -> ConfigDict:
  """The config of a search with its options, as in 'random,1600m,clip'.

  Raises:
    ValueError: an unknown search or option.
  """
  what, *options = (arg or 'random').split(',')
  chosen = [o for o in options if o in VERIFIERS]
  models = [o for o in options if o in MODELS]
  unknown = [o for o in options if o not in (*VERIFIERS, *MODELS, 'runlocal')]
  if what not in SEARCHES or unknown or max(len(chosen), len(models)) > 1:
    raise ValueError(
      f'configs/sana_geneval.py:{arg}: must be one of {", ".join(SEARCHES)}, then at most one of '
      f'{", ".join(VERIFIERS)}, at most one of {", ".join(MODELS)}, runlocal'
    )
  which, model = (chosen or ['vqa'])[0], (models or ['1.5_4800m'])[0]
  component, released, tiny = MODELS[model]
  search, smaller = SEARCHES[what]
  generator = default_settings(component, **released)
  measures = {name: dict(VERIFIERS[name]) for name in dict.fromkeys((which, *HELD_OUT))}
  name = f'sana-{model}-{what}-{which}'
  prompts = {'name': 'data.prompts', 'path': 'geneval', 'texts': (), 'count': 0}
  metric = dict(GRADED)
  if 'runlocal' in options:
    name += '-runlocal'
    prompts.update(path='', texts=LOCAL_PROMPTS)
    generator.update(**tiny, steps=min(generator['steps'], 3))
    metric['weights'] = 'random:tiny'
    for verifier in measures.values():
      verifier.update({key: 'random:tiny' for key in verifier if key.endswith('weights')})
  return ConfigDict({
    'name': name,
    'workdir': 'runs',
    'prompts': prompts,
    'generator': generator,
    'verifier': measures[which],
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
