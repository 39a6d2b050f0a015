from absl.testing import absltest
from absl.testing import parameterized

from joma.inference.speculative import draft_config
from scansnap_jax.experiment import errors


class DraftConfigTest(parameterized.TestCase):

  def test_reads_names_and_settings(self):
    self.assertEqual(draft_config.parse("ngram"), draft_config.NGram())
    self.assertEqual(
        draft_config.parse("ngram:n=5:k=7:least=1"),
        draft_config.NGram(n=5, least=1, k=7),
    )
    self.assertEqual(draft_config.parse("model:k=2"), draft_config.Model(k=2))

  @parameterized.parameters(
      ("bigram", "draft='bigram' is unknown; there are ngram and model"),
      ("ngram:k=0", "k must be at least 1, got 0"),
      ("ngram:n=-1", "n must be at least 1, got -1"),
      ("ngram:n=1", "n=1 is below least=2"),
      ("ngram:least=0", "least must be at least 1, got 0"),
      ("model:k=-3", "k must be at least 1, got -3"),
      ("model:n=3", "settings of model are whole numbers, :k=1, got 'n=3'"),
      ("ngram:k=1.5", "got 'k=1.5'"),
      ("ngram:k", "got 'k'"),
  )
  def test_what_is_no_draft_is_one_sentence(self, text, message):
    with self.assertRaisesRegex(errors.UserError, message):
      draft_config.parse(text)


if __name__ == "__main__":
  absltest.main()
