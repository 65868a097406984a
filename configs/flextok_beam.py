"""FlexTok AR, the published beam: 5 beams of 10 children, looked at after 1, 2, 4 .. 256 tokens.

    vtts run --config=configs/flextok_beam.py:geneval --config.generator.dtype=bfloat16
    vtts run --config=configs/flextok_beam.py:coco --config.prompts.path=captions.txt
    vtts run --config=configs/flextok_beam.py:file,verifiers.image_reward \\
      --config.prompts.path=mine.txt
    vtts run --config=configs/flextok_beam.py:runlocal     tiny random weights, no files

Arguments, in any order: the prompts (geneval, coco: the first 300 captions of a file, or file), the
verifier as a component (CLIPScore with B/16 if none is given; or a module of yours), runlocal.
Beside it: flextok_bon, flextok_lookahead, flextok_uncond and flextok_uniform take the same.

What comes out: runs/flextok-<search>-<prompts>-<hash>/, as of configs/scenes.py. GenEval's prompts
are graded by its rules on what OWL-ViT sees, which the report calls not official; captions and
prompts of yours are not graded.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import defaults

PROMPTS = {
  'geneval': {'name': 'data.prompts', 'path': 'geneval', 'texts': (), 'count': 0},
  'coco': {'name': 'data.prompts', 'path': 'coco.txt', 'texts': (), 'count': 300},
  'file': {'name': 'data.prompts', 'path': 'prompts.txt', 'texts': (), 'count': 0},
}
GRADED = {'name': 'verifiers.geneval', 'mode': 'strict'}
LOCAL = ('a photo of a bench', 'a photo of two red dogs')


def base(what: str, arg: str, search: dict, local: dict, **generator) -> ConfigDict:
  """A config from its arguments; `local` are settings of the search that `runlocal` changes."""
  options = [option for option in (arg or '').split(',') if option]
  verifiers = [o for o in options if '.' in o]
  sets = [o for o in options if o in PROMPTS]
  unknown = [o for o in options if o not in (*verifiers, *sets, 'runlocal')]
  if unknown or len(verifiers) > 1 or len(sets) > 1:
    raise ValueError(
      f'configs/flextok_{what}.py:{arg}: must be one of {", ".join(PROMPTS)}, one verifier such as '
      'verifiers.likelihood, runlocal'
    )
  verifier = defaults(verifiers[0] if verifiers else 'verifiers.clip')
  prompts = sets[0] if sets else 'geneval'
  config = {
    'name': f'flextok-{what}-{prompts}',
    'workdir': 'runs',
    'prompts': PROMPTS[prompts],
    'generator': defaults('generators.flextok', **generator),
    'verifier': verifier,
    'measure': {verifier['name'].split('.')[-1]: verifier},
    'metric': GRADED if prompts == 'geneval' else 'data.prompts',
    'search': search,
    'arms': {},
    'seeds': (0,),
    'batch': 1,
    'render_chunk': 50,
    'mode': 'stepped',
    'stop': placeholder(float),  # a score at which a prompt's search ends
    'budget': {'generator': 0.0, 'render': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 6,
  }
  if 'runlocal' in options:
    config['name'] = f'flextok-{what}-runlocal'
    config['prompts'] = {'name': 'data.prompts', 'path': '', 'texts': LOCAL, 'count': 0}
    config['metric'] = 'data.prompts'
    config['generator'].update(random='tiny', words=8, decode_steps=2)
    if 'random' in verifier:
      verifier['random'] = 'tiny'
    config['search'].update(local)
    config['batch'] = 2
  return ConfigDict(config)


def beam(**settings) -> dict:
  """The published loop: one root, distinct last tokens."""
  return defaults('search.beam', width=5, branch=10, roots=1, replace=False, **settings)


def get_config(arg: str = '') -> ConfigDict:
  return base('beam', arg, beam(), {'width': 2, 'branch': 3})
