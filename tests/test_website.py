"The site: every notebook and module is on it, no link is broken, it searches from disk, and it fits desktop and phone."

import re
from collections import Counter
from functools import cache
from html.parser import HTMLParser

import nbformat
import pytest
from conftest import accessibility_faults, horizontal_overflow
from test_circuit_page import wait_for
from spectral_nb.base.sources import modules
from spectral_nb.dev import website
from spectral_nb.dev.house import declared_all, notebooks
from spectral_nb.dev.site_pages import figure_text, math_to_mathml, notebook_page
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


VOID = set("area base br col embed hr img input link meta param source track wbr".split())
LINES = {"p", "li", "td", "th", "h1", "h2", "h3"}  # what a formula may stand in
page_links = cache(PageLinks)  # two tests read the links of every page


class Article(HTMLParser):
    "What a reader finds in an article: its title, blocks of code, images, formulas outside a sentence, prose."

    def __init__(self, html: str):
        super().__init__()
        self.inside, self.title, self.code, self.images, self.lone, self.prose = Counter(), "", [], [], 0, []
        self.titled, self.alts, self.folded, self.parts = False, [], [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        if tag == "img":
            self.images.append(given["src"])
            self.alts.append(given.get("alt", ""))
            self.parts.append(f"img {given['src']}")
        if tag == "math" and given["display"] == "inline":
            self.lone += not any(self.inside[t] for t in LINES)
        if tag == "pre":
            self.code.append("")
            self.folded.append(self.inside["details"] > 0)
        if tag in ("pre", "h2", "h3"):
            self.parts.append(tag)
        if tag not in VOID:
            self.inside[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        self.inside[tag] -= self.inside[tag] > 0
        self.titled |= tag == "h1"

    def handle_data(self, text: str) -> None:
        if self.inside["h1"] and not self.titled:
            self.title += text
        if self.inside["pre"]:
            self.code[-1] += text
        elif not (self.inside["code"] or self.inside["math"]):
            self.prose.append(text)


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
    return {name: Article(m[0]) for name, m in found.items() if m}


def test_every_notebook_and_module_has_a_page(pages, articles):
    public = {f"api/{m}.html" for m, file in modules().items() if declared_all(file)}
    assert len(public) > 20
    assert {f"{name}.html" for name in notebooks()} | public <= set(articles)
    assert set(pages) == set(articles)


def test_the_pages_looked_at_exist(pages):
    assert set(PAGES) <= set(pages)


def test_no_link_is_broken(site, monkeypatch):
    monkeypatch.setattr(website, "PageLinks", page_links)
    assert broken_links(site) == []


def test_nothing_is_fetched_from_elsewhere(pages):
    for name, html in pages.items():
        fetched = [
            a for a, tag in page_links(html).addresses.items() if tag in ("script", "img", "iframe", "stylesheet")
        ]
        assert fetched and not [a for a in fetched if re.match(r"(https?:)?//", a)], name


def test_pages_read_well(articles):
    for name, article in articles.items():
        assert article.title.strip() not in ("", "Untitled"), name
        for code in article.code:
            if name.startswith("api/"):
                assert not re.search(r" at 0x[0-9a-f]{6,}", code), name
            assert not re.search(r"^#\s*\|", code, re.M), f"{name} shows a directive"
        assert not [src for src in article.images if src.startswith("data:")], f"{name} embeds a figure"
        assert not article.lone, f"{name}: {article.lone} formulas break their sentence"
        assert not re.search(r"\$[^$\n]*\\[a-z]+[^$\n]*\$", "".join(article.prose)), f"{name} shows raw LaTeX"


def test_the_reader_of_articles_sees_each_fault():
    "Of a page that has them all, as of one that has none."
    good = Article('<article><h1>A <code>b</code></h1><p>so <math display="inline">x</math><br></p></article>')
    assert (good.title, good.code, good.images, good.lone) == ("A b", [], [], 0) and "".join(good.prose) == "A so "
    bad = Article(
        '<article><pre><span>#| export</span></pre><img src="data:x"><p>$\\frac a$</p><math display="inline">x</math>'
    )
    assert (bad.title, bad.code, bad.images, bad.lone) == ("", ["#| export"], ["data:x"], 1)
    assert "".join(bad.prose) == "$\\frac a$"


def test_figures_are_files_with_sizes(articles, site, drawn):
    images = [(name, src) for name, article in articles.items() for src in article.images]
    for name, src in images:
        assert ((site / name).parent / src).stat().st_size > 500
    assert {f"{name}.html" for name in drawn} - {"index.html"} <= {name for name, _ in images}


def test_figures_say_what_is_to_be_seen(articles):
    "Those who do not see a figure hear the text beside it, not the word figure."
    said = [(name, alt) for name, article in articles.items() for alt in article.alts]
    assert said and not [(name, alt) for name, alt in said if len(alt.split()) < 3]


def test_the_text_of_a_figure_is_that_below_it_or_else_above():
    cells = [nbformat.v4.new_markdown_cell("# A [title](x.ipynb)"), nbformat.v4.new_code_cell("plot()")]
    nb = nbformat.v4.new_notebook(cells=cells)
    assert figure_text(nb, 1) == "A title"
    nb.cells.append(nbformat.v4.new_markdown_cell("**What to see.** Heads `L1H2` fall, [here](b.md)."))
    assert figure_text(nb, 1) == "What to see. Heads L1H2 fall, here."


def test_exported_code_is_folded_and_parameters_are_not(articles):
    "In an article what is long, too; of a module's notebook what is not exported stays open."
    seen = Counter()
    for name, path in notebooks().items():
        article = articles[f"{name}.html"]
        shown = {re.sub(r"\s", "", code): folded for code, folded in zip(article.code, article.folded)}
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type != "code" or name == "index" or re.match(r"#\|\s*(hide|default_exp|echo)", cell.source):
                continue
            exported = bool(re.match(r"#\|\s*exporti?\b", cell.source))
            text = re.sub(r"\s", "", re.sub(r"^#\|.*$", "", cell.source, flags=re.M))
            parameters = "parameters" in cell.metadata.get("tags", [])
            expected = exported or ("/" not in name and not parameters and cell.source.count("\n") >= 8)
            assert shown[text] == expected, f"{name}: {cell.source[:80]}"
            seen["exported" if exported else "parameters" if parameters else "open" if not expected else "long"] += 1
    assert min(seen[k] for k in ("exported", "open", "long")) > 5 and seen["parameters"] >= 6, seen


def test_an_article_opens_at_its_figure(articles, pages):
    for name in [n for n in PAGES if re.match(r"1\d_", n)]:
        first, *rest = articles[name].parts
        assert first.startswith("img ") and first in rest, f"{name} begins with {first}"
        assert 'href="#first-figure"' in pages[name] and pages[name].count('id="first-figure"') == 1


def test_search_works_from_disk(site, open_page):
    b = open_page(site / "index.html")
    box = b.find_element("css selector", ".md-search__input")
    box.click()  # which loads the index; what is typed before it is there cannot be a query yet
    wait_for(lambda: "Initializing" not in b.find_element("css selector", ".md-search-result__meta").text, 60)
    box.send_keys("participation")  # half a second word would be an invalid query
    links = wait_for(
        lambda: [a.get_attribute("href") for a in b.find_elements("css selector", ".md-search-result__link")], 20
    )
    assert any("participation" in a or "spectra" in a for a in links[:6])
    assert b.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit_the_window_and_are_accessible(site, open_page, width):
    wrong = {}
    for page in PAGES:
        b = open_page(site / page, width, 850)
        if found := [*horizontal_overflow(b), *(accessibility_faults(b, "article") if width < 600 else ())]:
            wrong[page] = found[:3]
        if errors := b.get_log("browser"):
            wrong[page] = errors
    assert not wrong


def test_the_frame_of_a_page_is_accessible(site, open_page):
    assert accessibility_faults(open_page(site / "base" / "paths.html")) == []


def test_a_page_that_is_not_accessible_is_seen(open_page, tmp_path):
    text = '<html lang="en"><title>t</title><p style="color:#bbb">pale</p><img src="x.png"></html>'
    (tmp_path / "a.html").write_text(text)
    found = accessibility_faults(open_page(tmp_path / "a.html"))
    assert [f.split(":")[0] for f in found] == ["color-contrast", "image-alt"]


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
    assert "(../base/paths.md)" in text and "#|" not in text and "secret" not in text
    assert '??? code "Code, 1 line"\n\n    ```python\n    x = 1\n' in text
    assert "only_shown" not in text and "shown" in text


def test_broken_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#x">b</a><a href="b.html#y">b</a><img src="c.png"><a href="https://example.org">out</a>'
    )
    (tmp_path / "b.html").write_text('<p id="x"></p>')
    assert broken_links(tmp_path) == ["a.html: b.html#y", "a.html: c.png"]
