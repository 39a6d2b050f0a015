"""Guesses of the text so far, against a plain search."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np

from joma.inference import sampling_config
from joma.inference.speculative import draft_config
from joma.inference.speculative import drafts
from joma.inference.speculative import round as round_lib
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors


def _searched(text, n, least, k):
  """The longest end that occurred before, of its places the last."""
  for size in range(min(n, len(text) - 1), least - 1, -1):
    for stop in range(len(text) - 1, size - 1, -1):
      if text[stop - size : stop] == text[-size:]:
        longer = list(text)
        while len(longer) < len(text) + k:
          longer.append(longer[stop + len(longer) - len(text)])
        return longer[len(text) :]
  return None


def _round(texts, num_new):
  """The round that ended with the last `num_new` tokens of each text."""
  array = lambda *values: jnp.array(values, jnp.int32)
  wide = max(num_new)
  came = [
      text[len(text) - n :] + [7] * (wide - n)
      for text, n in zip(texts, num_new, strict=True)
  ]
  return round_lib.Round(
      came=array(*came),
      counts=array(*num_new),
      newest=array(*(text[-1] for text in texts)),
      positions=array(*(len(text) - 1 for text in texts)),
      num_left=array(*(9 for _ in texts)),
      is_done=jnp.zeros(len(texts), bool),
      is_finite=jnp.ones(len(texts), bool),
      number=jnp.int32(1),
  )


class DraftsTest(parameterized.TestCase):

  @parameterized.parameters((3, 2, 4), (1, 1, 1), (4, 1, 7))
  def test_an_end_that_stood_before_is_found(self, n, least, k):
    """Texts of few tokens, some of them new in the last round."""
    rng = np.random.default_rng(n)
    draft = drafts.of(draft_config.NGram(n=n, least=least, k=k))
    texts = [rng.integers(0, 3, size).tolist() for size in range(2, 30)]
    texts += [[5] * 6, [1, 2, 1, 2, 1], [1, 2, 3, 4], [0, 0]]
    num_new = [1 + i % min(4, len(text) - 1) for i, text in enumerate(texts)]
    prompts = [
        text[: len(text) - m] for text, m in zip(texts, num_new, strict=True)
    ]
    found = jax.jit(draft.guess, static_argnums=3)(
        None,
        draft.begin(None, prompts, 40),
        _round(texts, num_new),
        sampling_config.GREEDY,
        jax.random.key(0),
    )
    for row, text in enumerate(texts):
      want = _searched(text, n, least, k)
      self.assertEqual(bool(found.is_found[row]), want is not None, text)
      if want is not None:
        self.assertEqual(found.tokens[row].tolist(), want, text)

  def test_a_model_with_other_tokens_is_refused(self):
    config = configs.TransformerConfig(vocab_size=50)
    other = models.Transformer(configs.TransformerConfig(vocab_size=51))
    with self.assertRaisesRegex(
        errors.UserError, "has 51 tokens and the model 50"
    ):
      drafts.of(draft_config.Model(), other).check(config, 5)
    with self.assertRaisesRegex(errors.UserError, "needs the model that is to"):
      drafts.of(draft_config.Model())
    systems = models.Transformer(
        configs.TransformerConfig(vocab_size=50, attention=("lightning",))
    )
    with self.assertRaisesRegex(
        errors.UserError, "attention=lightning: a draft"
    ):
      drafts.of(draft_config.Model(), systems).check(config, 5)


if __name__ == "__main__":
  absltest.main()
