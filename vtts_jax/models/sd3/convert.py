"""SD3: from the diffusers folder and from Stability's single file, to `modeling.SD3`.

A source goes through three steps before the rules: `open_layout` gives Stability's names those of
diffusers, `fuse_projections` joins q, k and v, and `_name_runs` gathers the blocks in runs that are
built alike, which `stack_layers` stacks.
"""

import dataclasses
import re

import numpy as np
from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.checkpoints.source import Source, open_pipeline_part
from vtts_jax.errors import ConfigError
from vtts_jax.models import modules, vit
from vtts_jax.models.sd3 import modeling
from vtts_jax.models.stacked import fuse_projections, stack_layers, transpose_kernel

HEAD = 64  # channels of a head in every released model
SINGLE = 'model.diffusion_model.'  # where Stability's files, which hold a VAE too, keep the network
STABILITY = [  # names of Stability's file -> names of diffusers with q, k and v fused
  (r'pos_embed', 'pos_embed.pos_embed'),
  (r'x_embedder\.proj\.', 'pos_embed.proj.'),
  (r't_embedder\.mlp\.0\.', 'time_text_embed.timestep_embedder.linear_1.'),
  (r't_embedder\.mlp\.2\.', 'time_text_embed.timestep_embedder.linear_2.'),
  (r'y_embedder\.mlp\.0\.', 'time_text_embed.text_embedder.linear_1.'),
  (r'y_embedder\.mlp\.2\.', 'time_text_embed.text_embedder.linear_2.'),
  (r'final_layer\.linear\.', 'proj_out.'),
  (r'final_layer\.adaLN_modulation\.1\.', 'norm_out.linear.'),
  (r'joint_blocks\.(\d+)\.x_block\.adaLN_modulation\.1\.', r'transformer_blocks.\1.norm1.linear.'),
  (r'joint_blocks\.(\d+)\.x_block\.(attn2?)\.proj\.', r'transformer_blocks.\1.\2.to_out.0.'),
  (r'joint_blocks\.(\d+)\.x_block\.(attn2?)\.ln_([qk])\.', r'transformer_blocks.\1.\2.norm_\3.'),
  (r'joint_blocks\.(\d+)\.x_block\.(attn2?)\.qkv\.', r'transformer_blocks.\1.\2.qkv.'),
  (r'joint_blocks\.(\d+)\.x_block\.mlp\.fc1\.', r'transformer_blocks.\1.ff.net.0.proj.'),
  (r'joint_blocks\.(\d+)\.x_block\.mlp\.fc2\.', r'transformer_blocks.\1.ff.net.2.'),
  (r'joint_blocks\.(\d+)\.context_block\.adaLN_modulation\.1\.',
   r'transformer_blocks.\1.norm1_context.linear.'),
  (r'joint_blocks\.(\d+)\.context_block\.attn\.proj\.', r'transformer_blocks.\1.attn.to_add_out.'),
  (r'joint_blocks\.(\d+)\.context_block\.attn\.ln_([qk])\.',
   r'transformer_blocks.\1.attn.norm_added_\2.'),
  (r'joint_blocks\.(\d+)\.context_block\.attn\.qkv\.', r'transformer_blocks.\1.attn.add_qkv.'),
  (r'joint_blocks\.(\d+)\.context_block\.mlp\.fc1\.',
   r'transformer_blocks.\1.ff_context.net.0.proj.'),
  (r'joint_blocks\.(\d+)\.context_block\.mlp\.fc2\.', r'transformer_blocks.\1.ff_context.net.2.'),
]  # fmt: skip


def linear_rules(name, target):
  """Rules of one linear layer, stacked over layers or not."""
  return [
    (name + r'\.weight', f'{target}.kernel', transpose_kernel),
    (name + r'\.bias', f'{target}.bias', ''),
  ]


def _position_table(table):  # [1, M M, D] -> [M, M, D]
  side = round(table.shape[1] ** 0.5)
  return table.reshape(side, side, -1)


