"""A policy under another library's model and cache: KerasHub's GPT-2 on JAX.

The functions are those of docs/peers.md.
"""

import os
import pathlib
import re

from absl.testing import absltest
import jax
import numpy as np
import pytest

_PAGE = pathlib.Path(__file__).parents[3] / "docs" / "peers.md"
_PROMPT, _NEW = 40, 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class KerasHubTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    # Keras adds axes that nobody wrote, which this project's tests forbid.
    self.enter_context(jax.numpy_rank_promotion("allow"))
    os.environ["KERAS_BACKEND"] = "jax"
    keras_hub = pytest.importorskip("keras_hub")
    import keras

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=96,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        max_sequence_length=64,
        dropout=0.0,
    )
    self.lm = keras_hub.models.GPT2CausalLM(backbone)
    blocks = re.findall(r"```python\n(.*?)```", _PAGE.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "def greedy" in block]
    self.page = {}
    exec(code, self.page)
    draws = np.random.default_rng(0)
    self.prompt = draws.integers(0, 96, (1, _PROMPT))

  def _greedy(self, policy, capacity):
    return np.asarray(
        self.page["greedy"](
            self.lm, self.prompt, _NEW, policy=policy, capacity=capacity
        )
    )[0]

  def test_with_a_slot_for_every_token_it_says_what_keras_hub_says(self):
    self.lm.compile(sampler="greedy")
    tokens = np.pad(self.prompt, ((0, 0), (0, _NEW)))
    mask = np.arange(_PROMPT + _NEW)[None] < _PROMPT
    want = self.lm.generate(
        {"token_ids": tokens, "padding_mask": mask}, stop_token_ids=None
    )["token_ids"]
    want = np.asarray(want)[0, _PROMPT:]
    np.testing.assert_array_equal(self._greedy("keydiff", _PROMPT), want)
    # And with fewer slots it need not: something does leave.
    self.assertFalse((self._greedy("keydiff", 16) == want).all())


if __name__ == "__main__":
  absltest.main()
