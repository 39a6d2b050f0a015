import dataclasses

from absl.testing import absltest
import numpy as np

from joma.transformer.text import corpus as corpus_lib
from joma.transformer.training import lm_config
from joma.transformer.training import observe
from scansnap_jax.experiment import errors


class ChunkTest(absltest.TestCase):

  def test_is_a_chunk_of_the_first_column_alone(self):
    config = lm_config.LmConfig(
        eval_batch_size=2, seq_len=3, entropy_chunk=1, map_steps=(0,)
    )
    # Two columns of nine: 0 to 8 and 9 to 17, read three by three.
    corpus = dataclasses.replace(corpus_lib.load(), valid=np.arange(18))
    valid = observe.valid_batches(config, corpus, 4)
    found = observe._chunk(config, valid)
    np.testing.assert_array_equal(found.inputs, [[[3, 4, 5]] * 4])
    np.testing.assert_array_equal(found.targets, [[[4, 5, 6]] * 4])
    np.testing.assert_array_equal(found.weights, np.ones((1, 4, 3)))
    config = dataclasses.replace(config, entropy_chunk=3)
    with self.assertRaisesRegex(errors.UserError, "less than the 3 chunks"):
      observe._chunk(config, valid)


class SplitTest(absltest.TestCase):

  def test_rows_are_filled_up_with_zeros(self):
    split = observe.split_evenly(np.arange(1, 6), 2)
    np.testing.assert_array_equal(split, [[1, 2], [3, 4], [5, 0]])


if __name__ == "__main__":
  absltest.main()
