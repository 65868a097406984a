"""InceptionV3 for FID, from the names that pytorch-fid and torch-fidelity share
(`Mixed_5b.branch1x1.conv.weight`, `....bn.running_mean`, `fc.weight`); see README.md for how the
released pickle becomes safetensors."""

import dataclasses

import numpy as np

from vtts_jax.checkpoints import convert as conversion
from vtts_jax.models import modules
from vtts_jax.models.inception import modeling

EPS = 1e-3  # of the batch norms
RULES = [  # of a source made by `folded`
  (r'(.+)\.conv\.(kernel|bias)', r'\1.\2', ''),
  (r'fc\.weight', 'fc.kernel', 'T'),
  (r'fc\.bias', 'fc.bias', ''),
]
SHARDING = []


def folded(source):
  """The source in which a convolution and its batch norm are one `.conv.kernel` HWIO and bias.

  Raises:
    ValueError: a part of a batch norm is missing.
  """
  parts = ('weight', 'bias', 'running_mean', 'running_var')
  header, missing = {}, []
  for name, (shape, kind) in source.header.items():
    if name.endswith('.conv.weight'):
      lead = name.removesuffix('.conv.weight')
      missing += [n for n in (f'{lead}.bn.{p}' for p in parts) if n not in source]
      header[f'{lead}.conv.kernel'] = tuple(shape[a] for a in conversion.OPS['conv']), kind
      header[f'{lead}.conv.bias'] = shape[:1], kind
    elif '.bn.' not in name:
      header[name] = shape, kind
  if missing:
    raise ValueError(f'{source.where} has convolutions without {", ".join(missing)}')

  def read(name):
    if '.conv.' not in name:
      return source.get(name)
    lead, kind = name.rsplit('.conv.', 1)
    norm = (source.get(f'{lead}.bn.{p}').astype(np.float64) for p in parts)
    scale, shift, mean, variance = norm
    scale = scale / np.sqrt(variance + EPS)
    if kind == 'bias':
      return (shift - mean * scale).astype(np.float32)
    kernel = source.get(f'{lead}.conv.weight').astype(np.float64) * scale[:, None, None, None]
    return kernel.transpose(conversion.OPS['conv']).astype(np.float32)

  return dataclasses.replace(source, header=header, read=read)


def config_of(source, part: str = '', **options) -> modeling.Config:
  """The config of a checkpoint; `options` are fields of `Config`.

  Raises:
    ValueError: there is no InceptionV3 in it, or torchvision's, whose features are others.
  """
  del part
  if any(n.startswith('AuxLogits.') for n in source.names()):
    raise ValueError(
      f'{source.where} is the InceptionV3 of torchvision; FID and IS need the weights of 2015-12-05'
    )
  stem = 'Conv2d_1a_3x3.conv.weight'
  if stem not in source or 'fc.weight' not in source:
    raise ValueError(f'{source.where} has no InceptionV3: no {stem} or no fc.weight')
  thinner = 32 // source.shape(stem)[0]
  return modeling.Config(
    **({'classes': source.shape('fc.weight')[0], 'thinner': thinner} | options)
  )


def load(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters; errors as in `conversion.convert`."""
  _, template = modules.abstract_module(lambda: modeling.build(config))
  return conversion.convert(folded(source), RULES, template, dtype, sharding)
