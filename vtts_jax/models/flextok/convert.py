"""Converts the reference checkpoint to parameters of `modeling.FlexTok`, and reads its options.

Layers are stacked first (`stack_layers`: `blocks.*`). The VAE has a converter of its own, and parts
that only training uses (alignment heads) are left out.
"""

from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.flextok import modeling
from vtts_jax.models.flextok.modeling import Config
from vtts_jax.models.stacked import stack_layers, transpose_kernel

_ENCODER, _DECODER = r'encoder\.module_dict\.', r'decoder\.module_dict\.'


def _grid_positions(table):  # [1, D, h, w] -> [h, w, D]
  return table[0].transpose(1, 2, 0)


def _line_positions(table):  # [1, 1, D, K] -> [K, D]
  return table[0, 0].T


def _block_rules(lead, target):
  blocks, ours = lead + r'blocks\.\*\.', f'{target}.blocks.'
  return [
    (blocks + r'(attn|mlp)\.(\w+)\.weight', ours + r'\1.\2.kernel', transpose_kernel),
    (blocks + r'adaLN_modulation\.1\.weight', f'{ours}adaln.kernel', transpose_kernel),
    (blocks + r'adaLN_modulation\.1\.bias', f'{ours}adaln.bias', ''),
  ]


def _linear_rules(name, target):
  return [(name + r'\.weight', f'{target}.kernel', 'T'), (name + r'\.bias', f'{target}.bias', '')]


RULES = [
  *_linear_rules(_ENCODER + r'enc_patch_emb\.patch_proj', 'encoder.patch'),
  (_ENCODER + r'enc_posemb_module\.posembs', 'encoder.places', _grid_positions),
  (_ENCODER + r'enc_register_module\.registers', 'encoder.registers', ''),
  *_block_rules(_ENCODER + r'enc_transformer\.', 'encoder'),
  *_linear_rules(_ENCODER + r'enc_to_latents\.proj', 'encoder.to_code'),
  *_linear_rules(_DECODER + r'dec_from_latents\.proj', 'decoder.from_code'),
  (_DECODER + r'dec_registers_posemb_module\.posembs', 'decoder.register_places', _line_positions),
  (_DECODER + r'dec_nested_dropout\.dropout_mask_token', 'decoder.dropped', ''),
  (_DECODER + r'dec_latent_dropout\.nullcond', 'decoder.unconditional', ''),
  *_linear_rules(_DECODER + r'dec_noise_patch_emb\.patch_proj', 'decoder.patch'),
  (_DECODER + r'dec_patches_posemb_module\.posembs', 'decoder.places', _grid_positions),
  *_linear_rules(_DECODER + r'dec_time_embedder\.mlp\.0', 'decoder.time_in'),
  *_linear_rules(_DECODER + r'dec_time_embedder\.mlp\.2', 'decoder.time_out'),
  *_block_rules(_DECODER + r'dec_transformer\.', 'decoder'),
  *_linear_rules(_DECODER + r'dec_to_patches\.adaLN_modulation\.1', 'decoder.last'),
  *_linear_rules(_DECODER + r'dec_to_patches\.proj', 'decoder.to_patch'),
  (r'vae\..*', None, ''),
  # heads that aligned the training with another encoder
  (r'.*repa.*', None, ''),
]
# the blocks are stacked [L, D, ...]; heads and hidden channels lie on 'model'
SHARDING = [
  (r'blocks/(attn/w[qkv]|mlp/fc[13])/kernel', PartitionSpec(None, None, 'model')),
  (r'blocks/(attn/proj|mlp/fc2)/kernel', PartitionSpec(None, 'model', None)),
]


def config_of(source, part: str = '', **options) -> Config:
  """Reads the config of a checkpoint, or of one half of it.

  Shapes tell the sizes; metadata tell the time scale and the levels.

  Args:
    source: `checkpoints.Source`, layers not stacked.
    part: '', 'encoder' or 'decoder'.
    options: fields of `Config` that override what is read.

  Raises:
    ValueError: this is no FlexTok checkpoint, or its levels do not fit its shapes.
  """
  stack = stack_layers(source)
  encoder, decoder = 'encoder.module_dict.', 'decoder.module_dict.'
  names = {
    'grid': f'{encoder}enc_posemb_module.posembs',
    'patch': f'{encoder}enc_patch_emb.patch_proj.weight',
    'encoder': f'{encoder}enc_transformer.blocks.*.attn.wq.weight',
    'decoder': f'{decoder}dec_transformer.blocks.*.attn.wq.weight',
    'adaln': f'{decoder}dec_transformer.blocks.*.adaLN_modulation.1.weight',
    'code': f'{encoder}enc_to_latents.proj.weight',
  }
  missing = [name for name in names.values() if name not in stack]
  if missing:
    raise ValueError(f'{source.where} is no FlexTok checkpoint: no {", ".join(missing)}')
  shape = {key: stack.shape_of(name) for key, name in names.items()}
  registers = f'{encoder}enc_register_module.registers'
  # the projection's width is P P C: C follows only if the patch is known
  patch = options.get('patch', Config.patch)
  grid = shape['grid'][-1]
  found = {
    'channels': shape['patch'][1] // patch**2,
    'size': grid * patch,
    'grid': grid,
    'registers': stack.shape_of(registers)[0] if registers in stack else 0,
    'levels': tuple(source.find_option('levels', 'fsq_levels', default=Config.levels)),
    'encoder_layers': shape['encoder'][0],
    'encoder_width': shape['encoder'][1],
    'decoder_layers': shape['decoder'][0],
    'decoder_width': shape['decoder'][1],
    'head': source.find_option('head_dim', default=Config.head),
    'max_timestep': float(source.find_option('max_timestep', default=Config.max_timestep)),
    # six modulations (shift, scale, gate of two branches) for each stream
    'streams': shape['adaln'][1] // (6 * shape['decoder'][1]),
  }
  config = Config(**(found | options), part=part)
  if len(config.levels) != shape['code'][0]:
    raise ValueError(
      f'{source.where}: levels={config.levels} are {len(config.levels)} numbers, its codes have '
      f'{shape["code"][0]}'
    )
  return config


def load_weights(source, config: Config, *, dtype=None, sharding=None):
  """Loads the parameters of the whole, or of the half `config.part`.

  Errors are those of `convert_weights`.
  """
  rules, lead = RULES, f'{config.part}.'
  # a half has its own names without the lead; the other half is knowingly left out
  if config.part:
    own = [(p, t[len(lead) :], op) for p, t, op in RULES if t and t.startswith(lead)]
    rules = [*own, (rf'(?!{config.part}\.).*', None, ''), *(r for r in RULES if r[1] is None)]
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  return convert_weights(stack_layers(source), rules, template, dtype, sharding)
