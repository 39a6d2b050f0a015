"""InfiniRetri: a planted head keeps its needle, the first layer loses it."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from joma.systems.reuse import infini_retri
from joma.systems.reuse import question_weights
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors

_END, _NEEDLE, _QUESTION, _VOCAB = 0, 14, 15, 16
_SETTINGS = infini_retri.Settings(chunk=16, budget=8, width=3)


@functools.cache
def _planted():
  """Tokens are axes; in the last layer the question attends to the needle."""
  config = configs.TransformerConfig(
      vocab_size=_VOCAB,
      num_layers=2,
      embed_dim=_VOCAB,
      num_heads=2,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=8,
      positions="none",
  )
  model = models.Transformer(config, implementation="reference")
  init = functools.partial(model.init, jax.random.key(0))
  shapes = jax.eval_shape(init, jnp.zeros((1, 2), jnp.int32))["params"]
  params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: (jnp.ones if path[-1].key == "scale" else jnp.zeros)(
          leaf.shape
      ),
      shapes,
  )
  params["token_embed"]["embedding"] = jnp.eye(_VOCAB)
  attn = params["layers_1"]["attn"]
  for name, token in (("query", _QUESTION), ("key", _NEEDLE)):
    attn[name]["kernel"] = attn[name]["kernel"].at[token, 1, 0].set(2.0)
  return model, params


def _text(needle_at, num_sentences=400):
  """Sentences of four tokens; one of them has the needle."""
  rng = np.random.default_rng(needle_at)
  text = rng.integers(1, _NEEDLE, (num_sentences, 4))
  text[:, -1] = _END
  text[needle_at, 1] = _NEEDLE
  return text.reshape(-1)


def _carried(layer, text):
  model, params = _planted()
  read = question_weights.reader(model, params, room=32, layer=layer)
  question = np.array([_QUESTION])
  return infini_retri.carried(read, text, question, (_END,), _SETTINGS)


class InfiniRetriTest(parameterized.TestCase):

  @parameterized.parameters(5, 399)
  def test_a_needle_is_kept_over_a_hundred_chunks(self, needle_at):
    """The twin reads the first layer, which attends to all alike."""
    text = _text(needle_at)
    found = _carried(-1, text)
    self.assertIn(_NEEDLE, found)
    sentence = text[4 * needle_at : 4 * needle_at + 4].tolist()
    whole = found.reshape(-1, 4).tolist()  # Whole sentences are carried.
    self.assertIn(sentence, whole)
    self.assertLess(len(found), _SETTINGS.budget + 4)
    self.assertNotIn(_NEEDLE, _carried(0, text))

  def test_one_chunk_is_the_text_itself(self):
    text = _text(1, num_sentences=4)
    np.testing.assert_array_equal(_carried(-1, text), text)

  def test_a_wide_filter_prefers_neighbours(self):
    """A spike of 1 against three of .5 side by side."""
    weights = np.zeros((1, 1, 12))
    weights[..., 2] = 1.0
    weights[..., 7:10] = 0.5
    best = lambda width: int(infini_retri.scores(weights, width).argmax())
    self.assertEqual((best(1), best(3)), (2, 8))

  def test_chunks_are_whole_sentences_where_they_can_be(self):
    text = np.array([1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 9, 1, 2, 0])
    parts = infini_retri.chunks(text, (0,), 5)
    self.assertEqual([len(part) for part in parts], [3, 4, 5, 2])
    np.testing.assert_array_equal(np.concatenate(parts), text)

  def test_says_what_would_be_right(self):
    with self.assertRaisesRegex(errors.UserError, "width=4 must be odd"):
      infini_retri.Settings(width=4)
    model, params = _planted()
    read = question_weights.reader(model, params, room=4)
    with self.assertRaisesRegex(errors.UserError, "room=4 is too little for 6"):
      read(np.arange(1, 6), np.array([_QUESTION]))


if __name__ == "__main__":
  absltest.main()
