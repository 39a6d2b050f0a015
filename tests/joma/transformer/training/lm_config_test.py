import dataclasses
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

from joma.transformer.training import lm_config
from scansnap_jax.experiment import errors


class LmConfigTest(parameterized.TestCase):

  @parameterized.parameters(
      (dict(batch_size=0), "batch_size must be at least 1"),
      (dict(lr=0.0), "lr must be positive"),
      (dict(lr_mlp=-1.0), "lr_mlp must be positive"),
      (dict(update_layers=(4,)), "update_layers must be from 0 to 3"),
      (dict(update_layers=(1, 1)), "has 1 twice"),
      (dict(clip_norm=0.0), "clip_norm must be positive"),
      (dict(beta_1=1.0), r"beta_1 must lie in \[0, 1\), got 1"),
      (dict(weight_decay=2.0), r"weight_decay must lie in \[0, 1\]"),
      (dict(num_epochs=1), "one of num_steps and num_epochs"),
      (dict(num_steps=None), "one of num_steps and num_epochs"),
      (dict(num_steps=0), "num_steps must be at least 1"),
      (dict(log_every=7), "eval_every must .*log_every=7, got 100"),
      (dict(map_steps=(30,)), "map_steps must .*log_every=25, got 30"),
      (dict(grad_accum=3), "batch_size=16 must be a multiple of grad_accum=3"),
      (dict(fsdp=2), "fsdp=2, tensor=1 and seq=1 want parallelism=mesh"),
      (dict(parallelism="mesh", seq=3), "seq=3 .* 1, 2, 4, 8, .* would do"),
  )
  def test_a_wrong_setting_is_named(self, change, message):
    with self.assertRaisesRegex(errors.UserError, message):
      dataclasses.replace(lm_config.default(), **change)

  def test_maps_may_be_of_the_last_step_wherever_it_falls(self):
    config = lm_config.LmConfig(num_steps=60, map_steps=(0, 60))
    self.assertEqual(config.map_steps, (0, 60))

  def test_presets_have_the_settings_of_the_papers_code(self):
    figure6 = lm_config.joma_figure6()
    self.assertEqual(
        (figure6.batch_size, figure6.seq_len, figure6.eval_batch_size),
        (20, 35, 10),
    )
    self.assertEqual(
        (figure6.optimizer, figure6.lr, figure6.clip_norm, figure6.num_epochs),
        ("adam", 1e-4, 0.5, 20),
    )
    self.assertEqual((figure6.beta_1, figure6.beta_2), (0.9, 0.999))
    self.assertTrue(figure6.reset_optimizer_every_epoch)
    self.assertTrue(figure6.identical_layers)
    self.assertEqual(figure6.model.dropout, 0.2)
    figure7 = lm_config.scansnap_figure7()
    self.assertEqual(
        (figure7.optimizer, figure7.lr, figure7.lr_mlp), ("sgd", 5.0, 10.0)
    )
    self.assertEqual(figure7.model.dropout, 0.3)
    self.assertEqual(figure7.map_steps, (0, 500, 1000, 1500))
    self.assertEqual(lm_config.joma_figure8().model.num_layers, 5)
    self.assertIsNone(lm_config.scansnap_figure10().lr_mlp)

  def test_importing_it_imports_no_jax(self):
    script = (
        "import sys, joma.transformer.training.lm_config; sys.exit('jax' in"
        " sys.modules)"
    )
    self.assertEqual(subprocess.call([sys.executable, "-c", script]), 0)


if __name__ == "__main__":
  absltest.main()
