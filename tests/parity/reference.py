"""Tiny random torch models, and their weights as a `Source` for the production loader."""

import warnings

import numpy as np

with warnings.catch_warnings():
  warnings.simplefilter('ignore')  # theirs to fix
  import diffusers
  import torch
  import transformers

  LAZY = (diffusers.AutoencoderKL, transformers.T5EncoderModel)  # they load when they are named

from vtts_jax.checkpoints.source import source_of_arrays
from vtts_jax.models import modules


def randomise(model, seed, scale=0.2):
  """Every parameter a random normal on the bfloat16 grid, so that nothing is trivially zero or one;
  norms around one."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = scale * torch.randn(value.shape, generator=generator)
      is_norm = value.ndim == 1 and name.endswith('weight')
      value.copy_((noise + 1.0 * is_norm).to(torch.bfloat16).float())
  return model.eval()


def source(model, config=None):
  """The state dict as production code sees a file; tied names are all there."""
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  return source_of_arrays(state, config)


def bind_port(convert, modeling, source, **options):
  """Our module with the weights of a source, read as production code reads them."""
  config = convert.config_of(source, **options)
  return modules.bind_module(modeling.build_model, config, convert.load_weights(source, config))


def run(module, *values, **options):
  """Calls a torch module on numpy arrays; the first tensor that comes out."""
  with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    out = module(*(torch.from_numpy(np.array(v)) for v in values), **options)
  out = out[0] if isinstance(out, tuple) else out
  return out.numpy()


def nchw(x):
  return np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2))


def nhwc(x):
  return np.ascontiguousarray(np.asarray(x).transpose(0, 2, 3, 1))
