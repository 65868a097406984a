"""Writes tests/golden/clip_flant5.npz: CLIP-FlanT5, tiny and random, from transformers' classes.

    python tests/parity/make_golden_vqa.py     # in an environment with the parity extra

`Published` puts them together as linzhiqiu/t2v_metrics does (before 3.1, which dropped the model);
tests/parity/test_parity_clip_flant5.py compares with it live.
"""


import make_golden
import numpy as np
from reference import nchw, torch, transformers

transformers.T5ForConditionalGeneration, transformers.CLIPVisionModel  # noqa: B018, they load
VISION = {
  'hidden_size': 8, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 10,
  'image_size': 12, 'patch_size': 4, 'hidden_act': 'quick_gelu',
}  # fmt: skip
TEXT = {
  'vocab_size': 20, 'd_model': 6, 'd_kv': 4, 'd_ff': 10, 'num_layers': 1, 'num_decoder_layers': 2,
  'num_heads': 2, 'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 16,
  'feed_forward_proj': 'gated-gelu', 'layer_norm_epsilon': 1e-6,
}  # fmt: skip


class Tower(torch.nn.Module):
  def __init__(self, config):
    super().__init__()
    self.vision_tower = transformers.CLIPVisionModel(config)


class Published(transformers.T5ForConditionalGeneration):
  """The names of the released file but for `vision_model`, which transformers 5 has dropped."""

  def __init__(self, text=TEXT, vision=VISION):
    super().__init__(transformers.T5Config(**text, dropout_rate=0.0, tie_word_embeddings=False))
    self.config.decoder_start_token_id = 0  # in FLAN's config.json
    shape = self.lm_head.weight.shape
    self.lm_head.weight = torch.nn.Parameter(torch.zeros(shape))  # transformers 5 ties a new one
    self.embed_tokens = self.encoder.embed_tokens
    self.vision_tower = Tower(transformers.CLIPVisionConfig(**vision))
    width, inner = self.config.d_model, vision['hidden_size']
    linear = torch.nn.Linear
    self.mm_projector = torch.nn.Sequential(
      linear(inner, width), torch.nn.GELU(), linear(width, width)
    )

  def state_dict(self, *args, **options):
    lead = 'vision_tower.vision_tower.'
    found = super().state_dict(*args, **options)
    return {k.replace(lead, lead + 'vision_model.'): v for k, v in found.items()}

  def stages(self, pixels, before, after, mask, answer, words=None):
    """What the replay returns; `words`: as many logits as the table has after it is resized."""
    hidden = self.vision_tower.vision_tower(pixels, output_hidden_states=True).hidden_states
    patches = hidden[-2][:, 1:]
    shown = self.mm_projector(patches)
    x = torch.cat([self.embed_tokens(before), shown, self.embed_tokens(after)], 1)
    real = torch.ones(len(x), x.shape[1] - mask.shape[1], dtype=mask.dtype)
    out = self(
      inputs_embeds=x, attention_mask=torch.cat([real, mask], 1), labels=answer,
      decoder_attention_mask=torch.ones_like(answer), output_hidden_states=True,
    )  # fmt: skip
    logits = out.logits[..., :words]
    loss = torch.nn.functional.cross_entropy
    return {
      'patches': patches,
      'shown': shown,
      'states': out.encoder_last_hidden_state,
      'logits': out.logits,
      'log_probs': torch.stack([-loss(k, a, reduction='none') for k, a in zip(logits, answer)]),
      'likelihood': torch.stack([(-loss(k, a)).exp() for k, a in zip(logits, answer)]),
    }


def given(seed, vocab=TEXT['vocab_size'], side=VISION['image_size']):
  """Inputs of the replay."""
  rng = np.random.default_rng(seed)
  pixels = rng.normal(size=(2, side, side, 3)).astype(np.float16).astype(np.float32)
  ids = {k: rng.integers(1, vocab, (2, n)) for k, n in (('before', 4), ('after', 7), ('answer', 2))}
  mask = (np.arange(7) < np.array([[7], [4]])).astype(np.int64)
  return {'pixels': pixels, **ids, 'mask': mask}


def torches(inputs):
  turned = inputs | {'pixels': nchw(inputs['pixels'])}
  return {k: torch.from_numpy(v) for k, v in turned.items()}


def clip_flant5():
  model, inputs = Published(), given(5)
  config = {'model': 'clip_flant5', 'vision_config': VISION, **TEXT}
  return config, model, inputs, lambda model: model.stages(**torches(inputs))


if __name__ == '__main__':
  torch.manual_seed(0)
  make_golden.add({'clip_flant5.npz': make_golden.write('clip_flant5.npz', *clip_flant5())})
