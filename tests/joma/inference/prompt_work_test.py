from absl.testing import parameterized

from joma.inference import prompt_work
from joma.transformer import config as configs
from scansnap_jax.experiment import errors

_CONFIG = configs.TransformerConfig(
    vocab_size=50,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=24,
)


class PromptWorkTest(parameterized.TestCase):

  def test_operations_by_hand(self):
    # A layer: 16 to 4 and 2 + 2 heads of 8 and back, three products of the
    # MLP, two norms; a table that is the output too, or one of its own.
    layer = 16 * 8 * (4 + 4) + 32 * 16 + 3 * 16 * 24 + 2 * 16
    tables = 50 * 16 * (1 if _CONFIG.tie_embeddings else 2)
    parameters = 2 * layer + tables + 16
    attention = 2 * 2 * 4 * 8  # Layers, both products, heads, head size.
    self.assertEqual(
        prompt_work.flop(_CONFIG, [10, 3]),
        2 * parameters * 13 + attention * (100 + 9),
    )

  def test_what_no_memory_holds_is_refused(self):
    self.assertEqual(prompt_work.capacity(_CONFIG, 1, 600, "float32"), 2304)
    prompt_work.check_whole(_CONFIG, [600, 5], "float32")
    with self.assertRaisesRegex(errors.UserError, "1000000000000 of prompt"):
      prompt_work.capacity(_CONFIG, 1, 10**12, "bfloat16")
    with self.assertRaisesRegex(
        errors.UserError, "a prompt of 1000000000000 tokens, read at once"
    ):
      prompt_work.check_whole(_CONFIG, [5, 10**12], "float32")
    # Many prompts of a size that one could have.
    with self.assertRaisesRegex(errors.UserError, "a prompt of 1000000 tokens"):
      prompt_work.check_whole(_CONFIG, [10**6] * 1000, "float32")
