"""The explorer in a real browser: what it draws is what helix_spec says, setting by setting."""

import json
import re
from pathlib import Path
from urllib.parse import urlencode

import pytest

from helix_conformance.report.html import explore_page
from helix_spec.layouts import named_layout
from helix_spec.placement import owner
from suite_testing.explored import explored

CSS = "css selector"
HERE = Path(__file__).parent
DRAWN = """
history.replaceState(null, "", "#" + arguments[0]);
read();
const tokens = (page) => [...page.querySelectorAll(".token")].map((token) => [
  token.textContent, token.classList.contains("decoded"), token.classList.contains("moved")]);
const drawn = ["a", "b"].map((side) => {
  const section = document.querySelector(`#layout-${side}`);
  const text = (selector) => section.querySelector(selector)?.textContent ?? "";
  return {
    layout: text("code"), problem: text(".problem"), balance: text(".balance"),
    capacity: text(".capacity"), next: text(".next"),
    ranks: [...section.querySelectorAll(".rank")].map((rank) => ({
      held: rank.querySelector(".held").textContent,
      more: rank.querySelector(":scope > .quiet")?.textContent ?? "",
      pages: [...rank.querySelectorAll(".page")].map(tokens),
    })),
  };
});
return JSON.stringify([...drawn, document.querySelector("#difference").textContent]);
"""


@pytest.fixture
def explorer(opened, tmp_path):
    """Open the explorer, in a window of this width."""
    path = tmp_path / "explorer.html"
    path.write_text(explore_page(), encoding="utf-8")

    def open_page(**window):
        return opened(path, **window)

    return open_page


def hash_of(one, second="pr9757"):
    """The part of the address that holds a setting, `second` beside it."""
    layout = one.layout
    parts = {f"a{part}": getattr(layout, part) for part in ("prompt", "owner", "pages", "start")}
    sizes = {"C": layout.cp_size, "T": layout.tokens_per_block, "I": one.interleave}
    request = {"L": one.prompt_len, "steps": one.steps, "P": one.pool, "before": one.before}
    return urlencode(sizes | request | {"b": second} | parts)


def numbers(text):
    """The whole numbers in a text, with their commas."""
    return [int(found.replace(",", "")) for found in re.findall(r"\d[\d,]*", text)]


def positions_in(label):
    """The positions that a box's text names: `7`, `400-499`, `0-252 by 4`."""
    first, *rest = numbers(label)
    last, stride = (*rest, 1)[:2] if rest else (first, 1)
    return list(range(first, last + 1, stride))


def test_what_is_drawn_is_what_the_specification_says(explorer):
    """Tokens by rank and page, owners, balance, capacity and the difference, of 300 settings."""
    browser, illegal = explorer(), 0
    for one in explored(300, seed=27):
        answers, layout = one.answers(), one.layout
        first, second, difference = json.loads(browser.execute_script(DRAWN, hash_of(one)))
        assert first["layout"] == answers["text"]
        if not answers["legal"]:
            illegal += 1
            assert first["problem"] and first["ranks"] == []
            assert difference == "One of the layouts is not legal."
            continue
        assert first["problem"] == second["problem"] == ""
        total, t = one.prompt_len + one.steps, layout.tokens_per_block
        held = [len(positions) for positions in answers["positions"]]
        told = re.search(r"mean: ([\d.]+) \((\d+) tokens? / .*; spread (\d+)", first["balance"])
        largest, mean = max(held), total / layout.cp_size
        assert told.groups() == (f"{largest / mean:.2f}", str(largest), str(largest - min(held)))
        assert numbers(first["capacity"])[0] == answers["capacity"]
        assert numbers(first["next"]) == [answers["owners"][-1], total]

        for rank, row in enumerate(first["ranks"]):
            pages, positions = answers["pages"][rank], answers["positions"][rank]
            assert numbers(row["held"]) == [rank, held[rank], pages]
            assert len(row["pages"]) + sum(numbers(row["more"])) == pages
            assert len(row["pages"]) >= min(pages, 8)
            for number, page in enumerate(row["pages"]):
                shown = [(p, decoded) for text, decoded, _ in page for p in positions_in(text)]
                right = positions[number * t : (number + 1) * t]
                assert shown == [(p, p >= one.prompt_len) for p in right]

        other = named_layout("pr9757", cp_size=layout.cp_size, tokens_per_block=t)
        owners = [owner(other, one.prompt_len, p) for p in range(total)]
        moved = {p for p in range(total) if owners[p] != answers["owners"][p]}
        if moved:
            where = [min(moved), answers["owners"][min(moved)], owners[min(moved)]]
            assert numbers(difference) == [len(moved), total, *where]
        else:
            assert difference == "Both layouts put every token on the same rank."
        for rank, row in enumerate(second["ranks"]):
            for text, _, marked in (token for page in row["pages"] for token in page):
                for p in positions_in(text):
                    assert (owners[p], marked) == (rank, p in moved)
    assert 20 < illegal < 150


def test_fields_and_address_say_the_same(explorer):
    """A name sets the parts, a part changes the name, the slider moves the tokens."""
    from selenium.webdriver.common.keys import Keys

    browser = explorer()
    text = {
        side: lambda side=side: browser.find_element(CSS, f"#layout-{side} code").text
        for side in "ab"
    }
    browser.find_element(CSS, "[name=b]").send_keys("bal")
    assert text["b"]() == "balanced/1:C=4,T=100"
    browser.find_elements(CSS, "details > summary")[1].click()
    browser.find_element(CSS, "[name=bstart]").send_keys(Keys.ARROW_UP)
    custom = "custom/1:prompt=round_robin,owner=position,pages=lazy,start=rank_zero,C=4,T=100"
    assert text["b"]() == custom
    assert browser.find_element(CSS, "[name=b]").get_property("value") == "custom"
    assert not browser.find_element(CSS, "#before").is_displayed()
    slider = browser.find_element(CSS, "#slider")
    slider.send_keys(Keys.HOME)
    assert browser.find_elements(CSS, "#layout-a .decoded") == []
    assert "steps=0&" in browser.current_url
    browser.refresh()
    assert (text["a"](), text["b"]()) == ("before_9757/1:C=4,T=100", custom)
    assert browser.find_elements(CSS, "#layout-a .decoded") == []


def test_a_strange_address_is_brought_into_range(explorer):
    """Whatever a link holds, the fields stay inside their limits, and nothing of it is run."""
    browser = explorer()
    strange = "C=1e9&T=-3&L=0.5&a=%3Cb%3E&bowner=%3Cscript%3E&steps=5&toString=1"
    first, second, _ = json.loads(browser.execute_script(DRAWN, strange))
    assert (first["layout"], second["layout"]) == ("before_9757/1:C=64,T=1",) * 2
    assert numbers(first["next"]) == [63, 6]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1300])
def test_it_fits_and_can_be_read(explorer, width, dark):
    """It is no wider than its window, and text stands out, with many small pages, too."""
    browser = explorer(width=width, dark=dark)
    for settings in ("", "C=8&T=16&L=301&steps=90&a=pr17866&b=vllm_dcp", "C=3&T=64&I=8&b=vllm_dcp"):
        browser.execute_script(DRAWN, settings)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.execute_script((HERE / "contrast.js").read_text()) == []
