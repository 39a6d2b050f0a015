"""What systems are held to, alone and in pairs: small models and the checks.

Letters as in `joma.transformer.hooks`; tests name what fails.
"""

import datetime
import functools
import hashlib

import chex
import jax
import numpy as np

from joma.systems import names
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import model as models
from tests.joma.transformer import applied

# Options with which twelve tokens are enough to choose among.
_SMALL = {
    "duo_gates": "duo_gates:sinks=1:recent=2:start=0.5",
    "echo_att": "echo_att:first=0:last=0",
    "flux": "flux:sinks=1:window=3:pool=2:hidden=4:start=0.1",
    "grid_bias": "grid_bias:rows=3:columns=3:first=1:start=0.5",
    "grid_conv": "grid_conv:rows=3:columns=3:first=1",
    "hip": "hip:k=4:block=2",
    "hylra": "hylra:full=0:k=4:block=2",
    "indexer": "indexer:k=4",
    "landmark": "landmark:block=3:k=2",
    "moba": "moba:k=2:block=2",
    "moh_blocks": "moh_blocks:block=2",
    "moh_norms": "moh_norms:active=2:shared=1",
    "nats": "nats:chunk=3",
    "nsa": "nsa:k=2:block=2:window=3:compress=mlp:hidden=8",
    "superlinear": "superlinear:k=2:s=1:behind=0.5",
    "titans": "titans:chunk=3",
    "xattention": "xattention:stride=1:block=2:threshold=0.5",
}
# Systems of layers that take from the one before.
_TWO_LAYERS = {"echo_att", "hylra"}
# Systems that take key heads in pairs refuse a single one.
PAIRED = {"differential"}
NAMES = tuple(sorted(names.SYSTEMS))
LENGTH, PROMPT = 12, 7


def order(what, num):
  """Another one each day, the same on every worker."""
  day = f"{what} {datetime.date.today()}"
  seed = int(hashlib.sha256(day.encode()).hexdigest(), 16) % 2**32
  return np.random.default_rng(seed).permutation(num)


def small(name):
  """The entry of a system."""
  return _SMALL.get(name, name)


def num_layers(*of):
  """Layers that a model of such systems needs."""
  return 2 if _TWO_LAYERS & {*of} else 1


def system(name):
  """With its defaults."""
  (part,) = names.parts(name)
  return names.make(part)


def sees_later(name):
  """Whether it is not causal to the last digit."""
  return isinstance(system(name), hooks.SeesLater)


def config(entry, num_kv_heads, positions, num_layers=1):
  """Of a small model with the entry in all layers."""
  return configs.TransformerConfig(
      vocab_size=11,
      num_layers=num_layers,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=num_kv_heads,
      head_dim=8,
      hidden_dim=16,
      max_len=LENGTH,
      embed_scale=4.0,
      positions=positions,
      attention=(entry,) if entry else (),
  )


@functools.cache
def model(entry, num_kv_heads, positions, num_layers=1):
  """A model, parameters, and three texts."""
  shape = config(entry, num_kv_heads, positions, num_layers)
  made = models.Transformer(shape, implementation="reference")
  tokens = np.random.default_rng(1).integers(0, 11, (3, LENGTH), np.int32)
  return made, applied.params(made), tokens


def steps(shape, lengths=None):
  """Positions of texts; -1 behind their ends."""
  places = np.broadcast_to(np.arange(shape[1], dtype=np.int32)[None], shape)
  lengths = np.full(shape[0], shape[1]) if lengths is None else lengths
  return np.where(places < np.asarray(lengths)[:, None], places, -1)


def logits(made, params, tokens, positions):
  """Of whole texts."""
  return jax.device_get(applied.logits(made, params, tokens, positions))


def with_gradients(made, params, tokens, positions):
  """Loss, gradients and logits."""
  found = applied.loss_and_grads(made, params, tokens, positions)
  return jax.device_get(found)


def check_gradients(grads):
  """Every parameter's is finite, and not all zero."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    where = jax.tree_util.keystr(path)
    assert np.isfinite(leaf).all(), where
    assert np.abs(leaf).max() > 0, where


def check_rows(run, tokens, found, is_causal):
  """Later tokens, padding and other rows change nothing.

  Args:
    run: Of tokens and positions the logits.
    tokens: Of three texts.
    found: Their logits.
    is_causal: Whether later tokens may not.
  """
  changed = tokens.copy()
  changed[0, PROMPT:] = (tokens[0, PROMPT:] + 1) % 11
  other = run(changed, steps(tokens.shape))
  chex.assert_trees_all_close(other[1:], found[1:], atol=1e-6)
  assert np.abs(other - found)[0].max() > 1e-3
  if not is_causal:
    return
  chex.assert_trees_all_equal(other[0, :PROMPT], found[0, :PROMPT])
  padded = steps(tokens.shape, (PROMPT, LENGTH, LENGTH))
  other = run(changed, padded)
  chex.assert_trees_all_close(other[0, :PROMPT], found[0, :PROMPT], atol=1e-6)
  chex.assert_trees_all_close(other[1:], found[1:], atol=1e-6)


def check_steps(made, params, tokens, want, cache):
  """Prompts of several lengths, then single tokens; rows that end wait."""
  at = np.array([PROMPT, 1, 4], np.int32)
  padded = steps((3, PROMPT), at)
  prompt = np.where(padded < 0, 0, tokens[:, :PROMPT])
  found, cache = applied.step(made, params, prompt, padded, cache)
  found = jax.device_get(found)
  for row, length in enumerate(at):
    chex.assert_trees_all_close(
        found[row, :length], want[row, :length], atol=1e-5
    )
  while (at < LENGTH).any():
    active = at < LENGTH
    one = tokens[np.arange(3), np.where(active, at, 0)][:, None]
    where = np.where(active, at, -1).astype(np.int32)[:, None]
    found, cache = applied.step(made, params, one, where, cache)
    found = jax.device_get(found)
    for row in np.flatnonzero(active):
      chex.assert_trees_all_close(found[row, 0], want[row, at[row]], atol=1e-5)
    at = at + active
