"""MaskGIT's tokenizer: from the state dict of the PyTorch version, saved as safetensors.

README.md says how to save it.
"""

import dataclasses
import re

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.maskgit_vq import modeling

SHARDING = []


def network_rules(theirs: str, ours: str) -> list:
  """Returns the key rules of an encoder or a decoder.

  Args:
    theirs: regular expression of its name in the checkpoint.
    ours: its path in the model.
  """
  # names are the reference's own but for what flax calls kernel and scale
  block = theirs + r'\.((?:(?:down|up)\.\d+\.)?(?:block|mid)\.\d+)\.'
  return [
    (block + r'(norm[12])\.weight', rf'{ours}.\1.\2.scale', ''),
    (block + r'(norm[12])\.bias', rf'{ours}.\1.\2.bias', ''),
    (block + r'(conv[12]|nin_shortcut)\.weight', rf'{ours}.\1.\2.kernel', 'conv'),
    (theirs + r'\.norm_out\.weight', f'{ours}.norm_out.scale', ''),
    (theirs + r'\.((?:up\.\d+\.upsample_conv)|conv_in|conv_out)\.weight', rf'{ours}.\1.kernel',
     'conv'),
    (theirs + r'\.((?:up\.\d+\.upsample_conv)|conv_in|conv_out|norm_out)\.bias', rf'{ours}.\1.bias',
     ''),
  ]  # fmt: skip


def decoder_config(source, decoder='decoder', codebook='quantize') -> modeling.Config:
  """Reads the config of the decoder and the codebook off the shapes; a `KeyError` if there are
  none. The names are those of the two in the checkpoint."""
  names, shape = source.tensor_names(), source.shape_of
  codes, width = shape(f'{codebook}.embedding.weight')
  numbers = [re.match(rf'{decoder}\.up\.(\d+)\.block\.(\d+)\.conv2\.weight', n) for n in names]
  last, block = (max((int(m[i]) for m in numbers if m), default=0) for i in (1, 2))
  widths = [shape(f'{decoder}.up.{i}.block.0.conv2.weight')[0] for i in range(last + 1)]
  # no tensor of a decoder tells the base width; the product with the factors is what counts
  return modeling.Config(
    hidden_channels=widths[0], channel_mult=tuple(w // widths[0] for w in widths),
    num_res_blocks=block + 1, z_channels=width, num_embeddings=codes, encoder=False,
  )  # fmt: skip


def config_of(source, part: str = '') -> modeling.Config:
  """Reads the config of a checkpoint off its shapes.

  Raises:
    ValueError: this is no such tokenizer.
  """
  try:
    found, first = decoder_config(source), source.shape_of('encoder.conv_in.weight')[0]
    mult = tuple(width // first for width in found.widths)
    return dataclasses.replace(
      found, hidden_channels=first, channel_mult=mult, encoder=part != 'decoder'
    )
  except KeyError as error:
    raise ValueError(f'{source.where} is no MaskGIT tokenizer: no {error.args[0]}') from error


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  # tensors of a part that is left out are named, so that an unknown one is still an error
  encoder = network_rules('encoder', 'encoder') if config.encoder else [(r'encoder\..*', None, '')]
  rules = [*encoder, *network_rules('decoder', 'decoder'),
           (r'quantize\.embedding\.weight', 'codebook', '')]  # fmt: skip
  return convert_weights(source, rules, template, dtype, sharding)
