"""FlexTok AR: the published searches with released weights.

    vtts run --config=configs/flextok.py:beam            5 beams of 10, after 1, 2, 4 .. 256 tokens
    vtts run --config=configs/flextok.py:bon             best of 50, the baseline of the beam
    vtts run --config=configs/flextok.py:lookahead       the beam, scored 8 greedy tokens ahead
    vtts run --config=configs/flextok.py:uncond          the beam; the verifier alone reads prompts
    vtts run --config=configs/flextok.py:uniform         no prior: 5 beams of 640 uniform tokens
                                                         (1 % of the codes), 32 tokens
    vtts run --config=configs/flextok.py:beam,runlocal   any of them on tiny random weights, no
                                                         files, half a minute on two cores
    vtts run --config=configs/flextok.py:beam --config.generator.dtype=bfloat16
    vtts run --config=configs/flextok.py:beam,coco --config.prompts.path=captions.txt
    vtts run --config=configs/flextok.py:beam,file,verifiers.image_reward \\
      --config.prompts.path=mine.txt

Options follow the search in any order: the prompts, a verifier and `runlocal`. Prompts are
`geneval` (the default), `coco` (the first 300 captions of a file) or `file`. The verifier is a
component, CLIPScore with B/16 by default, or a module of yours.

Time: not measured at full size, since no released weights could be read where this was written.
`python benchmarks/flextok.py` says where the time of a beam goes.

What comes out: runs/flextok-<search>-<prompts>-<hash>/ with report.html, curve.png, grid.png and
one line for each (arm, seed, prompt). GenEval's prompts are graded by its rules on what OWL-ViT
sees, which the report calls not official. Captions and prompts of yours are not graded.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.generators.flextok import TINY

PROMPTS = {
  'geneval': {'name': 'data.prompts', 'path': 'geneval', 'texts': (), 'count': 0},
  'coco': {'name': 'data.prompts', 'path': 'coco.txt', 'texts': (), 'count': 300},
  'file': {'name': 'data.prompts', 'path': 'prompts.txt', 'texts': (), 'count': 0},
}
LOCAL_PROMPTS = ('a photo of a bench', 'a photo of two red dogs')
# accuracy is right or wrong; the partial credit that a search climbs is another number
GRADED = {'name': 'verifiers.geneval', 'output': 'strict'}


def beam_settings(**settings) -> dict:
  """The published beam: one root, children that differ in their last token."""
  fixed = {'width': 5, 'branch': 10, 'roots': 1, 'replace': False}
  return default_settings('search.beam', **fixed | settings)


# the search, settings of the generator, and what runlocal makes of the search
SEARCHES = {
  'beam': (beam_settings(), {}, {'width': 2, 'branch': 3}),
  # as many pictures as a step of the beam looks at
  'bon': (default_settings('search.best_of_n', n=50), {}, {'n': 4}),
  'lookahead': (beam_settings(lookahead=8), {}, {'width': 2, 'branch': 3, 'lookahead': 2}),
  'uncond': (beam_settings(), {'condition': 'none'}, {'width': 2, 'branch': 3}),
  'uniform': (
    beam_settings(branch=640, schedule='fixed', steps=32, complete=False),
    {'prior': 'uniform'},
    {'width': 2, 'branch': 6, 'steps': 3},
  ),
}


def get_config(arg: str = 'beam') -> ConfigDict:
  """The config of a search with its options, as in 'beam,coco,runlocal'.

  Raises:
    ValueError: an unknown search or option.
  """
  what, *options = (arg or 'beam').split(',')
  if what not in SEARCHES:
    raise ValueError(f'configs/flextok.py:{what}: must be {", ".join(SEARCHES)}')
  verifiers = [o for o in options if '.' in o]
  sets = [o for o in options if o in PROMPTS]
  unknown = [o for o in options if o not in (*verifiers, *sets, 'runlocal')]
  if unknown or len(verifiers) > 1 or len(sets) > 1:
    raise ValueError(
      f'configs/flextok.py:{arg}: options must be one of {", ".join(PROMPTS)}, one verifier such '
      'as verifiers.likelihood, runlocal'
    )
  search, generator, local = SEARCHES[what]
  verifier = default_settings(verifiers[0] if verifiers else 'verifiers.clip')
  prompts = sets[0] if sets else 'geneval'
  config = {
    'name': f'flextok-{what}-{prompts}',
    'workdir': 'runs',
    'prompts': PROMPTS[prompts],
    'generator': default_settings('generators.flextok', **generator),
    'verifier': verifier,
    # the score that is searched on is measured at every budget too, so that its curve can be drawn
    'measure': {verifier['name'].split('.')[-1]: verifier},
    'metric': GRADED if prompts == 'geneval' else 'data.prompts',
    'search': dict(search),
    'arms': {},
    'seeds': (0,),
    # a prompt has up to 50 candidates with caches of their own; more at a time where memory allows
    'batch': 1,
    'render_chunk': 50,
    'mode': 'stepped',
    'mesh': {'model': 1},  # devices that share one copy of the weights
    'stop': placeholder(float),  # a score at which a prompt's search ends
    'budget': {'generator': 0.0, 'observe': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 6,
  }
  if 'runlocal' in options:
    config['name'] = f'flextok-{what}-runlocal'
    config['prompts'] = {'name': 'data.prompts', 'path': '', 'texts': LOCAL_PROMPTS, 'count': 0}
    config['metric'] = 'data.prompts'
    config['generator'].update(**TINY, words=8, decode_steps=2)
    # whatever the verifier reads from files becomes random too
    verifier.update({key: 'random:tiny' for key in verifier if key.endswith('weights')})
    config['search'].update(local)
    config['batch'] = 2
  return ConfigDict(config)
