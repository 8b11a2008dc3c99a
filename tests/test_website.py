"The site: every notebook and module is on it, no link is broken, it searches from disk, and it fits desktop and phone."

import re

import nbformat
import pytest
from bs4 import BeautifulSoup
from conftest import horizontal_overflow
from test_circuit_page import wait_for
from spectral_nb.base.sources import modules
from spectral_nb.dev.house import declared_all, notebooks
from spectral_nb.dev.site_pages import math_to_mathml, notebook_page
from spectral_nb.dev.website import PageLinks, broken_links, build_site

PAGES = [
    "index.html",
    "10_norm_growth.html",
    "11_sparse_attention.html",
    "12_svt.html",
    "13_pr_fingerprint.html",
    "14_cross_architecture.html",
    "15_which_signal.html",
    "attention/omega.html",
    "base/index.html",
    "views/circuits.html",
    "views/attention.html",
    "api/attention.omega.html",
    "api/prompts.tasks.html",
]


@pytest.fixture(scope="module")
def drawn():
    "Notebooks with a figure, as they were when the site was built."
    return [
        name
        for name, p in notebooks().items()
        if any(o.get("data", {}).get("image/png") for c in nbformat.read(p, 4).cells for o in c.get("outputs", []))
    ]


@pytest.fixture(scope="module")
def site(drawn, tmp_path_factory):
    return build_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def pages(site):
    "{page: its HTML}"
    return {p.relative_to(site).as_posix(): p.read_text() for p in site.rglob("*.html")}


@pytest.fixture(scope="module")
def articles(pages):
    "{page: its article}, without the menu around it."
    found = {name: re.search(r"<article.*</article>", html, re.S) for name, html in pages.items()}
    return {name: BeautifulSoup(m[0], "html.parser") for name, m in found.items() if m}


def test_every_notebook_and_module_has_a_page(pages, articles):
    public = {f"api/{m}.html" for m, file in modules().items() if declared_all(file)}
    assert len(public) > 20
    assert {f"{name}.html" for name in notebooks()} | public <= set(articles)
    assert set(pages) == set(articles)


def test_the_pages_looked_at_exist(pages):
    assert set(PAGES) <= set(pages)


def test_no_link_is_broken(site):
    assert broken_links(site) == []


def test_nothing_is_fetched_from_elsewhere(pages):
    for name, html in pages.items():
        fetched = [
            a for a, tag in PageLinks(html).addresses.items() if tag in ("script", "img", "iframe", "stylesheet")
        ]
        assert fetched and not [a for a in fetched if re.match(r"(https?:)?//", a)], name


def test_pages_read_well(articles):
    for name, article in articles.items():
        assert article.find("h1") and article.find("h1").get_text(strip=True) not in ("", "Untitled"), name
        for code in article.find_all("pre"):
            if name.startswith("api/"):
                assert not re.search(r" at 0x[0-9a-f]{6,}", code.get_text()), name
            assert not re.search(r"^#\s*\|", code.get_text(), re.M), f"{name} shows a directive"
        assert not [i for i in article.find_all("img") if i["src"].startswith("data:")], f"{name} embeds a figure"
        lone = [
            m
            for m in article.find_all("math")
            if m["display"] == "inline" and not m.find_parent(["p", "li", "td", "th", "h1", "h2", "h3"])
        ]
        assert not lone, f"{name}: {len(lone)} formulas break their sentence"
        prose = "".join(t for t in article.find_all(string=True) if not t.find_parent(["pre", "code", "math"]))
        assert not re.search(r"\$[^$\n]*\\[a-z]+[^$\n]*\$", prose), f"{name} shows raw LaTeX"


def test_figures_are_files_with_sizes(articles, site, drawn):
    images = [(name, i["src"]) for name, article in articles.items() for i in article.find_all("img")]
    for name, src in images:
        assert ((site / name).parent / src).stat().st_size > 500
    assert {f"{name}.html" for name in drawn} - {"index.html"} <= {name for name, _ in images}


def test_search_works_from_disk(site, open_page):
    b = open_page(site / "index.html")
    box = b.find_element("css selector", ".md-search__input")
    box.click()  # which loads the index; what is typed before it is there cannot be a query yet
    wait_for(lambda: "Initializing" not in b.find_element("css selector", ".md-search-result__meta").text, 60)
    box.send_keys("participation ratio")
    links = wait_for(
        lambda: [a.get_attribute("href") for a in b.find_elements("css selector", ".md-search-result__link")], 20
    )
    assert any("participation" in a or "spectra" in a for a in links[:6])
    assert b.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_the_window(site, open_page, width):
    wrong = {}
    for page in PAGES:
        b = open_page(site / page, width, 850)
        if found := [f for f in horizontal_overflow(b)]:
            wrong[page] = found[:3]
        if errors := b.get_log("browser"):
            wrong[page] = errors
    assert not wrong


def test_code_is_not_taken_for_a_formula():
    assert math_to_mathml("it costs $3 and $4") == "it costs $3 and $4"
    assert math_to_mathml("`$a$` and ```\n$b$\n```") == "`$a$` and ```\n$b$\n```"
    made = math_to_mathml(r"so $a_1 * b^*$ and $$\sum_k u_k * v_k^*$$")
    assert made.count("<math") == 2 and 'class="formula"' in made and "*" not in made


def test_a_notebook_without_outputs_or_title_still_builds(tmp_path):
    nb = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("text, [other](../base/paths.ipynb)"),
            nbformat.v4.new_code_cell("#| export\nx = 1"),
            nbformat.v4.new_code_cell("#| hide\nsecret = 2"),
            nbformat.v4.new_code_cell(
                "#| echo: false\nonly_shown = 3", outputs=[nbformat.v4.new_output("stream", text="shown")]
            ),
        ]
    )
    nbformat.write(nb, tmp_path / "01_x.ipynb")
    assert notebook_page(tmp_path / "01_x.ipynb", "a/x", tmp_path) == "Untitled"
    text = (tmp_path / "a" / "x.md").read_text()
    assert "(../base/paths.md)" in text and "x = 1" in text and "#|" not in text and "secret" not in text
    assert "only_shown" not in text and "shown" in text


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#x">b</a><a href="b.html#y">b</a><img src="c.png"><a href="https://example.org">out</a>'
    )
    (tmp_path / "b.html").write_text('<p id="x"></p>')
    assert broken_links(tmp_path) == ["a.html: b.html#y", "a.html: c.png"]
