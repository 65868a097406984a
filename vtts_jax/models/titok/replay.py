"""Replays golden files of TiTok: every output of the reference, from our loader and model."""

import jax
import jax.numpy as jnp
import numpy as np

from vtts_jax.models import modules
from vtts_jax.models.titok import convert, modeling


def replay_outputs(config: dict, source, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns every output of a fixture; `testing.replay` passes the arguments.

  Arrays are NCHW in the file and NHWC here; codes have an empty axis of rows there.
  """
  sizes = convert.config_of(source)
  params = convert.load_weights(source, sizes)
  outside = lambda x: x.transpose(0, 3, 1, 2)
  flat = lambda x: x.swapaxes(1, 2)[:, :, None]

  @jax.jit
  def run(params):
    model = modules.bind_module(modeling.build_model, sizes, params)
    images = inputs['image'].transpose(0, 2, 3, 1)
    ids, entry = model.encode(images), inputs['token_ids'].astype(jnp.int32)
    latents = model.encoder(images)
    distances = -jax.lax.top_k(-model.code_distances(latents), 2)[0]
    codes = model.look_up(entry)
    out = {
      'enc_z': flat(latents), 'enc_quant': flat(model.look_up(ids)), 'enc_ids': ids,
      'enc_margin': distances[..., 1] - distances[..., 0], 'codes': flat(codes),
      'decoded': outside(model.decode_latents(codes)),
      'decoded_image': outside(model.decode(entry)),
    }  # fmt: skip
    if sizes.legacy:
      # what stands between the two decoders
      logits = model.decoder(codes)
      mixed = model.mix_codes(logits)
      out |= {'pixel_logits': outside(logits), 'pixel_latent': outside(mixed)}
    return out

  return {name: np.asarray(value) for name, value in run(params).items()}
