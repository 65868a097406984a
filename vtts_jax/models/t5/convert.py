"""T5: from the transformers layout (`T5EncoderModel` or the whole `T5ForConditionalGeneration`)."""

from collections.abc import Mapping

from jax.sharding import PartitionSpec

from vtts_jax.checkpoints.convert import convert_weights
from vtts_jax.models import modules
from vtts_jax.models.t5 import modeling

ATTENTION = r'encoder\.block\.(\d+)\.layer\.0\.SelfAttention'
FEED = r'encoder\.block\.(\d+)\.layer\.1\.DenseReluDense'
RULES = [
  # tied weights: a file has one of the two names or both
  (r'shared\.weight', 'embed.embedding', ''),
  (r'encoder\.embed_tokens\.weight', 'embed.embedding', ''),
  (r'encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight',
   'position.embedding', ''),
  (ATTENTION + r'\.(q|k|v|o)\.weight', r'blocks.\1.attention.\2.kernel', 'T'),
  (r'encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight', r'blocks.\1.attention_norm.scale', ''),
  (FEED + r'\.(wi|wi_0|wi_1|wo)\.weight', r'blocks.\1.feed.\2.kernel', 'T'),
  (r'encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight', r'blocks.\1.feed_norm.scale', ''),
  (r'encoder\.final_layer_norm\.weight', 'norm.scale', ''),
  (r'(decoder\..*|lm_head\.weight)', None, ''),  # the other half of a whole T5
]  # fmt: skip
# Megatron's split of a block: heads and hidden channels lie on 'model'
SHARDING = [
  (r'blocks/\d+/(attention/[qkv]|feed/wi(_[01])?)/kernel', PartitionSpec(None, 'model')),
  (r'blocks/\d+/(attention/o|feed/wo)/kernel', PartitionSpec('model', None)),
]


def config_of(source, part: str = '', options: Mapping | None = None) -> modeling.Config:
  """Reads the config of the encoder in a checkpoint.

  Args:
    source: `checkpoints.Source`.
    part: not used, as the encoder has no parts.
    options: the checkpoint's `config.json` by default; they decide, and shapes tell the rest.

  Raises:
    ValueError: there is no T5 encoder.
    ConfigError: an option that the port does not know.
  """
  del part
  options = source.config if options is None else options
  names = source.tensor_names()
  lead = 'encoder.block.'
  attention = f'{lead}0.layer.0.SelfAttention.'
  # some checkpoints have no config.json beside them, so shapes must tell all sizes
  try:
    table = next(n for n in ('shared.weight', 'encoder.embed_tokens.weight') if n in source)
    vocab, width = source.shape_of(table)
    count, heads = source.shape_of(attention + 'relative_attention_bias.weight')
    feed = f'{lead}0.layer.1.DenseReluDense.'
    gated = f'{feed}wi_0.weight' in source
    hidden = source.shape_of(f'{feed}{"wi_0" if gated else "wi"}.weight')[0]
    inner = source.shape_of(attention + 'q.weight')[0]
  except (StopIteration, KeyError) as error:
    raise ValueError(f'{source.where} has no T5 encoder: no {error}') from error
  found = {
    'vocab_size': vocab,
    'd_model': width,
    'd_kv': inner // heads,
    'd_ff': hidden,
    'num_layers': 1 + max(int(n[len(lead):].split('.')[0]) for n in names if n.startswith(lead)),
    'num_heads': heads,
    'relative_attention_num_buckets': count,
    'feed_forward_proj': 'gated-gelu' if gated else 'relu',
  }  # fmt: skip
  # config.json has many options of training and decoding
  known = modeling.Config.__dataclass_fields__
  return modeling.Config(**(found | {k: v for k, v in options.items() if k in known}))


def load_weights(source, config: modeling.Config, *, dtype=None, sharding=None):
  """Loads the parameters of the encoder; errors as in `convert_weights`.

  `source.select_prefix(prefix)` cuts the encoder out of a larger model.
  """
  _, template = modules.abstract_module(lambda: modeling.build_model(config))
  return convert_weights(source, RULES, template, dtype, sharding)
