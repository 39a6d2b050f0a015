from absl.testing import parameterized

from joma.transformer import config as configs
from joma.transformer.rope import config as rope_config
from scansnap_jax.experiment import errors


class TransformerConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(vocab_size=0), "vocab_size must be at least 1, got 0"),
      (dict(hidden_dim=-1), "hidden_dim must be at least 1, got -1"),
      (
          dict(num_kv_heads=3),
          "num_heads=4 must be a multiple of num_kv_heads=3",
      ),
      (dict(dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
      (dict(windows=(4,)), "got 1 for num_layers=4"),
      (dict(windows=(4, 4, 4, -1)), "windows must not be negative"),
      (dict(norm_epsilon=0.0), "norm_epsilon must be positive"),
      (dict(head_dim=31), "head_dim=31 x rotary_fraction=1.0 must be even"),
      (
          dict(use_parallel_residual=True, norm_placement="post"),
          "use_parallel_residual wants norm_placement=pre, got post",
      ),
  )
  def test_impossible_shapes_are_refused(self, changes, message):
    with self.assertRaisesRegex(errors.UserError, message):
      configs.TransformerConfig(**changes)

  def test_layers_with_a_window_may_have_frequencies_of_their_own(self):
    config = configs.TransformerConfig(
        num_layers=2,
        windows=(8, 0),
        rope=rope_config.RopeConfig(rope_theta=1e6),
        local_rope_theta=1e4,
    )
    self.assertEqual([config.window_of(i) for i in (0, 1)], [8, None])
    thetas = [config.rope_of(layer).rope_theta for layer in (0, 1)]
    self.assertEqual(thetas, [1e4, 1e6])
