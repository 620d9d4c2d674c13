"""The documentation site in a real browser, opened from its folder without a server.

`make test-browser` builds it first; `make docs` alone does, too.
"""

import re
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

SITE = Path(__file__).parents[2] / "build/site"
CSS = "css selector"
PAGES = sorted(SITE.rglob("*.html"))
WIDE = [
    "index.html",
    "spec/helix_spec/SPEC.html",
    "docs/INVARIANTS.html",
    "docs/reference/helix_spec.html",
    "docs/explanation/pictures.html",
    "docs/explanation/explorer.html",
    "conformance/IMPLEMENTING.html",
]
pytestmark = pytest.mark.skipif(not PAGES, reason="the site is not built: make docs")


class Page(HTMLParser):
    """The links, the anchors and the loaded files of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.loaded = [], {""}, []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        """Take in one element."""
        given = dict(attrs)
        self.anchors |= {given.get("id"), given.get("name")}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("img", "script", "iframe") and "src" in given:
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def pages():
    """All pages of the site, by path."""
    return {path: Page(path) for path in PAGES}


def test_no_link_is_dead(pages):
    """Every link inside the site leads to a file, and to an anchor that is there."""
    dead, followed = [], 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            place, anchor = urldefrag(link)
            if re.match(r"[a-z]+:", place):
                continue
            target = (path.parent / unquote(place)).resolve() if place else path
            followed += 1
            if "=" in anchor:  # settings of the explorer
                anchor = ""
            if not target.is_file() or (
                target in pages and unquote(anchor) not in pages[target].anchors
            ):
                dead.append((path.relative_to(SITE).as_posix(), link))
    assert followed > 1000
    assert dead == []


def test_nothing_is_loaded_from_elsewhere(pages):
    """Every script, style and picture of a page lies in the folder."""
    assert [(path, src) for path, page in pages.items() for src in page.loaded if "//" in src] == []


def test_every_number_of_the_specification_has_an_anchor(pages):
    """Sections and invariants of SPEC.md can be linked to by their number."""
    from helix_spec.invariants import NUMBERS

    anchors = pages[SITE / "spec/helix_spec/SPEC.html"].anchors
    sections = {"1", "3.6", "4.1", "9", "10.4", "11.11"}
    assert {*NUMBERS, *sections} - anchors == set()


def test_search_works_from_the_folder(opened):
    """Typing finds a page, without a server."""
    browser = opened(SITE / "index.html")
    field = browser.find_element(CSS, "input[data-md-component=search-query]")
    browser.execute_script("arguments[0].focus()", field)
    field.send_keys("log-sum-exp")
    until = time.monotonic() + 30
    while not (found := browser.find_elements(CSS, ".md-search-result__link")):
        assert time.monotonic() < until, "the search has found nothing"
        time.sleep(0.1)
    assert any("SPEC.html" in link.get_attribute("href") for link in found)


@pytest.mark.parametrize(("dark", "scheme"), [(False, "default"), (True, "slate")])
def test_the_site_is_dark_where_the_system_is(opened, dark, scheme):
    """The palette is that of the system."""
    body = opened(SITE / "index.html", dark=dark).find_element(CSS, "body")
    assert body.get_attribute("data-md-color-scheme") == scheme


@pytest.mark.parametrize("width", [400, 1300])
@pytest.mark.parametrize("page", WIDE)
def test_pages_fit_their_window(opened, page, width):
    """No page is wider than a phone: what is wide scrolls inside it."""
    browser = opened(SITE / page, width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_explorer_stands_in_the_site(opened):
    """Its frame is as high as it needs, follows the palette that is chosen, and takes links."""
    browser = opened(SITE / "docs/explanation/explorer.html", width=1300)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    until = time.monotonic() + 30

    def inside(script):
        browser.switch_to.frame("explorer")
        try:
            return browser.execute_script(f"return {script}")
        finally:
            browser.switch_to.default_content()

    link = browser.find_element(CSS, "a[target=explorer]")
    link.click()
    needed = 'document.querySelector("#layout-b code").textContent'
    while inside(needed) != "pr9757/1:C=4,T=100" or not inside(
        "innerHeight >= document.documentElement.offsetHeight"
    ):
        assert time.monotonic() < until, inside(needed)
        time.sleep(0.1)
    dark = 'matchMedia("(prefers-color-scheme: dark)").matches'
    for scheme in ("slate", "default"):
        set_to = "document.body.setAttribute('data-md-color-scheme', arguments[0])"
        browser.execute_script(set_to, scheme)
        while inside(dark) != (scheme == "slate"):
            assert time.monotonic() < until, scheme
            time.sleep(0.1)
