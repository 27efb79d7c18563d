"""The page of a result in a real browser: search, sorting, the large view, keyboard, phone, size."""

import time

import numpy as np
import pytest
from browser import Browser, find_browser
from PIL import Image
from test_report import HOSTILE, make_rows, some_scores

from unlearn.report.contents import Report, Row, share_groups
from unlearn.report.page import index_entry, write_index, write_report

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="needs Chromium (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One browser for all tests here."""
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(autouse=True)
def forget(request):
    """Each test sees its own errors and requests alone."""
    if find_browser():
        started = request.getfixturevalue("browser")
        started.errors.clear()
        started.requests.clear()


@pytest.fixture(scope="module")
def report_page(tmp_path_factory):
    """A page of 300 images, of which number 2 has an attack for name and caption."""
    folder = tmp_path_factory.mktemp("page")
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    scores = np.sort(np.r_[some_scores(298), 30, 20])[::-1]
    rows = [
        Row(
            f"laion/{n:06d}",
            HOSTILE if n == 1 else f"{n}.png",
            HOSTILE if n == 1 else f"{'red' if n % 3 else 'blue'} house {n}",
            float(score),
            path=folder / "a.png",
            other_rank=300 - n,
            group=HOSTILE if n % 2 else "even",
        )
        for n, score in enumerate(scores)
    ]
    report = Report(
        HOSTILE,
        rows,
        folder / "a.png",
        HOSTILE,
        groups=share_groups(rows),
        comparison="similarity of pixels",
        command=HOSTILE,
    )
    return write_report(folder, report)


def cells(browser, column):
    """Texts of a column of the table."""
    return browser.run(
        f"[...document.querySelectorAll('#table tbody tr')].map(row => row.cells[{column}].textContent)"
    )


def enter(browser, text, field="search"):
    """Types a text into a field."""
    browser.run(f"document.getElementById('{field}').focus()")
    browser.run(f"document.getElementById('{field}').select()")
    browser.ask("Input.insertText", text=text)


