from absl.testing import absltest
from absl.testing import parameterized

from joma.hierarchy import config
from scansnap_jax.experiment import errors


class Table1ConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(num_latents_1=(20,)), r"\(10, 20\) and num_latents_1=\(20,\)"),
      (dict(num_classes=()), r"num_classes needs one or more .* got \(\)"),
      (dict(num_classes=(20, 20)), r"values that differ, got \(20, 20\)"),
      (dict(num_layers=2), "num_layers must be at least 3, got 2"),
      (dict(num_seeds=0), "num_seeds must be at least 1, got 0"),
      (dict(lr=0.0), "lr must be positive and finite, got 0"),
      (dict(lr=float("nan")), "lr must be positive and finite, got nan"),
      (dict(weight_decay=-1.0), "weight_decay must be .* got -1"),
      (dict(first_seed=2**31 - 1), "first_seed must be from 0 to 2147483643"),
      (dict(num_classes=(191,)), "2 out of 20 gives 190 sets, of which 191"),
      (dict(num_combinations=(0,)), "num_combinations=0 out of 99 gives 1"),
      (dict(num_combinations=(4,)), "may have 64 tokens, but seq_len is 30"),
      (dict(num_unseen=1), "num_unseen must be at least 2, got 1"),
  )
  def test_what_cannot_be_is_refused_with_its_value(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      config.Table1Config(**changes)

  def test_presets(self):
    full, reduced = config.table1(), config.table1_reduced()
    self.assertEqual((full.embed_dim, full.num_steps), (1024, 10_000))
    self.assertEqual((full.lr, full.weight_decay), (1e-4, 1e-4))
    self.assertEqual(reduced.embed_dim, 128)
    self.assertEqual(full.num_runs, reduced.num_runs)


if __name__ == "__main__":
  absltest.main()
