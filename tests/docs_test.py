"""What README and docs point at is there: files, headings, tests."""

import pathlib
import re

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parents[1]
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Code is no link, nor is a heading in it a heading.
_FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`[^`\n]*`")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
_PATH = re.compile(
    r"`((?:scansnap_jax|joma|kernels_pallas|launch|tests|docs)/[\w/.]+\.\w+)`"
)
_TEST = re.compile(r"`(?:[\w/]+(?:\.py)?::)?([A-Z]\w*Test)::(test_\w+)`")


def pages() -> list[pathlib.Path]:
  """README and its like, and all pages of docs."""
  return [*sorted(_ROOT.glob("*.md")), *sorted((_ROOT / "docs").rglob("*.md"))]


def anchors(text: str) -> set[str]:
  """Where links into a page may lead, by GitHub's rule.

  Lower case, without punctuation, hyphens for spaces; a heading that occurs
  again has its number.
  """
  found: set[str] = set()
  for heading in _HEADING.findall(_FENCED.sub("", text)):
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
    number, first = 0, name
    while name in found:
      number += 1
      name = f"{first}-{number}"
    found.add(name)
  return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def broken(page: pathlib.Path, text: str) -> list[str]:
  """The links of a page that lead nowhere; other sites are not asked."""
  wrong = []
  for target in _LINK.findall(_INLINE.sub("", _FENCED.sub("", text))):
    if re.match(r"[a-z]+:", target):
      continue
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
      wrong.append(target)
    elif anchor and anchor not in anchors(
        text if file == page else file.read_text()
    ):
      wrong.append(target)
  return wrong


class LinksTest(absltest.TestCase):

  def test_every_link_leads_somewhere(self):
    self.assertNotEmpty(pages()[1:])
    for page in pages():
      self.assertEqual(broken(page, page.read_text()), [], page)

  def test_finds_what_is_missing(self):
    text = (
        "# One `two`: 3\n[a](#one-two-3) [b](#two) [c](none.md)\n"
        "[d](docs/kernels.md#nothing-of-the-kind) [e](https://x.y/z#w)\n"
        "```\n[f](in_code.md)\n# b\n```\n`[g](in_code.md)`\n"
    )
    found = broken(_ROOT / "README.md", text)
    self.assertEqual(
        found, ["#two", "none.md", "docs/kernels.md#nothing-of-the-kind"]
    )

  def test_headings_that_occur_twice_have_numbers(self):
    self.assertEqual(anchors("# A b\n## A b\n"), {"a-b", "a-b-1"})


class NamesTest(absltest.TestCase):

  def test_files_that_are_named_are_there(self):
    for page in pages():
      for path in _PATH.findall(page.read_text()):
        self.assertTrue((_ROOT / path).exists(), f"{page}: {path}")

  def test_tests_that_are_named_are_there(self):
    sources = [path.read_text() for path in _ROOT.glob("tests/**/*_test.py")]
    for page in pages():
      for group, name in _TEST.findall(page.read_text()):
        is_there = any(
            f"class {group}(" in text and f" {name}(" in text
            for text in sources
        )
        self.assertTrue(is_there, f"{page}: {group}::{name}")


if __name__ == "__main__":
  absltest.main()