_BLOCK = r'(runs\.\d+|last)(?:\.blocks\.\*)?\.'
_OURS = r'\1.'
RULES = [  # after `_prepare`
  (r'pos_embed\.pos_embed', 'positions', _position_table),
  (r'pos_embed\.proj\.weight', 'patch.kernel', vit.patch_kernel),
  (r'pos_embed\.proj\.bias', 'patch.bias', ''),
  *linear_rules(r'time_text_embed\.timestep_embedder\.linear_1', 'time.enter'),
  *linear_rules(r'time_text_embed\.timestep_embedder\.linear_2', 'time.leave'),
  *linear_rules(r'time_text_embed\.text_embedder\.linear_1', 'pooled.enter'),
  *linear_rules(r'time_text_embed\.text_embedder\.linear_2', 'pooled.leave'),
  *linear_rules('context_embedder', 'words'),
  *linear_rules(r'norm_out\.linear', 'modulation'),
  *linear_rules('proj_out', 'to_patch'),
  *linear_rules(_BLOCK + r'norm1\.linear', _OURS + 'image.modulation'),
  *linear_rules(_BLOCK + r'norm1_context\.linear', _OURS + 'text.modulation'),
  *linear_rules(_BLOCK + r'(attn2?)\.qkv', _OURS + r'image.\2.qkv'),
  *linear_rules(_BLOCK + r'(attn2?)\.to_out\.0', _OURS + r'image.\2.out'),
  *linear_rules(_BLOCK + r'attn\.add_qkv', _OURS + 'text.attn.qkv'),
  *linear_rules(_BLOCK + r'attn\.to_add_out', _OURS + 'text.attn.out'),
  (_BLOCK + r'(attn2?)\.norm_([qk])\.weight', _OURS + r'image.\2.\3_norm.weight', ''),
  (_BLOCK + r'attn\.norm_added_([qk])\.weight', _OURS + r'text.attn.\2_norm.weight', ''),
  *linear_rules(_BLOCK + r'ff\.net\.0\.proj', _OURS + 'image.up'),
  *linear_rules(_BLOCK + r'ff\.net\.2', _OURS + 'image.down'),
  *linear_rules(_BLOCK + r'ff_context\.net\.0\.proj', _OURS + 'text.up'),
  *linear_rules(_BLOCK + r'ff_context\.net\.2', _OURS + 'text.down'),
]
SHARDING = [  # of the stacked blocks [L, D, ...]: heads and hidden channels over 'model'
  (r'runs/\d+/\w+/(attn2?/qkv|up)/kernel', PartitionSpec(None, None, 'model')),
  (r'runs/\d+/\w+/(attn2?/qkv|up)/bias', PartitionSpec(None, 'model')),
  (r'runs/\d+/\w+/(attn2?/out|down)/kernel', PartitionSpec(None, 'model', None)),
]


def open_weights(weights: str, part: str = '') -> Source:
  """Opens a file, a folder of weights, or the folder `transformer` of a pipeline; errors as in
  `open_source`."""
  del part  # it has no parts
  return open_pipeline_part(weights, 'transformer')


