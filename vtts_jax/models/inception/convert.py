"""InceptionV3 for FID, from the names that pytorch-fid and torch-fidelity share.

These are `Mixed_5b.branch1x1.conv.weight`, `Mixed_5b.branch1x1.bn.running_mean`, `fc.weight` and so
on. README.md says how the released pickle becomes safetensors.
"""

import dataclasses

import numpy as np

from vtts_jax.checkpoints.convert import AXIS_ORDERS, convert_weights
from vtts_jax.models import modules
from vtts_jax.models.inception import modeling

EPS = 1e-3  # epsilon of the batch norms
# for a source that went through `fold_batch_norms`
RULES = [
  (r'(.+)\.conv\.(kernel|bias)', r'\1.\2', ''),
  (r'fc\.weight', 'fc.kernel', 'T'),
  (r'fc\.bias', 'fc.bias', ''),
]
# 22 million parameters: every device holds them all
SHARDING = []


def fold_batch_norms(source):
  """Returns a source in which a convolution and its batch norm are one kernel and one bias.

  They are named `.conv.kernel` (HWIO) and `.conv.bias`.

  Raises:
    ValueError: a part of a batch norm is missing.
  """
  parts = ('weight', 'bias', 'running_mean', 'running_var')
  header, missing = {}, []
  for name, (shape, kind) in source.header.items():
    if name.endswith('.conv.weight'):
      lead = name.removesuffix('.conv.weight')
      missing += [n for n in (f'{lead}.bn.{p}' for p in parts) if n not in source]
      header[f'{lead}.conv.kernel'] = tuple(shape[a] for a in AXIS_ORDERS['conv']), kind
      header[f'{lead}.conv.bias'] = shape[:1], kind
    elif '.bn.' not in name:
      header[name] = shape, kind
  if missing:
    raise ValueError(f'{source.where} has convolutions without {", ".join(missing)}')

  def read_folded(name):
    if '.conv.' not in name:
      return source.read_tensor(name)
    lead, kind = name.rsplit('.conv.', 1)
    # in float64, so that folding adds no rounding of its own
    norm = (source.read_tensor(f'{lead}.bn.{p}').astype(np.float64) for p in parts)
    scale, shift, mean, variance = norm
    scale = scale / np.sqrt(variance + EPS)
    if kind == 'bias':
      return (shift - mean * scale).astype(np.float32)
    kernel = source.read_tensor(f'{lead}.conv.weight').astype(np.float64)
    kernel = kernel * scale[:, None, None, None]
    return kernel.transpose(AXIS_ORDERS['conv']).astype(np.float32)

  return dataclasses.replace(source, header=header, read=read_folded)


def config_of(source, part: str = '', **options) -> modeling.Config:
  """Reads the config of a checkpoint; `options` are fields of `Config` that override it.

  Raises:
    ValueError: there is no InceptionV3 in the checkpoint, or it is torchvision's, whose features
      differ.
  """
  del part
  # torchvision's network was trained anew: a FID of its features is another number
  if any(n.startswith('AuxLogits.') for n in source.tensor_names()):
    raise ValueError(
      f'{source.where} is the InceptionV3 of torchvision; FID and IS need the weights of 2015-12-05'
    )
  stem = 'Conv2d_1a_3x3.conv.weight'
  if stem not in source or 'fc.weight' not in source:
    raise ValueError(f'{source.where} has no InceptionV3: no {stem} or no fc.weight')
  thinner = 32 // source.shape_of(stem)[0]
  return modeling.Config(
    **({'classes': source.shape_of('fc.weight')[0], 'thinner': thinner} | options)
  )


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  return convert_weights(fold_batch_norms(source), RULES, template, dtype, sharding)
