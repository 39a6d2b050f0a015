from absl.testing import absltest

from joma.systems import dotted
from scansnap_jax.experiment import errors


class DottedTest(absltest.TestCase):

  def test_numbers(self):
    self.assertEqual(dotted.numbers("act: heads", "0.3.12"), (0, 3, 12))
    self.assertEqual(dotted.numbers("act: heads", ""), ())

  def test_others_are_refused(self):
    for text in ("1,2", "1.", "a", "-1"):
      with self.assertRaisesRegex(
          errors.UserError, f"act: heads='{text}' must"
      ):
        dotted.numbers("act: heads", text)


if __name__ == "__main__":
  absltest.main()
