"""The pages in a real browser: headless Chromium of Debian, through its own chromedriver.

`make test-browser` runs this; it is no part of `make test`. Nothing is downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_conformance.report.html import show_page
from helix_spec.config import Config, ModelShape
from helix_spec.events import Admit, Decode, Fork
from helix_spec.trace import Trace
from suite_testing.picture import seed_example

if TYPE_CHECKING:
    from selenium.webdriver.remote.webdriver import WebDriver
    from selenium.webdriver.remote.webelement import WebElement

CSS = "css selector"
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """The page of a run of the README's engine, which is wrong on both layouts."""
    folder = tmp_path_factory.mktemp("run")
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (HERE.parent / "README.md").read_text(), re.M | re.S
    )
    (folder / "last_rank.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        words = "run --engine last_rank:LastRank --layout pr9757 --layout vllm_dcp --json run.jsonl"
        assert CliRunner().invoke(main, words.split()).exit_code == 1
        made = CliRunner().invoke(main, ["report", "run.jsonl", "--html", "run.html"])
        assert made.exit_code == 1, made.output  # as the run's
    return folder / "run.html"


def shown(browser: WebDriver, selector: str) -> list[WebElement]:
    """The elements that can be seen."""
    return [e for e in browser.find_elements(CSS, selector) if e.is_displayed()]


def page_of(folder: Path, trace: Trace) -> Path:
    """The page of a trace."""
    (folder / "trace.html").write_text(show_page(trace, "trace.json"), encoding="utf-8")
    return folder / "trace.html"


def test_a_failing_report_is_clicked_through(browser, opened, failing):
    """Verdicts, the failing event, the marks on it, and the second failure behind its summary."""
    opened(failing)
    assert "fail: a difference was found" in browser.find_element(CSS, "#verdict").text
    assert "Only 2 of 7 layouts" in browser.find_element(CSS, "#partial").text
    assert "fails here" in shown(browser, ".diagram .now")[0].text
    wrong = "#failure-1 .diagram .scroll .wrong"
    marks = shown(browser, wrong)
    assert len(marks) >= 2
    labels = {mark.find_element(CSS, "title").get_attribute("textContent") for mark in marks}
    assert any("claims position" in label for label in labels), labels

    shown(browser, "#failure-1 [data-step='-1']")[0].click()
    assert "admit" in shown(browser, "#failure-1 .now")[0].text
    assert shown(browser, wrong) == []
    shown(browser, "#failure-1 .controls [data-to]")[0].click()
    assert len(shown(browser, wrong)) == len(marks)

    assert shown(browser, "#failure-2 .diagram") == []
    browser.find_element(CSS, "#failure-2 > summary").click()
    assert len(shown(browser, "#failure-2 .diagram")) == 1
    shown(browser, "#failure-2 .events button")[0].click()
    assert shown(browser, "#failure-2 .now")[0].text == "before the first event"
    assert shown(browser, "#failure-2 .scroll .token") == []


def test_the_slider_moves_by_keyboard(browser, opened, tmp_path):
    """Arrow keys, Home and End move it; what it shows is also said in words."""
    from selenium.webdriver.common.keys import Keys

    opened(page_of(tmp_path, seed_example()[2][1]))
    slider = browser.find_element(CSS, "input[type=range]")
    tokens = ".diagram .scroll .token"
    assert {e.text for e in shown(browser, f"{tokens} text")} >= {"0\u201399", "400\u2013499"}
    slider.send_keys(Keys.HOME)
    assert shown(browser, tokens) == []
    slider.send_keys(Keys.ARROW_RIGHT)
    assert len(shown(browser, tokens)) == 4
    assert slider.get_attribute("aria-valuetext") == "event 0 admit id=0 prompt_len=400"
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert len(shown(browser, tokens)) == 5
    current = browser.find_elements(CSS, ".events [aria-current=step]")
    assert [" ".join(e.text.split()) for e in current] == ["2 decode ids=[0] query_lens=[1]"]
    slider.send_keys(Keys.END)
    assert len(shown(browser, tokens)) == 8


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1100])
def test_pages_fit_and_can_be_read(browser, opened, failing, tmp_path, dark, width):
    """No page is wider than its window, and text stands out from what is behind it."""
    config = Config(
        layout="vllm_dcp/1:C=8,T=8,I=2",
        pages=[20] * 8,
        max_len=500,
        model=ModelShape(q_heads=16),
    )
    trace = Trace(config=config, events=[Admit(0, 130), Fork(0, 1), Decode([0, 1], [5, 1])])
    for path in (failing, page_of(tmp_path, trace)):
        opened(path, dark=dark, width=width)
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        assert browser.execute_script((HERE / "contrast.js").read_text()) == []


def test_expected_and_observed_can_be_seen_on_a_phone(browser, opened, failing):
    """At 400 pixels both are inside the window, each behind its name."""
    opened(failing, width=400)
    for cell in shown(browser, "#failure-1 .found td.values"):
        assert cell.rect["x"] >= 0 and cell.rect["x"] + cell.rect["width"] <= 400
    labels = [cell.get_attribute("data-label") for cell in shown(browser, ".found td.values")]
    assert labels[:2] == ["expected", "observed"]


def test_the_replay_command_is_copied(browser, opened, failing):
    """The button says so, and the clipboard holds the whole command."""
    opened(failing)
    origin = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.execute_cdp_cmd("Browser.grantPermissions", origin)
    button = shown(browser, "#failure-1 [data-copy]")[0]
    button.click()
    command = browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert command.startswith("helix-conformance replay ")
    assert command == browser.find_element(CSS, "#failure-1 [data-copy]").find_element(
        "xpath", "preceding-sibling::code"
    ).get_attribute("textContent")
    assert button.text == "Copied"