def click(browser, selector):
    """Clicks what a selector finds, with the mouse."""
    x, y = browser.run(
        f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
        " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    for kind in "mousePressed", "mouseReleased":
        browser.ask(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1
        )


def is_clean(browser, path):
    """Whether nothing was complained of, no planted script ran, and nothing but the page was
    asked for."""
    asked = {url for url in browser.requests if not url.startswith("data:")}
    return (
        not browser.errors and browser.run("window.hit") is None and asked == {path.as_uri()}
    ), (browser.errors, asked)


def test_the_search_finds_words_of_names_and_captions(browser, report_page):
    browser.open(report_page)
    assert len(cells(browser, 0)) == 50
    enter(browser, "HOUSE blue")
    assert browser.run("document.getElementById('count').textContent") == "100 of 300 images"
    assert all("blue house" in caption for caption in cells(browser, 2))
    enter(browser, "onerror=window")
    assert cells(browser, 0) == ["2"] and "<img src=x" in cells(browser, 2)[0]
    enter(browser, "no such thing")
    assert cells(browser, 0) == []
    assert browser.run("document.getElementById('where').textContent") == "nothing found"
    clean, why = is_clean(browser, report_page)
    assert clean, why


def test_columns_sort_both_ways_and_say_so(browser, report_page):
    browser.open(report_page)
    click(browser, "[data-key=other]")
    assert [int(text) for text in cells(browser, 4)] == list(range(1, 51))
    click(browser, "[data-key=other]")
    assert cells(browser, 4)[0] == "300"
    sort = "document.querySelector('[data-key=other]').closest('th').getAttribute('aria-sort')"
    assert browser.run(sort) == "descending"
    click(browser, "[data-key=name]")
    names = [text for text in cells(browser, 3) if text[0].isdigit()]
    assert names[:3] == ["0.png", "2.png", "3.png"]  # numbers as numbers, 1.png is the attack
    click(browser, "#next")
    assert "page 2 of 6" in browser.run("document.getElementById('where').textContent")
    clean, why = is_clean(browser, report_page)
    assert clean, why


def test_a_group_is_chosen_from_a_list(browser, report_page):
    browser.open(report_page)
    names = browser.run("[...document.getElementById('group').options].map(o => o.textContent)")
    assert len(names) == 3 and "even" in names
    browser.run(
        f"(() => {{ const g = document.getElementById('group'); g.selectedIndex = {names.index('even')};"
        " g.dispatchEvent(new Event('change')); })()"
    )
    assert browser.run("document.getElementById('count').textContent") == "150 of 300 images"


def test_an_image_opens_large_beside_the_query_and_keys_lead_on(browser, report_page):
    browser.open(report_page)
    title = "document.getElementById('large-title').textContent"
    click(browser, "#image-2 .frame")
    assert browser.run("document.getElementById('large').open")
    assert browser.run(title) == "Number 2"
    assert browser.run("document.getElementById('large-caption').textContent").startswith(
        "</script>"
    )
    sizes = browser.run("[...document.querySelectorAll('#large img')].map(i => i.clientWidth)")
    assert len(sizes) == 2 and min(sizes) > 350
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.run(title) == "Number 4"
    browser.press("ArrowLeft")
    assert browser.run(title) == "Number 3"
    click(browser, "#close")
    assert not browser.run("document.getElementById('large').open")
    assert browser.run("document.activeElement.dataset.rank") == "2"  # the focus is back
    browser.run("document.querySelector('#image-5 .frame').focus()")
    browser.ask("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", text="\r")
    assert browser.run(title) == "Number 5" and browser.run("document.getElementById('large').open")
    clean, why = is_clean(browser, report_page)
    assert clean, why


def test_the_pages_policy_stops_a_script_and_a_connection_that_were_planted(browser, report_page):
    browser.open(report_page)
    browser.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hit=1>'"
        " + '<img src=\"http://127.0.0.1:9/x.png\">')"
    )
    browser.run(
        "{ const s = document.createElement('script'); s.text = 'window.hit = 1';"
        " document.body.append(s); }"
    )
    time.sleep(0.3)
    assert browser.run("window.hit") is None
    assert sum("Content Security Policy" in error for error in browser.errors) >= 3


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_sideways_scrolling(browser, report_page, dark):
    browser.open(report_page, 390, 844, dark=dark, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") <= 390
    click(browser, "#image-3 .frame")
    assert browser.run("document.getElementById('large').getBoundingClientRect().bottom") <= 844
    colour = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(21, 20, 18)") == dark


def test_without_javascript_the_cards_are_there_and_the_list_is_named(browser, report_page):
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(report_page)
        assert browser.run("document.querySelector('#image-1 img').clientWidth") > 100
        assert browser.run("document.getElementById('explorer').hidden")
        assert "influence.csv" in browser.run("document.getElementById('all').innerText")
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)


def test_ten_thousand_images_open_and_search_at_once(browser, tmp_path):
    rows = make_rows(some_scores(10_000))
    path = write_report(tmp_path, Report("many", rows))
    assert path.stat().st_size < 2_000_000
    assert browser.open(path) < 5
    took = browser.run(
        "(() => { const start = performance.now(); const field = document.getElementById('search');"
        " for (const text of ['c', 'caption 99', '']) { field.value = text; field.dispatchEvent(new Event('input')); }"
        " document.querySelector('[data-key=caption]').click(); return performance.now() - start; })()"
    )
    assert took < 2000  # four times; 0.1 seconds on an idle core
    clean, why = is_clean(browser, path)
    assert clean, why


def test_the_index_is_searched_and_leads_to_a_page(browser, tmp_path):
    entries = []
    for name in "one", HOSTILE:
        report = Report(name, make_rows(some_scores(50)), prompt=name)
        folder = tmp_path / str(len(entries))
        link = write_report(folder, report).relative_to(tmp_path).as_posix()
        entries.append(index_entry(link, report))
    path = write_index(tmp_path, entries)
    browser.open(path)
    enter(browser, "onerror", "find")
    shown = "[...document.querySelectorAll('.queries li')].filter(l => !l.hidden).length"
    assert browser.run(shown) == 1
    clean, why = is_clean(browser, path)
    assert clean, why
    click(browser, ".queries li:not([hidden]) a")
    time.sleep(0.5)
    assert browser.run("document.querySelectorAll('.card').length") == 50
    assert browser.run("window.hit") is None
