"""A compiled verifier for outputs that exist already: pictures of a folder, a server or a study.

A prompt is tokenized and encoded once, whatever the number of its outputs. Outputs of one shape go
through one compiled program; on a mesh each device scores its share of them.

Letters: R outputs with a prompt each, B prompts encoded at a time, D features.
"""

import functools
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from vtts_jax.core import Prompt, Verifier
from vtts_jax.engine.search import load_parameters
from vtts_jax.errors import ConfigError
from vtts_jax.media import preprocess

ENCODED = 64  # prompts encoded at a time, at most
KEPT = 4096  # encoded prompts that are remembered


class Scorer:
  """A verifier with its weights, which are loaded at the first score; threads take turns.

  Args:
    verifier: what scores. One that runs on the host is called as it stands.
    mesh: outputs are split over its 'data' axis; weights are placed as the verifier says.
  """

  def __init__(self, verifier: Verifier, mesh: Mesh | None = None):
    self.verifier, self.mesh = verifier, mesh if verifier.jittable else None
    self._turn = threading.Lock()
    self._tokens: dict[str, Any] = {}  # of prompts that wait to be encoded
    self._contexts: dict[str, Any] = {}

  @functools.cached_property
  def params(self):
    return load_parameters(self.verifier, self.mesh)

  @functools.cached_property
  def _encode(self):
    return jax.jit(self.verifier.encode)

  @functools.cached_property
  def _score(self):
    def score_outputs(params, vctx, observed):
      shown = {name: picture_floats(x)[:, None] for name, x in observed.items()}
      return {name: x[:, 0] for name, x in self.verifier.score(params, vctx, shown).items()}

    return self._compile(score_outputs, 2) if self.verifier.jittable else score_outputs

  @functools.cached_property
  def _embed(self):
    def embed(params, images):
      return self.verifier.embed_images(params, picture_floats(images)[:, None])[:, 0]

    return self._compile(embed, 1)

  def _compile(self, function, split: int):
    """`function(params, ...)` compiled; on a mesh its `split` other arguments are split over it."""
    if self.mesh is not None:
      data = PartitionSpec('data')
      function = jax.shard_map(
        function,
        mesh=self.mesh,
        in_specs=(PartitionSpec(), *[data] * split),
        out_specs=data,
        axis_names={'data'},
        check_vma=False,
      )
    return jax.jit(function)

  # ------------------------------------------------------------------------------------- prompts

  def tokenize_prompts(self, prompts: Sequence[Prompt]) -> None:
    """Reads prompts that were not seen yet, on the host; loads no weights.

    Raises:
      ConfigError: a prompt that the verifier cannot read.
    """
    if not self.verifier.jittable:  # its arrays may be as long as the longest prompt of a call
      self._tokenize(list(prompts))
      return
    new = {}
    for prompt in prompts:
      key = content_key(prompt)
      if key not in self._tokens and key not in self._contexts:
        new.setdefault(key, prompt)
    arrays = self._tokenize(list(new.values())) if new else {}
    for i, key in enumerate(new):
      self._tokens[key] = jax.tree.map(lambda x, i=i: np.asarray(x)[i], arrays)

  def _tokenize(self, prompts):
    try:
      return self.verifier.tokenize(prompts)
    except ValueError as error:
      raise ConfigError(str(error)) from None

  def encode_prompts(self, prompts: Sequence[Prompt]) -> None:
    """Encodes prompts that were not seen yet, in batches of 1, 2, 4 .. 64."""
    if len(self._contexts) > KEPT:
      self._contexts.clear()
    self.tokenize_prompts(prompts)
    wanted = dict.fromkeys(map(content_key, prompts))
    new = [key for key in wanted if key not in self._contexts]
    for low in range(0, len(new), ENCODED):
      keys = new[low : low + ENCODED]
      rows = _padded(len(keys), _power(len(keys)))
      arrays = jax.tree.map(lambda *x: np.stack(x), *(self._tokens[keys[i]] for i in rows))
      vctx = jax.tree.map(np.asarray, self._encode(self.params, arrays))
      for i, key in enumerate(keys):
        self._contexts[key] = jax.tree.map(lambda x, i=i: x[i], vctx)
        del self._tokens[key]

  def _contexts_of(self, prompts):
    """Contexts `[R, ...]`."""
    if not self.verifier.jittable:
      return self.verifier.encode(self.params, self._tokenize(list(prompts)))
    keys = [content_key(prompt) for prompt in prompts]
    if any(key not in self._contexts for key in keys):
      self.encode_prompts(prompts)
    return jax.tree.map(lambda *x: np.stack(x), *(self._contexts[key] for key in keys))

  # ------------------------------------------------------------------------------------- outputs

  def __call__(
    self, observed: Mapping[str, np.ndarray], prompts: Sequence[Prompt]
  ) -> dict[str, np.ndarray]:
    """Scores `{name: [R]}` of outputs `{name: [R, ...]}` of R prompts.

    Pictures `[R, H, W, 3]` are uint8, or floats in [0, 1]. R is padded to a power of two and to the
    mesh, so that few shapes are compiled.

    Raises:
      ConfigError: a prompt that cannot be read, pictures that are none.
    """
    for name, array in observed.items():
      if name == 'image' and array.dtype != np.uint8:
        preprocess.check_images(array)
    rows = self._rows(len(prompts))
    with self._turn:
      vctx = self._contexts_of([prompts[i] for i in rows])
      found = self._score(self.params, vctx, {name: x[rows] for name, x in observed.items()})
      return {name: np.asarray(value)[: len(prompts)] for name, value in found.items()}

  def embed_images(self, images: np.ndarray) -> np.ndarray:
    """Features `[R, D]` of pictures `[R, H, W, 3]`, where the verifier gives 'features'."""
    rows = self._rows(len(images))
    return np.asarray(self._embed(self.params, images[rows]))[: len(images)]

  def _rows(self, count: int) -> np.ndarray:
    """Which output fills each row of the padded batch."""
    if not self.verifier.jittable:
      return np.arange(count)
    devices = self.mesh.shape['data'] if self.mesh is not None else 1
    return _padded(count, -(-_power(count) // devices) * devices)


def content_key(prompt: Prompt) -> str:
  """Equal for prompts that say the same."""
  return json.dumps(prompt, sort_keys=True, default=_digest)


def _digest(value) -> str:
  """What stands for a value that JSON has no form for, such as the pixels of a picture."""
  if isinstance(value, np.ndarray | jax.Array):
    value = np.ascontiguousarray(value)
    return f'{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}'
  return repr(value)


def picture_floats(x):
  """Pictures `[R, ..., H, W, 3]` in 8 bits as floats in [0, 1]; anything else as it is."""
  if x.dtype == np.uint8 and x.ndim >= 4 and x.shape[-1] == 3:
    return x.astype(jnp.float32) / 255
  return x


def _power(count: int) -> int:
  return 1 << (count - 1).bit_length()


def _padded(count: int, size: int) -> np.ndarray:
  return np.minimum(np.arange(size), count - 1)
