"""SigLIP, from transformers' `SiglipModel`: the layout of both versions with fixed resolutions."""

import numpy as np

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules, vit
from vtts_jax.models.clip.convert import BLOCK, read_exactly, trunk_of
from vtts_jax.models.preprocessing import read_preprocessing
from vtts_jax.models.siglip import modeling
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel

# shapes do not tell heads: how wide they are in so400m and giant; elsewhere 64
HEAD_WIDTHS = {1152: 72, 1536: 96}


def _tower_rules(name, target):
  lead = name + r'\.'
  return [
    (lead + r'embeddings\.position_embedding\.weight', target + 'position', ''),
    (lead + r'(?:post_layernorm|final_layer_norm)\.(weight|bias)', target + r'norm.\1', ''),
    (lead + r'embeddings\.position_ids', None, ''),  # a buffer of old files
    *vit.trunk_rules(lead + r'encoder\.layers\.\*\.', target + 'trunk.', BLOCK),
  ]


HEAD = r'vision_model\.head\.'
# for a source that went through `stack_layers` and `fuse_projections`
RULES = [
  *_tower_rules('vision_model', 'image.'),
  *_tower_rules('text_model', 'text.'),
  (r'vision_model\.embeddings\.patch_embedding\.weight', 'image.patch.kernel', vit.patch_kernel),
  (r'vision_model\.embeddings\.patch_embedding\.bias', 'image.patch.bias', ''),
  (HEAD + 'probe', 'image.pool.probe', np.ravel),
  (HEAD + r'attention\.in_proj_weight', 'image.pool.qkv.kernel', transpose_kernel),
  (HEAD + r'attention\.in_proj_bias', 'image.pool.qkv.bias', ''),
  (HEAD + r'attention\.out_proj\.weight', 'image.pool.out.kernel', transpose_kernel),
  (HEAD + r'attention\.out_proj\.bias', 'image.pool.out.bias', ''),
  (HEAD + r'layernorm\.(weight|bias)', r'image.pool.norm.\1', ''),
  (HEAD + r'mlp\.fc1\.weight', 'image.pool.ffn.up.kernel', transpose_kernel),
  (HEAD + r'mlp\.fc1\.bias', 'image.pool.ffn.up.bias', ''),
  (HEAD + r'mlp\.fc2\.weight', 'image.pool.ffn.down.kernel', transpose_kernel),
  (HEAD + r'mlp\.fc2\.bias', 'image.pool.ffn.down.bias', ''),
  (r'text_model\.embeddings\.token_embedding\.weight', 'text.token.embedding', ''),
  (r'text_model\.head\.weight', 'text.projection.kernel', transpose_kernel),
  (r'text_model\.head\.bias', 'text.projection.bias', ''),
  (r'logit_(scale|bias)', r'\1', ''),
]
SHARDING = vit.SHARDING


def config_of(source, part: str = '') -> modeling.Config:
  """Reads the config of a checkpoint.

  Sizes are read off the shapes. Heads, activation, epsilon and the picture's size are those of its
  `config.json`, which on the hub holds what differs from transformers' defaults. How pictures are
  resized and normalised is as the files beside the weights say, else as in the released models.

  Raises:
    ValueError: there is no SigLIP.
    ConfigError: an option or a preprocessing that the port does not know.
  """
  # the two towers are always loaded together
  del part
  try:
    width, _, _, patch = source.shape_of('vision_model.embeddings.patch_embedding.weight')
    tokens = source.shape_of('vision_model.embeddings.position_embedding.weight')[0]
    vocab, words = source.shape_of('text_model.embeddings.token_embedding.weight')
    length = source.shape_of('text_model.embeddings.position_embedding.weight')[0]
    sides = {
      side: trunk_of(
        source, f'{name}_model.encoder.layers', source.config.get(f'{name}_config') or {},
        'mlp.fc1', 'gelu_tanh', HEAD_WIDTHS.get(width, 64), modeling.EPS,
      )
      for side, name, width in (('image', 'vision', width), ('text', 'text', words))
    }  # fmt: skip
    # a CLIP passes all of the above, but has no probe
    source.shape_of('vision_model.head.probe')
  except KeyError as error:
    raise ValueError(f'{source.where} has no SigLIP: no {error}') from error
  side = round(tokens**0.5)
  size = (source.config.get('vision_config') or {}).get('image_size', side * patch)
  if side**2 != tokens or size // patch != side:
    raise ValueError(
      f'{source.where}: {tokens} positions do not fit pictures of {size} in patches of {patch}'
    )
  released = modeling.released_preprocessing(vocab)
  return modeling.Config(
    **sides, image_size=size, patch=patch, vocab=vocab, length=length,
    preprocessing=read_preprocessing(source, released, size, 'SiglipImageProcessor'),
  )  # fmt: skip


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`.

  `dtype` is that of all parameters but the temperature and the bias, which stay float32.
  """
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  source = fuse_projections(stack_layers(source, 'layers'))
  params = convert_weights(source, RULES, template, dtype, sharding)
  return params | read_exactly(source, template, sharding, ('scale', 'bias'))
