"""The page in a browser: what it shows, and what keys and clicks do.

Wants playwright (the extra `browser`) and a Chromium that is installed.
"""

import contextlib
import pathlib
import re
import shutil
import time
import warnings

from absl.testing import absltest
import numpy as np
import pytest

from joma.inference.explore import document
from joma.inference.explore import levels
from joma.inference.explore import view
from tests.joma.inference.explore import synthetic

_CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None
)
pytestmark = [pytest.mark.browser, pytest.mark.slow]
# Numbers have three digits.
_ROUNDED = 0.006
# A frame of a machine that does nothing else; see the module's last test.
_FRAME_MS = 100


@contextlib.contextmanager
def _opened(path, **options):
  """Yields a page in Chromium, and what it told the console or asked for."""
  if _CHROMIUM is None:
    pytest.skip("no Chromium is installed")
  api = pytest.importorskip(
      "playwright.sync_api", reason="playwright is not installed"
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    with api.sync_playwright() as driver:
      browser = driver.chromium.launch(
          executable_path=_CHROMIUM, args=["--no-sandbox"]
      )
      size = {"width": 1300, "height": 900}
      page = browser.new_page(viewport=size, **options)
      told = []
      page.on("console", lambda message: told.append(message.text))
      page.on("pageerror", lambda error: told.append(str(error)))
      page.on("request", lambda request: told.append(request.url))
      page.goto(f"file://{path}")
      _wait(page)
      yield page, told
      browser.close()


def _num_frames(page):
  return page.evaluate("performance.getEntriesByName('frame').length")


def _wait(page, before=0, wall_s=60):
  """Until a frame has been drawn since `before`."""
  end = time.monotonic() + wall_s
  while _num_frames(page) <= before:
    assert time.monotonic() < end, "no frame was drawn"
    time.sleep(0.02)


def _do(page, act):
  before = _num_frames(page)
  act()
  _wait(page, before)


def _busy_ms(session):
  """What the page's thread has computed, whatever else the machine does."""
  metrics = session.send("Performance.getMetrics")["metrics"]
  found = {metric["name"]: metric["value"] for metric in metrics}
  return 1000 * found["TaskDuration"]


def _rows(page):
  """The table of keys, a list of texts a row."""
  return page.evaluate(
      "[...document.querySelectorAll('#table-body tr')].map("
      "row => [...row.cells].map(cell => cell.textContent))"
  )


def _states(page, column):
  """Class names of all tokens in sight, by position."""
  return page.evaluate(
      """column => {
        const box = document.querySelectorAll('.tokens')[column];
        const area = box.getBoundingClientRect();
        const found = {};
        for (const span of box.querySelectorAll('.t')) {
          const at = span.getBoundingClientRect();
          if (at.top > area.top && at.bottom < area.bottom)
            found[span.dataset.s] = [...span.classList];
        }
        return found;
      }""",
      column,
  )


def _weight(text):
  return float(text.removesuffix(" %")) / 100


class PageTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir().full_path)
    self.found, self.maps = synthetic.make(2, 4, 2, 60, seed=3)

  def _written(self):
    path = self.root / "page.html"
    path.write_text(document.render(self.found, {"text": "<b>"}))
    return path

  def _check_numbers(self, page, layer, head, step):
    """What the page says of a query is what the arrays say."""
    row, rows = self.maps[layer, head, step], _rows(page)
    order = np.argsort(-row, kind="stable")[: len(rows)]
    self.assertLen(rows, min(12, int((row >= levels.LEAST).sum())))
    for cells, expected in zip(rows, row[order], strict=True):
      place = int(cells[1])
      shown = _weight(cells[2])
      self.assertAlmostEqual(
          shown / row[place], 1, delta=levels.ERROR + _ROUNDED
      )
      # Near ones may change places.
      self.assertAlmostEqual(row[place] / expected, 1, delta=2 * levels.ERROR)
      for policy, text in zip(self.found.policies, cells[4:], strict=True):
        left = policy.left_at[layer, head // 2, place]
        self.assertEqual(text.startswith("kept"), left > step, text)
        if left < 60:
          self.assertIn(str(left) if left != step else "now", text)
    for column, policy in enumerate(self.found.policies, start=1):
      kept = policy.is_kept(layer, head // 2, step)
      seen = _states(page, column)
      self.assertGreater(len(seen), 20)
      for place, names in seen.items():
        self.assertEqual(
            "gone" in names, not kept[int(place)] and int(place) <= step
        )
        self.assertEqual("later" in names, int(place) > step)
      said = page.locator(".column-of p").nth(column).text_content()
      share = self.found.attention.shares[column - 1, layer, head, step]
      self.assertIn(f"Keeps {kept.sum()} of {step + 1} tokens", said)
      percent = int(re.search(r"with (\d+) % of", said)[1])
      self.assertAlmostEqual(percent, 100 * share, delta=0.75)
    marks = _states(page, 0)
    sinks = self.found.attention.sinks()[layer, head]
    heavy = self.found.attention.heavy()[layer, head]
    for place, names in marks.items():
      self.assertEqual("sink" in names, sinks[int(place)])
      self.assertEqual("heavy" in names, heavy[int(place)])

  def test_numbers_are_the_arrays_after_clicks_slider_and_keys(self):
    with _opened(self._written()) as (page, told):
      self._check_numbers(page, 0, 0, 59)
      _do(page, lambda: page.select_option("#layer", "1"))
      _do(page, lambda: page.select_option("#head", "3"))
      _do(page, lambda: page.fill("#step", "41"))
      self._check_numbers(page, 1, 3, 41)
      said = page.get_attribute("#step", "aria-valuetext")
      self.assertRegex(said, r"^41 of 59, .* \(text, decode step 42\)$")
      page.focus("#step")
      _do(page, lambda: page.keyboard.press("ArrowLeft"))
      self._check_numbers(page, 1, 3, 40)
      _do(page, lambda: page.keyboard.press("["))
      _do(page, lambda: page.keyboard.press("{"))
      _do(page, lambda: page.keyboard.press("."))
      self._check_numbers(page, 0, 2, 41)
      _do(page, lambda: page.locator("#token-30").click())
      self._check_numbers(page, 0, 2, 30)
      area = page.locator(".map").first
      box = area.bounding_box()
      place = {"x": 0.2584 * box["width"], "y": 0.509 * box["height"]}
      _do(page, lambda: area.click(position=place))
      self._check_numbers(page, 0, 2, 30)
      self.assertEqual(
          page.get_attribute(".tokens", "aria-activedescendant"), "token-15"
      )
      self.assertEqual(told, [f"file://{self.root}/page.html"])

  def test_the_text_is_read_by_keys(self):
    with _opened(self._written()) as (page, told):
      _do(page, lambda: page.fill("#step", "50"))
      tokens = page.locator(".tokens").first
      tokens.focus()
      for key in ("Home", "ArrowRight", "ArrowRight"):
        _do(page, lambda key=key: page.keyboard.press(key))
      self.assertEqual(tokens.get_attribute("aria-activedescendant"), "token-2")
      label = page.get_attribute("#token-2", "aria-label")
      weight = self.maps[0, 0, 50, 2]
      if weight >= levels.LEAST:
        found = re.search(r"; ([\d.]+ %) of the attention of query 50", label)
        self.assertAlmostEqual(
            _weight(found[1]) / weight, 1, delta=levels.ERROR + _ROUNDED
        )
      left = self.found.policies[0].left_at[0, 0, 2]
      self.assertIn(f"H2O: left at {left}" if left < 50 else "kept", label)
      _do(page, lambda: page.keyboard.press("Enter"))
      self._check_numbers(page, 0, 0, 2)
      self.assertEqual(page.get_attribute("#token-2", "aria-selected"), "true")
      time.sleep(0.7)
      self.assertRegex(page.text_content("#live"), "^Query 2, .* attends to")
      self.assertLen(told, 1)

  def test_heads_in_every_order(self):
    with _opened(self._written()) as (page, told):
      attention = self.found.attention
      lost = 1 - self.found.mean_shares()
      for order, values in (
          (1, attention.entropy),
          (2, -attention.entropy),
          (3, -attention.sink_mass),
          (4, -attention.induction),
          (5, -lost[0]),
          (6, -lost[1]),
      ):
        page.select_option("#order", str(order))
        shown = page.evaluate(
            "[...document.querySelectorAll('#heads button')].map("
            "button => Number(button.dataset.index))"
        )
        ordered = values.ravel()[shown]
        self.assertTrue((np.diff(ordered) >= -1e-3).all(), order)
      first, second = (divmod(i, 4) for i in shown[:2])
      _do(page, lambda: page.locator("#heads button").first.click())
      self._check_numbers(page, *first, 59)
      _do(page, lambda: page.keyboard.press("ArrowRight"))
      self._check_numbers(page, *second, 59)
      checked = page.locator("#heads [aria-checked=true]")
      self.assertEqual(checked.count(), 1)
      entropy = attention.entropy[second]
      self.assertIn(
          f"layer {second[0]}, head {second[1]}: entropy {entropy:.2f} nats",
          checked.get_attribute("aria-label"),
      )
      self.assertLen(told, 1)

  def test_steps_play_colours_change_and_a_link_opens_a_place(self):
    with _opened(self._written(), color_scheme="dark") as (page, told):
      _do(page, lambda: page.fill("#step", "3"))
      page.click("#play")
      self.assertEqual(page.get_attribute("#play", "aria-pressed"), "true")
      time.sleep(1)
      page.click("#play")
      self.assertGreater(int(page.input_value("#step")), 3)
      ink = "getComputedStyle(document.body).color"
      self.assertEqual(page.evaluate(ink), "rgb(230, 233, 237)")
      page.click("#theme")
      self.assertEqual(page.evaluate(ink), "rgb(27, 31, 36)")
      page.click("#theme")
      self.assertEqual(page.evaluate(ink), "rgb(230, 233, 237)")
      _do(
          page,
          lambda: page.evaluate("location.hash = '#layer=1&head=2&step=33'"),
      )
      self._check_numbers(page, 1, 2, 33)
      self.assertNotIn("error", " ".join(told).lower())

  def test_a_notebook_shows_the_page_in_a_frame(self):
    page = view.of_recording(self.found)
    path = self.root / "page.html"
    path.write_text(f"<!DOCTYPE html><body>{page._repr_html_()}")
    if _CHROMIUM is None:
      self.skipTest("no Chromium is installed")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
      browser = driver.chromium.launch(
          executable_path=_CHROMIUM, args=["--no-sandbox"]
      )
      page, told = browser.new_page(), []
      page.on("console", lambda message: told.append(message.text))
      page.goto(f"file://{path}")
      frame = page.frame_locator("iframe")
      frame.locator("#table-body tr").first.wait_for(timeout=60_000)
      self.assertIn("Query 59", frame.locator("#said").text_content())
      self.assertEqual(told, [])
      browser.close()

  def test_two_thousand_tokens_of_thirty_layers_and_nine_heads(self):
    found, _ = synthetic.make(30, 9, 3, 2000, 31, num_distinct=9)
    path = self.root / "large.html"
    path.write_text(document.render(found, {}))
    size = path.stat().st_size / 1e6
    self.assertLess(size, 20)
    with _opened(path) as (page, told):
      session = page.context.new_cdp_session(page)
      session.send("Performance.enable", {"timeDomain": "threadTicks"})
      before = _busy_ms(session)
      for step in range(200, 2000, 90):
        _do(page, lambda step=step: page.fill("#step", str(step)))
      for head in range(1, 9):
        _do(page, lambda head=head: page.select_option("#head", str(head)))
      busy = (_busy_ms(session) - before) / 28
      frames = page.evaluate(
          "performance.getEntriesByName('frame').map(frame => frame.duration)"
      )
      self.assertLen(told, 1)
    steps, heads = np.split(np.array(frames[1:]), [20])
    said = lambda ms: f"median {np.median(ms):.0f} ms, least {ms.min():.0f} ms"
    print(
        f"{size:.1f} MB; a step: {said(steps)}; a head: {said(heads)}; the"
        f" page's thread computes {busy:.0f} ms a frame"
    )
    self.assertLess(busy, _FRAME_MS)
    # Others may be at work here: the least is what the page itself takes.
    self.assertLess(steps.min(), _FRAME_MS)
    self.assertLess(heads.min(), _FRAME_MS)


if __name__ == "__main__":
  absltest.main()
