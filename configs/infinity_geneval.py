"""Infinity-2B on GenEval: search over the scales of a picture.

    vtts run --config=configs/infinity_geneval.py:bon             best of 8
    vtts run --config=configs/infinity_geneval.py:beam            3 beams of 5 at every scale,
                                                                  judged by completed pictures
    vtts run --config=configs/infinity_geneval.py:tts_var         a population that shrinks, is
                                                                  resampled at scales 6 and 9
    vtts run --config=configs/infinity_geneval.py:beam,runlocal   tiny random weights, no files,
                                                                  half a minute on two cores
    vtts run --config=configs/infinity_geneval.py:bon,verifiers.pickscore

`beam` is that of "Visual Autoregressive Models Beat Diffusion Models on Inference Time Scaling"
(2510.16751) with ImageReward: 195 pictures a prompt. Their 1365 evaluations are 1209 here, since
the children of a beam share the call at their parent. They complete a picture by sampling; here it
is completed greedily. `tts_var` is TTS-VAR (2507.18537) without its choice of diverse candidates at
scales 2 and 5, as ImageReward gives no features (in the paper: GenEval .728 of .744 at N = 4); a
verifier with features has it by --config.search.diverse='(1,4)'. Sampling is that of the public
evaluation: guidance 4, temperature 1, top-p 0.97.

The weights are saved as safetensors first (models/infinity/README.md) and lie in this folder, or
where --config.generator.weights=PATH and --config.generator.tokenizer_weights=PATH say. A candidate
of 1024 x 1024 pixels has 3.4 GB of keys and values, so a prompt runs alone; smaller pictures are
--config.generator.area=0.25M.

Time: not measured at full size, since no released weights could be read where this was written.
What comes out is graded by GenEval's rules on what OWL-ViT sees, which the report calls not
official.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vtts_jax.components import default_settings
from vtts_jax.generators.infinity import TINY
from vtts_jax.search.smc import PRESETS

LOCAL_PROMPTS = ('a photo of a bench', 'a photo of two red dogs')
# accuracy is right or wrong; the partial credit that a search climbs is another number
GRADED = {'name': 'verifiers.geneval', 'output': 'strict'}
EVERY_SCALE = {'schedule': 'linear', 'size': 1}
# the search and what runlocal makes of it, for 3 scales
SEARCHES = {
  'bon': (default_settings('search.best_of_n', n=8), {'n': 4}),
  'beam': (
    default_settings('search.beam', width=3, branch=5, lookahead=-1, **EVERY_SCALE),
    {'width': 2, 'branch': 2},
  ),
  'tts_var': (
    default_settings('search.smc', **PRESETS['tts_var'] | {'diverse': ()} | EVERY_SCALE),
    {'particles': (3, 2, 1), 'resample_at': (1,)},
  ),
}


def get_config(arg: str = 'bon') -> ConfigDict:
  """The config of a search with its options, as in 'beam,runlocal'.

  Raises:
    ValueError: an unknown search or option.
  """
  what, *options = (arg or 'bon').split(',')
  verifiers = [o for o in options if '.' in o]
  unknown = [o for o in options if o not in (*verifiers, 'runlocal')]
  if what not in SEARCHES or unknown or len(verifiers) > 1:
    raise ValueError(
      f'configs/infinity_geneval.py:{arg}: must be one of {", ".join(SEARCHES)}, then at most one '
      'verifier such as verifiers.clip, runlocal'
    )
  search, smaller = SEARCHES[what]
  verifier = default_settings(verifiers[0] if verifiers else 'verifiers.image_reward')
  config = {
    'name': f'infinity-{what}',
    'workdir': 'runs',
    'prompts': {'name': 'data.prompts', 'path': 'geneval', 'texts': (), 'count': 0},
    'generator': default_settings('generators.infinity', dtype='bfloat16'),
    'verifier': verifier,
    # the score that is searched on is measured at every budget too, so that its curve can be drawn
    'measure': {verifier['name'].split('.')[-1]: verifier},
    'metric': GRADED,
    'search': dict(search),
    'arms': {},
    'seeds': (0,),
    'batch': 1,
    'render_chunk': 2,
    'mode': 'stepped',
    'mesh': {'model': 1},  # devices that share one copy of the weights
    'stop': placeholder(float),  # a score at which a prompt's search ends
    'budget': {'generator': 0.0, 'observe': 0.0, 'verify': 0.0, 'flops': 0.0},
    'traces': 6,
  }
  if 'runlocal' in options:
    config['name'] = f'infinity-{what}-runlocal'
    config['prompts'] = {'name': 'data.prompts', 'path': '', 'texts': LOCAL_PROMPTS, 'count': 0}
    config['metric'] = 'data.prompts'
    config['generator'].update(**TINY, words=8, area='0.06M', scales=3, dtype='float32')
    # whatever the verifier reads from files becomes random too
    verifier.update({key: 'random:tiny' for key in verifier if key.endswith('weights')})
    config['search'].update(smaller)
    config['batch'] = 2
  return ConfigDict(config)
