"""FLUX.1 on DrawBench: search over noise for texts, as in arXiv 2501.09732.

    vtts run --config=configs/flux_drawbench.py:random --config.prompts.path=drawbench.txt
                                   best of 96 noises (2,880 network calls) by three verifiers' ranks
    vtts run --config=configs/flux_drawbench.py:zero_order             the paper's other searches:
                                                                       zero_order and paths
    vtts run --config=configs/flux_drawbench.py:random,image_reward    by one: aesthetic, clip or
                                                                       image_reward
    vtts run --config=configs/flux_drawbench.py:random,schnell         4 steps instead of 30
    vtts run --config=configs/flux_drawbench.py:random,grader          and a chat model's grades
    vtts run --config=configs/flux_drawbench.py:random,runlocal        tiny random weights, no
                                                                       files, a minute on a CPU

Options follow the search in any order. DrawBench is not shipped: its 200 prompts are a file of
yours, one a line. The paper's settings: 30 steps, guidance 3.5, 1024 x 1024 pixels, one picture a
prompt. `grader` measures by VQAScore through an OpenAI-compatible endpoint, which --config.measure.
grader.url and .chat_model name; the paper's own grader gives marks for five aspects. Weights of
[dev] are gated (models/flux/README.md). Network and T5 are 34 GB in bfloat16: with --config.mesh.
model=4 they are on four chips of 16 GB.

What comes out: runs/flux-<model>-<search>-<verifier>-<hash>/ with report.html, curve.png, grid.png
and one line for each (arm, seed, prompt). Every verifier measures at every budget: one that rises
while the others fall is hacked. No run with released weights has been timed.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.generators.flux import RELEASES, TINY

VERIFIERS = {
  name: default_settings(f'verifiers.{name}') for name in ('aesthetic', 'clip', 'image_reward')
}
# the search and what runlocal makes of it; ranks are those within a round and the best before it
SEARCHES = {
  'random': (default_settings('search.best_of_n', n=96, round=8), {'n': 4, 'round': 2}),
  # the paper keeps its pivot
  'zero_order': (
    default_settings('search.zero_order', neighbours=2, rounds=48, patience=0), {'rounds': 2},
  ),
  'paths': (
    default_settings('search.paths', paths=2, expansions=19),  # 2,790 calls
    {'expansions': 2, 'start': 0.4, 'forward': 0.3, 'backward': 0.6},
  ),
}  # fmt: skip
LOCAL_PROMPTS = ('A red dog.', 'Four cars on the street.')


def get_config(arg: str = 'random') -> ConfigDict:
  """The config of a search with its options, as in 'random,clip,runlocal'.

  Raises:
    ValueError: an unknown search or option.
  """
  what, *options = (arg or 'random').split(',')
  names = ('ensemble', *VERIFIERS)
  chosen = [o for o in options if o in names]
  unknown = [o for o in options if o not in (*names, 'schnell', 'grader', 'runlocal')]
  if what not in SEARCHES or unknown or len(chosen) > 1:
    raise ValueError(
      f'configs/flux_drawbench.py:{arg}: must be one of {", ".join(SEARCHES)}, then at most one of '
      f'{", ".join(names)}, schnell, grader, runlocal'
    )
  which, model = (chosen or ['ensemble'])[0], 'schnell' if 'schnell' in options else 'dev'
  search, smaller = SEARCHES[what]
  measures = {name: dict(settings) for name, settings in VERIFIERS.items()}
  generator = default_settings('generators.flux', **RELEASES[model])
  if model == 'dev':
    generator.update(steps=30, guidance=3.5)
  name = f'flux-{model}-{what}-{which}'
  prompts = {'name': 'data.prompts', 'path': 'drawbench.txt', 'texts': (), 'count': 0}
  if 'runlocal' in options:
    name += '-runlocal'
    prompts.update(path='', texts=LOCAL_PROMPTS)
    # the tiny network reads a guidance, as [dev] does
    generator.update(**TINY, steps=3, guidance=-1.0)
    for verifier in measures.values():
      verifier.update({key: 'random:tiny' for key in verifier if key.endswith('weights')})
  verifier = measures.get(which) or default_settings('verifiers.ensemble', members=measures)
  grader = {'grader': default_settings('verifiers.vqa_endpoint')} if 'grader' in options else {}
  return ConfigDict({
    'name': name,
    'workdir': 'runs',
    'prompts': prompts,
    'generator': generator,
    'verifier': verifier,
    'measure': measures | grader,
    'metric': 'data.prompts',
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
