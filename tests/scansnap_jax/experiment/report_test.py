import base64
from html import parser
import pathlib
import re
import struct
import zlib

from absl.testing import absltest
from absl.testing import parameterized

from scansnap_jax.experiment import report

_VOID = frozenset({"meta", "img"})
_EVIL = """<script src="http://evil">alert('&')</script>"""


class _Page(parser.HTMLParser):
  """Tags, their attributes and the text between, if tags are balanced."""

  def __init__(self, html):
    super().__init__()
    self.tags, self.text, self._open = [], [], []
    self.feed(html)
    self.close()
    assert not self._open, self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in _VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag, tag

  def handle_data(self, data):
    self.text.append(data)

  def attributes(self, name):
    return [attrs[name] for _, attrs in self.tags if name in attrs]

  def find(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]


def _png(folder: pathlib.Path, name: str, width: int, height: int):
  chunk = lambda kind, data: (
      struct.pack(">I", len(data))
      + kind
      + data
      + struct.pack(">I", zlib.crc32(kind + data))
  )
  header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
  pixels = zlib.compress(b"\x00" * (width + 1) * height)
  path = folder / name
  path.write_bytes(
      b"\x89PNG\r\n\x1a\n"
      + chunk(b"IHDR", header)
      + chunk(b"IDAT", pixels)
      + chunk(b"IEND", b"")
  )
  return path


def _table(*rows, header=("name", "value")):
  return report.Table("caption", header, rows)


def _render_table(table):
  return report.render("t", {}, [report.Section("s", items=[table])])


class WideTableTest(absltest.TestCase):

  def _cells(self, num_columns, num_rows):
    header = [f"h{i}" for i in range(num_columns)]
    rows = [[10 * r + c for c in range(num_columns)] for r in range(num_rows)]
    page = _render_table(_table(*rows, header=header))
    lines = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r">(\w+)</t[hd]>", line) for line in lines]

  def test_of_many_columns_and_few_rows_becomes_one_of_many_rows(self):
    found = self._cells(13, 2)
    self.assertLen(found, 13)
    self.assertEqual(found[0], ["h0", "0", "10"])
    self.assertEqual(found[12], ["h12", "12", "22"])

  def test_others_stay_as_they_are(self):
    self.assertLen(self._cells(12, 2), 3)
    self.assertLen(self._cells(13, 13), 14)


class RenderTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self._folder = pathlib.Path(self.create_tempdir().full_path)

  def test_nothing_of_the_callers_text_becomes_markup(self):
    png = _png(self._folder, "a.png", 4, 2)
    page = _Page(
        report.render(
            _EVIL,
            {_EVIL: _EVIL},
            [
                report.Section(
                    _EVIL,
                    _EVIL,
                    [
                        report.Figure(_EVIL, png),
                        report.Table(_EVIL, [_EVIL], [[_EVIL]]),
                    ],
                ),
                report.Section("second"),
            ],
        )
    )
    self.assertEmpty(page.find("script"))
    # Title twice, fact twice, section twice, text, figure, table thrice.
    self.assertEqual("".join(page.text).count(_EVIL), 11)
    self.assertEqual(page.find("img")[0]["alt"], _EVIL)

  def test_browser_loads_nothing(self):
    png = _png(self._folder, "a.png", 4, 2)
    html = report.render(
        "title",
        {"command": "python"},
        [
            report.Section("one", items=[report.Figure("c", png)]),
            report.Section("two"),
        ],
    )
    page = _Page(html)
    for address in page.attributes("src") + page.attributes("href"):
      self.assertRegex(address, r"^(data:image/png;base64,|#section-\d+$)")
    self.assertNotIn("//", html.replace("//" * 2, ""))
    self.assertNotIn("url(", html)
    self.assertNotIn("@import", html)
    self.assertEmpty(page.find("link") + page.find("script"))
    (policy,) = [
        attrs["content"]
        for attrs in page.find("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    self.assertStartsWith(policy, "default-src 'none';")

  def test_holds_every_picture_in_order(self):
    paths = [_png(self._folder, f"{i}.png", 24 * i, 12) for i in (1, 2, 3)]
    figures = [report.Figure("c", path) for path in paths]
    page = _Page(
        report.render(
            "t",
            {},
            [
                report.Section("a", items=figures[:2]),
                report.Section("b", items=figures[2:]),
            ],
        )
    )
    embedded = [
        base64.b64decode(source.partition("base64,")[2], validate=True)
        for source in page.attributes("src")
    ]
    self.assertEqual(embedded, [path.read_bytes() for path in paths])
    # 2.4 pixels of the file to one of the page.
    sizes = [(img["width"], img["height"]) for img in page.find("img")]
    self.assertEqual(sizes, [("10", "5"), ("20", "5"), ("30", "5")])

  def test_picture_of_another_format_is_refused(self):
    path = self._folder / "a.png"
    path.write_bytes(b"%PDF-1.4")
    section = report.Section("s", items=[report.Figure("c", path)])
    with self.assertRaisesRegex(ValueError, "a.png"):
      report.render("t", {}, [section])

  def test_links_lead_to_the_sections(self):
    sections = [report.Section("first"), report.Section("second")]
    page = _Page(report.render("t", {}, sections))
    targets = [f"#{attrs['id']}" for attrs in page.find("section")]
    self.assertEqual(page.attributes("href"), targets)
    self.assertEmpty(_Page(report.render("t", {}, sections[:1])).find("nav"))

  def test_empty_lines_part_paragraphs(self):
    html = report.render("t", {}, [report.Section("s", "one\ntwo\n \n\nthree")])
    self.assertIn("<p>one\ntwo</p>\n<p>three</p>", html)

  def test_a_file_beside_the_report_is_linked_and_no_other_fact(self):
    facts = {"a": report.Link("page&1.html"), "b": "page.html"}
    page = _Page(report.render("t", facts, []))
    self.assertEqual(page.attributes("href"), ["page&1.html"])
    self.assertIn("page&1.html", page.text)

  def test_facts_keep_order_and_lines(self):
    html = report.render("t", {"b": "1\n2", "a": "lr_z n_i"}, [])
    self.assertIn("<dt>b</dt><dd>1\n2</dd>\n<dt>a</dt><dd>lr_z n_i</dd>", html)
    self.assertIn("white-space: pre-wrap", html)

  @parameterized.parameters(
      ("c_n", "c<sub>n</sub>"),
      ("c_{l|n}", "c<sub>l|n</sub>"),
      ("η_Y/η_Z = 1", "η<sub>Y</sub>/η<sub>Z</sub> = 1"),
      ("B_n(t_0)", "B<sub>n</sub>(t<sub>0</sub>)"),
      ("c_{<}", "c<sub>&lt;</sub>"),
      ("lr_z num_last x_12 a_b_c", "lr_z num_last x_12 a_b_c"),
  )
  def test_sets_indices_of_symbols_alone(self, text, expected):
    html = report.render("t", {}, [report.Section("s", text)])
    self.assertIn(f"<p>{expected}</p>", html)

  def test_a_name_of_the_users_is_shown_as_it_is(self):
    name = report.as_is("<a_1> & b_{2} ")
    html = report.render("t", {}, [report.Section(name, name)] * 2)
    shown = "&lt;a_1&gt; &amp; b_{2}"
    for tag in ("h2", "p", 'a href="#section-1"'):
      self.assertIn(f"<{tag}>{shown}", html)
    self.assertNotIn("\ue000", html)


class TableTest(parameterized.TestCase):

  @parameterized.parameters(
      (("1.97 ± 0.03", "–", ""), True),
      ((1, 2.5, -3e-5), True),
      (("12 %", "39 s", "−0.5"), True),
      (("1", "x"), False),
      (("1/2", "3/6"), False),
  )
  def test_columns_of_numbers_are_aligned(self, cells, expected):
    html = _render_table(_table(*(("row", cell) for cell in cells)))
    self.assertIs('<th class="number">value</th>' in html, expected)
    self.assertEqual(
        html.count('<td class="number">'), len(cells) if expected else 0
    )
    self.assertIn("<th>name</th>", html)

  def test_without_rows_it_is_its_header(self):
    page = _Page(_render_table(_table()))
    self.assertLen(page.find("th"), 2)
    self.assertEmpty(page.find("td"))

  def test_row_of_another_length_is_refused(self):
    with self.assertRaisesRegex(ValueError, "Expected 2 cells"):
      _table(("a", 1, 2))


if __name__ == "__main__":
  absltest.main()
