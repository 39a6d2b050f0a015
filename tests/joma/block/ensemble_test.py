from absl.testing import absltest
import numpy as np
import pytest

from joma.block import data
from joma.block import ensemble
from joma.block import model
from joma.block import run as block_run


def _step_of(state, shared, *, setting):
  del shared, setting
  return state.step, state.run.seed


class TrainTest(absltest.TestCase):

  @pytest.mark.slow
  def test_crosses_settings_with_seeds_in_chunks_that_change_nothing(self):
    setting = block_run.BlockSetting(
        blocks=(model.JomaBlock(num_tokens=20, hidden_dim=3),),
        num_classes=3,
        draw=data.DrawContexts(3),
    )
    sources = [data.ContextSource(np.bool_(flag)) for flag in (0, 1)]
    member = lambda source, lr: ensemble.member(source=source, lr_w=lr, lr_z=lr)
    settings = {
        "still": member(sources[0], 0.0),
        # Another source for each seed.
        "moving": [member(source, 1.0) for source in sources],
    }
    shared = dict(setting=setting, num_steps=8, num_records=4, score=_step_of)
    whole = ensemble.train(settings, (5, 9), **shared)
    parts = ensemble.train(settings, (5, 9), **shared, num_scores=2)
    self.assertEqual(whole.losses.shape, (2, 2, 8))
    self.assertEqual(whole["moving"].blocks[0].v.shape, (2, 5, 20, 3))
    np.testing.assert_array_equal(whole.steps, [0, 2, 4, 6, 8])
    np.testing.assert_array_equal(whole.losses, parts.losses)
    np.testing.assert_array_equal(
        whole["moving"].blocks[0].v, parts["moving"].blocks[0].v
    )
    still = whole["still"].blocks[0].v
    np.testing.assert_array_equal(still[:, 0], still[:, -1])
    self.assertGreater(np.ptp(whole["moving"].loss[0]), 1e-4)
    steps, seeds = parts.score_of("moving")
    np.testing.assert_array_equal(steps, [[0, 4, 8]] * 2)
    np.testing.assert_array_equal(seeds[:, 0], [5, 9])


if __name__ == "__main__":
  absltest.main()
