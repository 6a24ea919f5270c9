"""The pages in a real headless Chromium: no complaints, no requests, figures seen, wide tables scroll on a phone."""

from __future__ import annotations

import pytest

from fintx.analysis import comparison, study_analysis
from fintx.report import comparison_page, study_page
from tests.helpers import chromium
from tests.helpers.planted import return_study

pytestmark = pytest.mark.slow
WINDOWS = [(1280, False), (1280, True), (390, False), (390, True)]


@pytest.fixture(scope="module")
def browser(request, tmp_path_factory):
    if chromium.program() is None:
        assert not request.config.getoption("--require-chromium"), "there is no Chromium on this machine"
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with chromium.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tiny_study):
    return study_page.build(study_analysis.read(tiny_study, data_root=tiny_study.parents[1] / "data")).write()


@pytest.mark.parametrize(("width", "dark"), WINDOWS)
def test_it_loads_without_complaints_or_requests(browser, report, width, dark):
    browser.open(report, width=width, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == []
    assert browser.run("document.title").endswith("fintx")


@pytest.mark.parametrize(("width", "dark"), WINDOWS)
def test_figures_are_seen(browser, report, width, dark):
    browser.open(report, width=width, dark=dark)
    found = browser.run(
        "[...document.querySelectorAll('figure svg')].map(s => {const r = s.getBoundingClientRect();"
        " return [r.width, r.height, s.querySelectorAll('text').length]})"
    )
    assert len(found) == report.read_text().count("<figure>") >= 8
    assert all(w > 300 and h > 80 and texts > 3 for w, h, texts in found), found


@pytest.mark.parametrize("dark", [False, True])
def test_ink_stands_out_from_paper(browser, report, dark):
    """WCAG's contrast, of what the browser really paints: text, lines of figures, links."""
    browser.open(report, dark=dark)
    contrast = """(name) => {
      const rgb = c => { const e = document.createElement('i'); e.style.color = `var(${c})`; document.body.append(e);
        const m = getComputedStyle(e).color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255); e.remove(); return m };
      const l = c => rgb(c).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
      const [a, b] = [l(name), l('--paper')].sort((x, y) => y - x); return (a + .05) / (b + .05) }"""
    for name, least in (("--ink", 7), ("--muted", 4.5), ("--link", 4.5), ("--bad", 4.5), ("--good", 4.5),
                        ("--blue", 3), ("--vermillion", 3), ("--green", 3)):  # fmt: skip
        assert browser.run(f"({contrast})('{name}')") >= least, name
    label = "getComputedStyle(document.querySelector('figure svg text')).fill"
    assert browser.run(label) == browser.run("getComputedStyle(document.body).color")


def test_wide_tables_scroll_on_a_phone_and_the_page_does_not(browser, report):
    browser.open(report, width=390, height=844)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    wide = browser.run(
        "[...document.querySelectorAll('.wide')].filter(d => d.querySelector('table') && d.scrollWidth > d.clientWidth)"
        ".map(d => {d.scrollLeft = 1e6; return [getComputedStyle(d).overflowX, d.scrollLeft]})"
    )
    assert len(wide) >= 3
    assert all(how == "auto" and moved > 0 for how, moved in wide), wide


def test_it_prints_dark_on_white_and_within_the_sheet(browser, report):
    browser.open(report, width=794, dark=True, printing=True)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_same_page_without_its_folder_is_whole(browser, report, tmp_path):
    alone = tmp_path / "alone.html"
    alone.write_bytes(report.read_bytes())
    browser.open(alone)
    assert browser.complaints() == [] and browser.requests() == []
    assert browser.run("document.querySelectorAll('figure svg').length") >= 8


def test_anchors_lead_to_their_sections(browser, report):
    browser.open(report)
    missing = (
        "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.getAttribute('href'))).length"
    )
    assert browser.run(missing) == 0
    twice = "(ids => ids.length - new Set(ids).size)([...document.querySelectorAll('[id]')].map(e => e.id))"
    assert browser.run(twice) == 0


def test_a_comparison_loads_as_quietly(browser, tmp_path):
    folders = [
        return_study(tmp_path, "h1", label_hash="a" * 64),
        return_study(tmp_path, "h3", horizon=3, label_hash="b" * 64),
    ]
    target = comparison_page.build(comparison.read(folders), outputs=tmp_path).write()
    browser.open(target, width=390)
    assert browser.complaints() == [] and browser.requests() == []
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