def config_of(source, part: str = '') -> modeling.Config:
  """The config of a checkpoint: shapes decide; its `config.json` gives the heads (where no norm
  shows them) and the side of its latents.

  Raises:
    ValueError: there is no SD3.
    ConfigError: an option that the port does not know.
  """
  del part  # there is one
  options, source = source.config, _open_layout(source)
  kind, norm = options.get('_class_name', 'SD3Transformer2DModel'), options.get('qk_norm')
  if kind != 'SD3Transformer2DModel':
    raise ConfigError(f'_class_name={kind!r}: allowed is SD3Transformer2DModel')
  if norm not in (None, 'rms_norm'):
    raise ConfigError(f"qk_norm={norm!r}: allowed are None and 'rms_norm'")
  block, names = 'transformer_blocks.', source.tensor_names()
  try:
    width, channels, side, _ = source.shape_of('pos_embed.proj.weight')
    most = round(source.shape_of('pos_embed.pos_embed')[1] ** 0.5)
    joint = source.shape_of('context_embedder.weight')[1]
    pooled = source.shape_of('time_text_embed.text_embedder.linear_1.weight')[1]
    out = source.shape_of('proj_out.weight')[0] // side**2
    source.shape_of(f'{block}0.norm1_context.linear.weight')
  except KeyError as error:
    raise ValueError(f'{source.where} has no SD3: no {error}') from error
  found = lambda inside: {int(m[1]) for n in names if (m := re.match(block + inside, n))}
  # without a norm per head, no shape shows how many heads there are
  normed = f'{block}0.attn.norm_q.weight'
  head = options.get('attention_head_dim') or HEAD
  if normed in names:
    head = source.shape_of(normed)[0]
  if width % head:
    raise ConfigError(f'attention_head_dim={head}: must divide the width {width}')
  return modeling.Config(
    sample_size=options.get('sample_size') or modeling.Config.sample_size,
    patch_size=side,
    in_channels=channels,
    out_channels=out,
    num_layers=1 + max(found(r'(\d+)\.')),
    num_attention_heads=width // head,
    attention_head_dim=head,
    joint_attention_dim=joint,
    pooled_projection_dim=pooled,
    pos_embed_max_size=most,
    dual_attention_layers=tuple(sorted(found(r'(\d+)\.attn2\.'))),
    qk_norm=normed in names,
  )


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Parameters; errors as in `convert_weights`."""
  _, template = modules.structure_of(modeling.build_model, config)
  # names first, then joins, then stacks: each step reads tensors of the one before it
  source = stack_layers(_name_runs(_fuse_streams(_open_layout(source)), config))
  return convert_weights(source, RULES, template, dtype, sharding)


def rename_tensors(source, rename) -> Source:
  """Returns a source whose tensors have the names `rename(name)`."""
  old = {rename(name): name for name in source.tensor_names()}
  header = {new: source.header[name] for new, name in old.items()}
  return dataclasses.replace(
    source, header=header, read=lambda name: source.read_tensor(old[name])
  )


def rename_by(table):
  """A function of a name: the first pattern of `table` that its start matches is replaced."""

  def rename(name):
    for pattern, target in table:
      found = re.match(pattern, name)
      if found:
        return found.expand(target) + name[found.end() :]
    return name

  return rename


def _open_layout(source):
  """Stability's single file under the names of diffusers; other sources as they are."""
  # a file of the network alone has no such prefix
  if any(name.startswith(SINGLE) for name in source.tensor_names()):
    source = source.select_prefix(SINGLE, source.config)
  if not any(name.startswith('joint_blocks.') for name in source.tensor_names()):
    return source
  source = rename_tensors(source, rename_by(STABILITY))
  # where only two modulations are stored, Stability's are (shift, scale), diffusers' (scale, shift)
  turned = {
    name
    for name, (shape, _) in source.header.items()
    if re.fullmatch(r'(norm_out|.*norm1_context)\.linear\.(weight|bias)', name)
    and shape[0] == 2 * source.shape_of('context_embedder.weight')[0]
  }

  def read_turned(name):
    value = source.read_tensor(name)
    return np.concatenate(np.split(value, 2)[::-1]) if name in turned else value

  return dataclasses.replace(source, read=read_turned)


def _fuse_streams(source):
  # Stability's files come fused, and then nothing is found to be joined
  source = fuse_projections(source, ('to_q', 'to_k', 'to_v'))
  return fuse_projections(source, ('add_q_proj', 'add_k_proj', 'add_v_proj'), 'add_qkv')


def _name_runs(source, config):
  """`transformer_blocks.i` -> `runs.r.blocks.j`, or `last`."""
  # neighbours that are built alike can be stacked, others cannot
  place = {layer: (r, j) for r, run in enumerate(config.runs) for j, layer in enumerate(run)}

  def rename(name):
    found = re.match(r'transformer_blocks\.(\d+)\.', name)
    if not found:
      return name
    layer, rest = int(found[1]), name[found.end() :]
    if layer not in place:
      # a layer that the config does not know keeps its name, and no rule takes it
      return f'last.{rest}' if layer == config.num_layers - 1 else name
    return 'runs.{}.blocks.{}.{}'.format(*place[layer], rest)

  return rename_tensors(source, rename)
