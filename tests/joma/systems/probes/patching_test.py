"""Patched heads beside a plain layer in NumPy, and what must not change."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.systems.probes import patching
from joma.transformer import config as configs
from joma.transformer import model as models
from tests.joma.transformer import applied

_DRAW = np.random.default_rng(0)
_TOKENS, _OTHER = _DRAW.integers(0, 9, (2, 3, 5)).astype(np.int32)
_AT = jnp.array([4, 2, 3])
_CONFIG = configs.TransformerConfig(
    vocab_size=9,
    num_layers=2,
    embed_dim=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=12,
)
_MODEL = models.Transformer(_CONFIG, implementation="reference")


@jax.jit
def _read(params, tokens):
  return _MODEL.apply({"params": params}, tokens, mutable="intermediates")


@jax.jit
def _patched(params, tokens, patch):
  return _MODEL.apply(
      {"params": params}, tokens, router=patch, mutable="intermediates"
  )


def _rms(x, scale):
  return x / np.sqrt((x * x).mean() + _CONFIG.norm_epsilon) * scale


def _rest(p, resid):
  """From behind the last layer's attention to the logits, of one token."""
  own = p["layers_1"]
  x = _rms(resid, own["mlp_norm"]["scale"])
  gate = x @ own["mlp"]["gate"]["kernel"]
  hidden = gate / (1 + np.exp(-gate)) * (x @ own["mlp"]["up"]["kernel"])
  resid = resid + hidden @ own["mlp"]["down"]["kernel"]
  return p["token_embed"]["embedding"] @ _rms(resid, p["final_norm"]["scale"])


class PatchTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.params = applied.params(_MODEL)
    self.logits, self.seen = _read(self.params, _TOKENS)
    _, other = _read(self.params, _OTHER)
    self.other = patching.head_outs(other, 2, _AT)

  def _run(self, head_out, is_patched):
    patch = patching.Patch(
        head_out=head_out, at=_AT, is_patched=jnp.array(is_patched)
    )
    return _patched(self.params, _TOKENS, patch)

  def test_a_patched_head_says_what_it_said_of_the_other_text(self):
    found, _ = self._run(self.other, [[False, False], [False, True]])
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), self.params)
    kernel = p["layers_1"]["attn"]["out"]["kernel"][1]
    sown = self.seen["intermediates"]["layers_1"]
    for text, at in enumerate(np.asarray(_AT)):
      own = np.float64(sown["attn"]["head_out"][0][text, at, 1])
      resid = np.float64(sown["resid_attn"][0][text, at])
      resid = resid + (np.float64(self.other[text, 1, 1]) - own) @ kernel
      np.testing.assert_allclose(
          found[text, at], _rest(p, resid), rtol=1e-5, atol=1e-5
      )
      # And nothing else does.
      for token in range(5):
        if token != at:
          np.testing.assert_array_equal(
              found[text, token], self.logits[text, token]
          )

  def test_what_it_said_of_this_text_changes_nothing(self):
    same = patching.head_outs(self.seen, 2, _AT)
    found, _ = self._run(same, [[True, True], [True, True]])
    np.testing.assert_allclose(found, self.logits, atol=1e-6)
    none, _ = self._run(self.other, [[False, False], [False, False]])
    np.testing.assert_array_equal(none, self.logits)

  def test_what_lies_behind_a_patched_head_follows(self):
    _, seen = self._run(self.other, [[True, False], [False, False]])
    later = lambda seen: patching.head_outs(seen, 2, _AT)[:, 1]
    apart = np.abs(later(seen) - later(self.seen)).max(axis=(1, 2))
    self.assertTrue((apart > 1e-3).all())


if __name__ == "__main__":
  absltest.main()
