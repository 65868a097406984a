"""T5: from the transformers layout (`T5EncoderModel` or the whole `T5ForConditionalGeneration`)."""

import re
from collections.abc import Mapping

from vtts_jax.checkpoints import convert as conversion
from vtts_jax.models import modules
from vtts_jax.models.t5 import modeling

ATTENTION = r'encoder\.block\.(\d+)\.layer\.0\.SelfAttention'
FEED = r'encoder\.block\.(\d+)\.layer\.1\.DenseReluDense'
RULES = [
  # tied: a file has one of the two names or both
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


def rules(prefix: str = '', target: str = '') -> list[conversion.Rule]:
  """`RULES` for names under `prefix`, into the parameters under `target` (both end in a dot)."""
  lead = re.escape(prefix)
  return [(lead + p, t if t is None else target + t, op) for p, t, op in RULES]


def config_of(source, prefix: str = '', options: Mapping | None = None) -> modeling.Config:
  """The config of a checkpoint: `options` (its `config.json` by default) decide, the rest is read
  off the shapes of the tensors under `prefix`.

  Raises:
    ValueError: there is no T5 encoder under `prefix`.
    ConfigError: an option that the port does not know.
  """
  options = source.config if options is None else options
  names = source.names()
  lead = f'{prefix}encoder.block.'
  attention = f'{lead}0.layer.0.SelfAttention.'
  try:
    table = next(
      n for n in (f'{prefix}shared.weight', f'{prefix}encoder.embed_tokens.weight') if n in source
    )
    vocab, width = source.shape(table)
    count, heads = source.shape(attention + 'relative_attention_bias.weight')
    gated = f'{lead}0.layer.1.DenseReluDense.wi_0.weight' in source
    hidden = source.shape(f'{lead}0.layer.1.DenseReluDense.{"wi_0" if gated else "wi"}.weight')[0]
    inner = source.shape(attention + 'q.weight')[0]
  except (StopIteration, KeyError) as error:
    raise ValueError(f'{source.where} has no T5 encoder under {prefix!r}: no {error}') from error
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
  known = modeling.Config.__dataclass_fields__
  return modeling.Config(**(found | {k: v for k, v in options.items() if k in known}))


def load(source, dtype=None, sharding=None):
  """(graphdef, params) of the encoder in a `Source` of its own (`source.part(prefix)` cuts one
  out); errors as in `conversion.convert`."""
  config = config_of(source)
  graphdef, template = modules.abstract(lambda: modeling.build(config))
  return graphdef, conversion.convert(source, RULES, template, dtype, sharding)
