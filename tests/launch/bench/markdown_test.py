from absl.testing import absltest

from launch.bench import markdown


class TableTest(absltest.TestCase):

  def test_what_a_row_lacks_is_empty(self):
    columns = {"name": ("kernel", str), "us": ("time us", "{:.1f}".format)}
    found = markdown.table(columns, [dict(name="a", us=1.25), dict(us=None)])
    self.assertEqual(
        found.splitlines(),
        ["| kernel | time us |", "| --- | --- |", "| a | 1.2 |", "|  |  |"],
    )

  def test_nothing_is_written_as_nothing_and_zero_as_zero(self):
    columns = {"us": ("us", "{:.1f}".format)}
    found = markdown.table(columns, [dict(us=0.0), dict(us=None)])
    self.assertEqual(found.splitlines()[2:], ["| 0.0 |", "|  |"])


if __name__ == "__main__":
  absltest.main()
