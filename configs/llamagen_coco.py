"""LlamaGen on captions of COCO: best-of-N and beams over rows of picture tokens.

    vtts run --config=configs/llamagen_coco.py:bon --config.prompts.path=captions.txt
                                                             best of 50 pictures of each caption
    vtts run --config=configs/llamagen_coco.py:beam          4 beams of 4 children, at every eighth
                                                             of the rows
    vtts run --config=configs/llamagen_coco.py:tokens        SoTo's beam, 5 of 10 children after 1,
                                                             2, 4 .. tokens
    vtts run --config=configs/llamagen_coco.py:bon,stage2    the 512-pixel model: stage1, stage2
    vtts run --config=configs/llamagen_coco.py:bon,geneval,verifiers.image_reward
    vtts run --config=configs/llamagen_coco.py:bon,runlocal  tiny random weights, no files, half a
                                                             minute on a CPU

Options follow the search in any order: the model, the prompts, a verifier and `runlocal`. Prompts
are `coco` (the default: the first 300 captions of a file), `geneval` or `file`. The verifier is a
component, CLIPScore with B/16 by default, or a module of yours.

Settings are those of the release (arXiv 2406.06525): guidance 7.5, top_k 1000, temperature 1. The
files are pickles, to be saved as safetensors first (models/llamagen/README.md). Tokens of a grid
have no order from coarse to fine, so a beam that looks at a prefix sees the upper rows and noise;
`beam` looks at pictures that are finished greedily instead (SoTo 2604.15453 and GridAR 2511.21185
compare the two ways).

What comes out: runs/llamagen-<search>-<model>-<prompts>-<hash>/ with report.html, curve.png,
grid.png and one line for each (arm, seed, prompt). GenEval's prompts are graded by its rules on
what OWL-ViT sees, which the report calls not official. Other prompts are not graded.

How long: no run with released weights has been timed.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.generators.llamagen import TINY

PROMPTS = {
  'coco': {'name': 'data.prompts', 'path': 'coco.txt', 'texts': (), 'count': 300},
  'geneval': {'name': 'data.prompts', 'path': 'geneval', 'texts': (), 'count': 0},
  'file': {'name': 'data.prompts', 'path': 'prompts.txt', 'texts': (), 'count': 0},
}
MODELS = {
  'stage1': {'prior_weights': 't2i_XL_stage1_256.safetensors'},
  'stage2': {'prior_weights': 't2i_XL_stage2_512.safetensors'},
}
ROWS = {'stage1': 2 * 16, 'stage2': 4 * 32}  # tokens of an eighth of the rows
LOCAL_PROMPTS = ('red dog', 'bench')  # the tiny model reads four words, with start and end
# accuracy is right or wrong; the partial credit that a search climbs is another number
GRADED = {'name': 'verifiers.geneval', 'output': 'strict'}
# the search and what runlocal makes of it
SEARCHES = {
  'bon': (default_settings('search.best_of_n', n=50), {'n': 4}),
  'beam': (
    default_settings(
      'search.beam', width=4, branch=4, schedule='linear', branch_at='first', lookahead=-1
    ),
    {'width': 2, 'branch': 2, 'size': 3},
  ),
  'tokens': (
    default_settings('search.beam', width=5, branch=10, roots=1, replace=False),
    {'width': 2, 'branch': 3},
  ),
}


def get_config(arg: str = 'bon') -> ConfigDict:
  """The config of a search with its options, as in 'beam,stage2,runlocal'.

  Raises:
    ValueError: an unknown search or option.
  """
  what, *options = (arg or 'bon').split(',')
  verifiers = [o for o in options if '.' in o]
  sets, models = ([o for o in options if o in names] for names in (PROMPTS, MODELS))
  unknown = [o for o in options if o not in (*verifiers, *PROMPTS, *MODELS, 'runlocal')]
  if what not in SEARCHES or unknown or max(map(len, (verifiers, sets, models))) > 1:
    raise ValueError(
      f'configs/llamagen_coco.py:{arg}: must be one of {", ".join(SEARCHES)}, then at most one of '
      f'{", ".join(MODELS)}, of {", ".join(PROMPTS)}, one verifier such as '
      'verifiers.image_reward, runlocal'
    )
  model, prompts = (models or ['stage1'])[0], (sets or ['coco'])[0]
  search, smaller = SEARCHES[what]
  verifier = default_settings((verifiers or ['verifiers.clip'])[0])
  config = {
    'name': f'llamagen-{what}-{model}-{prompts}',
    'workdir': 'runs',
    'prompts': dict(PROMPTS[prompts]),
    'generator': default_settings('generators.llamagen', top_k=1000, **MODELS[model]),
    'verifier': verifier,
    # the score that is searched on is measured at every budget too, so that its curve can be drawn
    'measure': {verifier['name'].split('.')[-1]: verifier},
    'metric': GRADED if prompts == 'geneval' else 'data.prompts',
    'search': dict(search),
    'arms': {},
    'seeds': (0,),
    # a prompt has up to 50 candidates with caches of their own; more at a time where memory allows
    'batch': 1,
    'render_chunk': 16,
    'mode': 'stepped',
    'mesh': {'model': 1},  # devices that share one copy of the weights
    'stop': placeholder(float),  # a score at which a prompt's search ends
    'budget': {'generator': 0.0, 'observe': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 6,
  }
  if what == 'beam':
    config['search']['size'] = ROWS[model]
  if 'runlocal' in options:
    config['name'] = f'llamagen-{what}-runlocal'
    config['prompts'] = {'name': 'data.prompts', 'path': '', 'texts': LOCAL_PROMPTS, 'count': 0}
    config['metric'] = 'data.prompts'
    config['generator'].update(**TINY | {'prior_weights': 'random:tiny_t2i'}, top_k=0)
    # whatever the verifier reads from files becomes random too
    verifier.update({key: 'random:tiny' for key in verifier if key.endswith('weights')})
    config['search'].update(smaller)
    config['batch'] = 2
  return ConfigDict(config)
