import html.parser
import json
import re

from absl.testing import absltest
import numpy as np

from joma.inference.explore import document
from tests.joma.inference.explore import synthetic


class _Page(html.parser.HTMLParser):
  """The elements of a page and the text of those that have an id."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.texts, self._id = [], {}, None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    self._id = dict(attrs).get("id")

  def handle_data(self, data):
    self.texts[self._id] = self.texts.get(self._id, "") + data
    self._id = None


class DocumentTest(absltest.TestCase):

  def test_a_text_is_no_part_of_the_page(self):
    found, _ = synthetic.make(1, 2, 1)
    text = document.render(found, {"text": "<i>&@@script@@"})
    page = _Page(text)
    header = json.loads(page.texts["header"])
    self.assertEqual(header["pieces"], list(found.pieces))
    self.assertIn(" @@header@@", header["pieces"])
    self.assertIn("&lt;i&gt;&amp;@@script@@", text)
    self.assertEqual(text.count("</script>"), text.count("<script"))
    self.assertEqual(header["losses"][-1], None)
    np.testing.assert_allclose(
        header["policies"][1]["shares"],
        found.attention.shares[1].mean(axis=-1).ravel(),
        rtol=1e-3,
    )

  def test_nothing_is_loaded(self):
    found, _ = synthetic.make(1, 1, 1, policies=())
    text = document.render(found, {})
    page = _Page(text)
    policy = dict(page.tags)["meta"]
    metas = [attrs for tag, attrs in page.tags if tag == "meta"]
    policy = next(m["content"] for m in metas if "http-equiv" in m)
    self.assertTrue(policy.startswith("default-src 'none'; "))
    self.assertNotIn("http", policy)
    for _, attrs in page.tags:
      self.assertNoCommonElements(attrs, {"src", "href", "action"})
    self.assertIsNone(re.search(r"https?:|import\(|@import", text))

  def test_the_title_says_who_keeps(self):
    for policies, title in (
        ((), "What synthetic attends to"),
        (("a",), "What synthetic attends to, and what A keeps"),
        (("a", "b", "c"), "What .* attends to, and what A, B and C keep"),
    ):
      found, _ = synthetic.make(1, 1, 1, policies=policies)
      text = document.render(found, {})
      self.assertRegex(text, f"<title>{title}</title>")


if __name__ == "__main__":
  absltest.main()
