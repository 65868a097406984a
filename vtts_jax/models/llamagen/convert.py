"""LlamaGen: from the state dict of the reference, saved as safetensors, and its options.

The released files are pickles, which are never opened here; README.md says how to save them anew.
"""

from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.llamagen import modeling
from vtts_jax.models.llamagen.modeling import Config
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel

BLOCK = r'layers\.\*\.'
HEADS = {width: heads for _, heads, width in modeling.TRUNKS.values()}
# Megatron's split of the stacked blocks: heads and hidden channels lie on 'model'
SHARDING = [
  (r'blocks/(attn/qkv|ffn/up)/kernel', PartitionSpec(None, None, None, 'model')),
  (r'blocks/(attn/out|ffn/down)/kernel', PartitionSpec(None, 'model', None)),
]


def split_kernel(parts, heads=0):
  """`[L, parts * out, in]` -> `[L, in, parts, out]`; see `_gather_pairs` for `heads`."""

  def split(weight):
    L, rows, inner = weight.shape
    kernel = transpose_kernel(weight).reshape(L, inner, parts, rows // parts)
    return _gather_pairs(kernel, heads) if heads else kernel

  return split


def _gather_pairs(kernel, heads):
  """Puts the channels of q and k that the reference rotates as pairs (0, 1), (2, 3) .. at i and
  i + d / 2 of their head. Scores do not change, and halves are cheaper to take than pairs."""
  L, inner, _, width = kernel.shape
  rotated = kernel[:, :, :2].reshape(L, inner, 2, heads, width // heads // 2, 2)
  kernel = kernel.copy()
  kernel[:, :, :2] = rotated.swapaxes(-1, -2).reshape(L, inner, 2, width)
  return kernel


def make_rules(config: Config):
  """Returns the key rules, which depend on the number of heads."""
  return [  # after `_join_tensors`
    (r'tok_embeddings\.weight', 'embedding', ''),
    (r'cls_embedding\.embedding_table\.weight', 'classes', ''),
    (r'cls_embedding\.cap_proj\.(fc[12])\.weight', r'text_mlp.\1.kernel', 'T'),
    (r'cls_embedding\.uncond_embedding', 'null_text', ''),
    (BLOCK + r'attention\.wqkv\.weight', 'blocks.attn.qkv.kernel', split_kernel(3, config.heads)),
    (BLOCK + r'attention\.wo\.weight', 'blocks.attn.out.kernel', transpose_kernel),
    (BLOCK + r'feed_forward\.up\.weight', 'blocks.ffn.up.kernel', split_kernel(2)),
    (BLOCK + r'feed_forward\.w2\.weight', 'blocks.ffn.down.kernel', transpose_kernel),
    (BLOCK + r'attention_norm\.weight', 'blocks.norm_attn.weight', ''),
    (BLOCK + r'ffn_norm\.weight', 'blocks.norm_ffn.weight', ''),
    (r'norm\.weight', 'norm.weight', ''),
    (r'output\.weight', 'head.kernel', 'T'),
    # tables that old files kept
    (r'freqs_cis|causal_mask', None, ''),
  ]


def config_of(source, part: str = '', options=None) -> Config:
  """Reads the config of a checkpoint.

  Shapes decide. What they do not tell is in `options` (the checkpoint's config by default), under
  the reference's names: `block_size`, the tokens of a picture, and for a width that no released
  model has `n_head`; `rope_base` and `norm_eps` have defaults.

  Raises:
    ValueError: this is no LlamaGen, or `block_size` or `n_head` is not given.
  """
  del part
  options = dict(source.config if options is None else options)
  source = stack_layers(source, 'layers')
  block = 'layers.*.'
  names = 'tok_embeddings.weight', f'{block}attention.wqkv.weight', f'{block}feed_forward.w1.weight'
  missing = [name for name in names if name not in source]
  if missing:
    raise ValueError(f'{source.where} is no LlamaGen: no {", ".join(missing)}')
  (codes, width), (layers, *_), (_, hidden, _) = map(source.shape_of, names)
  table, null = 'cls_embedding.embedding_table.weight', 'cls_embedding.uncond_embedding'
  heads, tokens = options.get('n_head', HEADS.get(width)), options.get('block_size')
  for name, value in (('n_head', heads), ('block_size', tokens)):
    if value is None:
      raise ValueError(f'{source.where}: no tensor tells {name}: a config.json beside it must')
  # the last row is the null class
  found = {'classes': source.shape_of(table)[0] - 1 if table in source else 0}
  if null in source:
    found['words'], found['text_width'] = source.shape_of(null)
  for name, ours in (('rope_base', 'rope_base'), ('norm_eps', 'eps')):
    if name in options:
      found[ours] = float(options[name])
  return Config(
    width=width, layers=layers, heads=heads, hidden=hidden, tokens=tokens, codes=codes, **found
  )


def load_weights(source, config: Config, *, dtype=None, sharding=None):
  """Loads the parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  source = fuse_projections(stack_layers(source, 'layers'), ('w1', 'w3'), 'up')
  return convert_weights(source, make_rules(config), template, dtype, sharding)
