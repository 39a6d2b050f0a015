"""Heads by the norms of their queries, over weights that are there."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from joma.transformer import layer_hooks
from scansnap_jax.experiment import errors
from tests.joma.systems import one_layer


def _laid_over(entry):
  """What a trained layer's heads give with the entry, and without."""
  _, params, x = one_layer.draw("")
  config = layer_hooks.over(one_layer.CONFIG, (entry,))
  got = one_layer.head_out(config, params, x)
  return got, one_layer.head_out(one_layer.CONFIG, params, x), params, x


class MohNormsTest(parameterized.TestCase):

  def test_the_greatest_queries_are_chosen(self):
    got, plain, params, x = _laid_over("moh_norms:active=1:shared=1")
    query = np.einsum("BTD,DNH->BTNH", x, params["query"]["kernel"])
    norms = np.sqrt(np.square(query).sum(axis=-1))
    # By the deviation over the routed heads and softmax, as in the paper.
    scores = norms / norms[..., 1:].std(axis=-1, ddof=1, keepdims=True)
    greatest = 1 + scores[..., 1:].argmax(axis=-1)
    is_active = np.arange(4) == greatest[..., None]
    is_active[..., 0] = True
    want = np.where(is_active[..., None], plain, 0)
    np.testing.assert_allclose(got, want, atol=1e-6)
    self.assertGreater(len(np.unique(greatest)), 1)

  def test_random_heads_are_as_many_and_others_at_each_token(self):
    got, plain, _, _ = _laid_over("moh_norms:active=2:by=random")
    is_active = np.abs(got).max(axis=-1) > 0
    np.testing.assert_array_equal(is_active.sum(axis=-1), 2)
    np.testing.assert_array_equal(got[is_active], plain[is_active])
    self.assertGreater(len(np.unique(is_active[0], axis=0)), 2)

  def test_named_heads_are_the_same_for_all_tokens(self):
    got, plain, _, _ = _laid_over("moh_norms:heads=1.3")
    np.testing.assert_allclose(
        got[:, :, [1, 3]], plain[:, :, [1, 3]], atol=1e-6
    )
    np.testing.assert_array_equal(got[:, :, [0, 2]], 0)

  @parameterized.parameters(
      ("moh_norms:by=size", "by='size' must be one of"),
      ("moh_norms:heads=1,3", "numbers with dots"),
      ("moh_norms:heads=4", "must be among the 4 heads"),
      ("moh_norms:active=0", "at least 1, got 0"),
  )
  def test_says_what_would_be_right(self, entry, message):
    with self.assertRaisesRegex(errors.UserError, message):
      config = dataclasses.replace(one_layer.CONFIG, attention=(entry,))
      _, params, x = one_layer.draw("")
      one_layer.run(config, params, x)


if __name__ == "__main__":
  absltest.main()
