"""The dashboard in headless Chromium, opened from its file as a reader opens it. Skips without a browser."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from made_up_dashboards import HOSTILE, HOSTILE_LATENT, is_alive, made_up_dashboard

from crosscoder.dashboard.page import write_dashboard

N = 250
ALIVE = [latent for latent in range(N) if is_alive(latent)]
MOST_CHANGED = sorted(ALIVE, key=lambda latent: -abs((latent + 0.123) / N - 0.5))
"""In the order of a page that was not touched."""
WITH_EXAMPLES = 40
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

pytestmark = pytest.mark.slow

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dashboards")
    made = {
        "crosscoder": made_up_dashboard(N, WITH_EXAMPLES),
        "sae": made_up_dashboard(30, 30, two_models=False),
        "partition": made_up_dashboard(30, 5, n_delta=8),
        "matched": made_up_dashboard(30, 10, matched=True),
        "measured": made_up_dashboard(30, 10, measured=True),
    }
    for name, dashboard in made.items():
        write_dashboard(folder / f"{name}.html", dashboard)
    return {name: folder / f"{name}.html" for name in made}


class Tab:
    """A page of the browser, which is used again: opening one takes longer than most tests."""

    def __init__(self, chromium: Any, settings: dict[str, Any]):
        self.page = chromium.new_context(**{"viewport": {"width": 1300, "height": 900}, **settings}).new_page()
        self.page.set_default_timeout(20_000)
        self.troubles: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def open(self, address: str) -> None:
        """As new: loaded, not moved within the page that was open, and with nothing stored."""
        self.troubles.clear()
        self.asked.clear()
        self.page.goto("about:blank")
        self.page.goto(address, wait_until="commit")
        self.page.wait_for_selector("html[data-ready]")

    def close(self) -> None:
        self.page.evaluate("localStorage.clear()")


@pytest.fixture(scope="module")
def tabs(chromium) -> dict[str, list[Tab]]:
    """Tabs that no test uses now, by the settings of the browser."""
    return {}


@pytest.fixture
def open_page(chromium, tabs, files) -> Iterator[Open]:
    """open_page(address after #, file, settings of the browser); afterwards, that the page met no error, asked the
    network for nothing, and ran nothing of the data."""
    opened: list[tuple[str, Tab]] = []

    def open_one(fragment: str = "", file: str = "crosscoder", **settings: Any) -> Any:
        key = repr(settings)
        free = tabs.setdefault(key, [])
        tab = free.pop() if free else Tab(chromium, settings)
        opened.append((key, tab))
        tab.open(f"{files[file].as_uri()}{fragment}")
        return tab.page

    yield open_one
    for key, tab in opened:
        assert tab.page.evaluate("window.broken") is None
        assert tab.troubles == []
        asked = {url.split("#")[0] for url in tab.asked} - {"about:blank"}
        assert asked == {url for url in asked if url in {path.as_uri() for path in files.values()}} != set()
        tab.close()
        tabs[key].append(tab)


@pytest.mark.parametrize("trouble", ["an old browser", "damaged data"])
def test_a_page_that_cannot_be_unpacked_says_why(trouble: str, chromium: Any, files: dict[str, Path], tmp_path: Path):
    page = chromium.new_page()
    text = files["sae"].read_text()
    if trouble == "an old browser":
        page.add_init_script("delete window.DecompressionStream")
    else:
        text = re.sub(r'(id="data">.{400}).{40}', r"\1", text)
    (tmp_path / "page.html").write_text(text)
    page.goto((tmp_path / "page.html").as_uri())
    said = {
        "an old browser": "This browser cannot unpack the data",
        "damaged data": "The data of this page are damaged",
    }
    page.wait_for_function("said => document.body.innerText.includes(said)", arg=said[trouble], timeout=5000)
    page.close()


def rows(page: Any) -> list[int]:
    return page.eval_on_selector_all("#rows tr", "rows => rows.map(row => Number(row.dataset.latent))")


def count(page: Any) -> str:
    return page.inner_text("#count")


def expect_latent(page: Any, latent: int) -> None:
    """Its page is shown, or is within a moment."""
    from playwright.sync_api import expect

    expect(page.locator("#latent-heading")).to_have_text(re.compile(rf"^Latent {latent} "), timeout=20_000)
    expect(page).to_have_title(re.compile(rf"^Latent {latent} "))
    assert page.is_hidden("#list")


def in_focus(page: Any) -> str:
    return page.evaluate("document.activeElement.closest('tr')?.dataset.latent ?? document.activeElement.id")


def set_range(page: Any, column: str, low: str, high: str) -> None:
    page.fill(f"input[name={column}-from]", low)
    page.fill(f"input[name={column}-to]", high)


# The table


def test_it_opens_on_the_latents_that_are_active_those_whose_norms_differ_most_first(open_page):
    page = open_page()
    assert count(page) == "225 of 250 latents"
    assert rows(page) == MOST_CHANGED[:100]


def test_a_search_for_a_number_gives_that_latent_first_and_enter_opens_it(open_page):
    page = open_page()
    page.fill("#search", "123")
    assert rows(page)[0] == 123
    page.press("#search", "Enter")
    expect_latent(page, 123)


@pytest.mark.parametrize("text", ["word12.", "WORD12. ", HOSTILE[1], "a context of «45»"])
def test_a_search_finds_text_in_tokens_and_examples_whatever_its_case(open_page, text):
    page = open_page()
    page.fill("#search", text)
    expected = {"word12.": 12, "WORD12. ": 12, HOSTILE[1]: HOSTILE_LATENT}.get(text, 45)
    assert expected in rows(page)
    assert len(rows(page)) < 20


def test_a_search_that_finds_nothing_says_so(open_page):
    page = open_page()
    page.fill("#search", "no such text anywhere")
    assert rows(page) == []
    assert "No latent is like that" in count(page)


def test_a_column_head_sorts_and_sorts_the_other_way_when_pressed_again(open_page):
    page = open_page()
    page.click("#heads button[data-sort=frequency]")
    assert rows(page) == sorted(ALIVE, reverse=True)[:100]
    page.click("#heads button[data-sort=frequency]")
    assert rows(page) == ALIVE[:100]
    assert page.get_attribute("#heads th:has(button[data-sort=frequency])", "aria-sort") == "ascending"
    assert page.locator("#heads [aria-sort]").count() == 1


def test_every_column_can_be_sorted_by_and_missing_figures_come_last(open_page):
    page = open_page()
    keys = page.eval_on_selector_all("#sort option", "options => options.map(option => option.value)")
    assert {"latent", "kind", "relative_decoder_norm", "nu_err", "exclusivity", "topTokens", "promoted1"} <= set(keys)
    shown = page.evaluate(
        """keys => keys.map(key => {
      document.getElementById("sort").value = key;
      document.getElementById("sort").dispatchEvent(new Event("change"));
      return [view.sort, document.querySelectorAll("#rows tr").length];
    })""",
        keys,
    )
    assert shown == [[key, 100] for key in keys]
    for order in ("falling", "rising"):
        page.select_option("#sort", "nu_err")
        if order not in page.inner_text("#direction"):
            page.click("#direction")
        page.click("#later")
        page.click("#later")
        assert rows(page)[-1] == 3, order


def test_filters_by_class_and_by_ranges_and_all_of_them_together(open_page):
    page = open_page()
    page.click("#filters summary")
    for kind in ("shared", "instruct-only", "between"):
        page.uncheck(f"input[name=kind][value={kind}]")
    fine_tuned = [latent for latent in ALIVE if latent % 4 == 0]
    assert sorted(rows(page)) == fine_tuned
    set_range(page, "nu_err", "0", "0.2")
    assert sorted(rows(page)) == [latent for latent in fine_tuned if 2 * (latent + 0.123456789) / N <= 0.2]
    set_range(page, "max_activation", "9", "")
    assert sorted(rows(page)) == [8, 12, 16, 20, 24]
    assert page.inner_text("#filters-set") == "(3 set)"
    page.click("#clear")
    assert count(page) == "225 of 250 latents"


@pytest.mark.parametrize(
    ("column", "low", "high", "expected"),
    [
        ("relative_decoder_norm", "0.9", "", lambda j: (j + 0.123) / N >= 0.9),
        ("cosine", "", "-0.5", lambda j: 1 - 2 * (j + 0.1235) / N <= -0.5),
        ("frequency", "0.0001", "0.00012", lambda j: 100 <= j + 1 <= 120),
        ("template_share", "0.7", "", lambda j: j % 5 >= 3),
        ("exclusivity", "0.9", "", lambda j: j != 3 and 2 * (j + 0.1235) / N <= 0.1),
        ("fine_tuned_norm", "0.9", "0.95", lambda j: 0.9 <= (j + 0.1235) / N <= 0.95),
    ],
)
def test_each_figure_has_a_range(open_page, column, low, high, expected):
    page = open_page()
    page.click("#filters summary")
    set_range(page, column, low, high)
    assert sorted(rows(page)) == [latent for latent in ALIVE if expected(latent)] != []


def test_latents_that_are_never_active_come_when_asked_for(open_page):
    page = open_page()
    page.click("#filters summary")
    page.check("input[name=dead]")
    assert count(page) == "250 latents"


def test_latents_that_are_mostly_on_template_tokens_can_be_left_out(open_page):
    page = open_page("#content=1")
    content = [latent for latent in ALIVE if (latent % 5) / 4 <= 0.5]
    assert rows(page) == [latent for latent in MOST_CHANGED if latent in content][:100]
    assert page.inner_text("#filters-set") == "(1 set)"
    page.click("#filters summary")
    assert page.is_checked("input[name=content]")
    page.uncheck("input[name=content]")
    assert count(page) == "225 of 250 latents"
    page.check("input[name=content]")
    assert "content=1" in page.url
    page.select_option("#sort", "template_share")
    assert {latent % 5 for latent in rows(page)[:20]} == {2}


def test_the_view_stands_in_the_address_and_opens_from_there(open_page):
    page = open_page()
    page.click("#filters summary")
    set_range(page, "nu_err", "", "0.5")
    page.fill("#search", "word1")
    page.select_option("#sort", "frequency")
    again = open_page("#" + page.url.split("#")[1])
    assert rows(again) == rows(page) != []
    assert again.input_value("#search") == "word1"
    assert again.input_value("input[name=nu_err-to]") == "0.5"
    assert again.input_value("#sort") == "frequency"
    # Who is sent a view sees the table, and who is not the summary.
    top = "document.getElementById('list-heading').getBoundingClientRect().top"
    assert again.evaluate(top) < 50 < open_page().evaluate(top)


def test_the_link_of_a_latent_keeps_the_view_of_the_table(open_page):
    page = open_page("#q=word1&sort=frequency&nu_err=..0.5")
    expected = rows(page)
    page.click("#rows a >> nth=1")
    expect_latent(page, expected[1])
    again = open_page("#" + page.url.split("#")[1])
    expect_latent(again, expected[1])
    again.click("#latent a:has-text('Next')")
    expect_latent(again, expected[2])
    again.click("#back")
    again.wait_for_selector("#list:not([hidden])")
    assert rows(again) == expected != []


def saved(page: Any) -> list[dict[str, str]]:
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename.endswith(".csv")
    with Path(download.value.path()).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_saved_csv_is_the_filtered_table_in_its_order_with_every_figure(open_page):
    page = open_page("#q=word&nu_err=0.25..&sort=-frequency", file="measured")
    there = saved(page)
    assert [int(row["latent"]) for row in there] == rows(page) != []
    columns = page.evaluate("data.columns.map(({ key }) => key)")
    assert {"label", "causal_effect", "norm_distance", "nu_err"} <= set(columns)
    for row in there:
        values = page.evaluate("latent => data.columns.map(({ key }) => valueOf(key, latent))", int(row["latent"]))
        for key, value in zip(columns, values, strict=True):
            if value is None or isinstance(value, str):
                assert row[key] == (value or "")
            else:
                assert float(row[key]) == value
        assert row["label"] == f"names <{row['latent']}>, =or not"
        assert "«" in row["example"] or HOSTILE[0] in row["example"]
    page.fill("#search", "no such text")
    assert saved(page) == []


def test_the_saved_csv_has_every_page_of_the_table(open_page):
    assert [int(row["latent"]) for row in saved(open_page())] == MOST_CHANGED


def test_labels_and_causal_effects_are_shown_and_searched_where_they_were_measured(open_page):
    assert {"label", "causal_effect", "label_score"}.isdisjoint(open_page().evaluate("[...columnOf.keys()]"))
    page = open_page(file="measured")
    heads = page.locator("#heads th").all_inner_texts()
    assert "label" in heads and "causal effect" in heads and "instruct promotes" not in heads
    page.fill("#search", "names <12>")
    assert rows(page) == [12]
    assert page.inner_text("#rows td.text") == "names <12>, =or not"
    assert "names <8>, =or not" in page.inner_text("#changed")
    again = open_page("#sort=-causal_effect", file="measured")
    assert rows(again)[:3] == [0, 1, 2]


def test_the_latents_of_two_dictionaries_are_compared_in_a_table_of_their_own(open_page):
    assert open_page().is_hidden("#matched")
    page = open_page(file="matched")
    assert "partner" not in page.locator("#heads th").all_inner_texts()
    page.focus("#matched")
    page.keyboard.press("Enter")
    assert page.get_attribute("#matched", "aria-pressed") == "true"
    heads = [head.rstrip("↓") for head in page.locator("#heads th").all_inner_texts()]
    partners = ["partner", "partner's cosine", "partner's class", "partner's frequency", "partner fires on"]
    assert heads == ["latent", "class", "relative norm", "frequency", *partners, "fires on"]
    assert rows(page) == [latent for latent in range(30) if is_alive(latent)]
    again = open_page("#" + page.url.split("#")[1], file="matched")
    cells = again.locator("#rows tr >> nth=3 >> td").all_inner_texts()
    assert cells[3:8] == ["103", "0.970", "between", "50.0%", "its <3>"]
    again.fill("#search", "its <12>")
    assert rows(again) == [12]
    page.click("#matched")
    assert page.url.endswith("html#") and page.input_value("#sort") == "norm_distance"


def test_what_is_sorted_by_is_a_column(open_page):
    page = open_page()
    assert page.get_attribute("#heads th:has-text('distance from')", "aria-sort") == "descending"
    for key in ("instruct_norm", "max_activation", "difference_share"):
        page.select_option("#sort", key)
        assert page.locator(f"#heads button[data-sort={key}]").count() == 1


# From page to page


def test_the_first_screen_says_what_changed_and_leads_to_the_latents(open_page):
    page = open_page()
    assert page.inner_text("#summary h2") == "What did fine-tuning change?"
    assert page.locator("#sentences li").all_inner_texts() == ["It explains 12.3%.", HOSTILE[0]]
    assert page.locator("#changed th").all_inner_texts() == ["8", "0", str(HOSTILE_LATENT)]
    assert " Word8." in page.inner_text("#changed tr:first-child") or "Word" in page.inner_text(
        "#changed mark >> nth=0"
    )
    page.click("#changed a >> nth=0")
    expect_latent(page, 8)


def test_a_click_on_a_row_opens_the_latent_and_back_and_forward_work(open_page):
    page = open_page()
    page.click("#rows tr[data-latent='212'] td:nth-child(5)")
    expect_latent(page, 212)
    assert page.url.endswith("#latent=212")
    page.click("#latent a:has-text('Next')")
    expect_latent(page, MOST_CHANGED[MOST_CHANGED.index(212) + 1])
    page.go_back()
    expect_latent(page, 212)
    page.go_back()
    page.wait_for_selector("#list:not([hidden])")
    assert page.is_hidden("#latent")
    page.go_forward()
    expect_latent(page, 212)


def test_a_deep_link_opens_its_latent_and_one_to_nowhere_the_table(open_page):
    expect_latent(open_page("#latent=17"), 17)
    page = open_page("#nonsense&nu_err=a..b&sort=no&content=yes")
    assert count(page) == "225 of 250 latents"
    for fragment in ("latent=250", "latent=x", "latent=-1", "latent="):
        page.evaluate("location.hash = 'latent=17'")
        expect_latent(page, 17)
        page.evaluate("fragment => { location.hash = fragment; }", fragment)
        page.wait_for_selector("#list:not([hidden])")
        assert count(page) == "225 of 250 latents"
        assert page.text_content("#nowhere") == (
            f"There is no latent “{fragment.removeprefix('latent=')}”: they are numbered from 0 to 249."
        )
    page.evaluate("location.hash = ''")
    page.wait_for_selector("#nowhere", state="hidden")


def test_the_nearest_latents_are_links(open_page):
    page = open_page("#latent=17")
    page.click(".nearest a >> nth=0")
    expect_latent(page, 18)


# The keyboard


def test_j_k_and_the_arrows_go_through_the_table_enter_opens_and_escape_returns_to_the_row(open_page):
    page = open_page()
    for key in ("j", "j", "ArrowDown", "k", "ArrowUp", "j"):
        page.keyboard.press(key)
    assert in_focus(page) == str(MOST_CHANGED[1])
    page.keyboard.press("Enter")
    expect_latent(page, MOST_CHANGED[1])
    page.keyboard.press("j")
    expect_latent(page, MOST_CHANGED[2])
    page.keyboard.press("Escape")
    page.wait_for_selector("#list:not([hidden])")
    assert in_focus(page) == str(MOST_CHANGED[2])


def test_going_past_the_last_row_turns_the_page(open_page):
    page = open_page()
    page.focus("#rows tr:last-child a")
    page.keyboard.press("j")
    assert in_focus(page) == str(MOST_CHANGED[100])
    assert page.inner_text("#page") == "101 to 200 of 225"
    page.keyboard.press("k")
    assert in_focus(page) == str(MOST_CHANGED[99])


def test_a_slash_searches_and_letters_typed_there_stay_letters(open_page):
    page = open_page()
    page.keyboard.press("/")
    page.keyboard.type("jk/")
    assert (in_focus(page), page.input_value("#search")) == ("search", "jk/")
    page.fill("#search", "")
    page.keyboard.press("ArrowDown")
    assert in_focus(page) == str(MOST_CHANGED[0])


def test_what_has_the_focus_can_be_seen(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    style = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(style) == "solid"


# Examples


def test_the_pointer_shows_a_tokens_activation(open_page):
    page = open_page("#latent=19")
    assert page.locator(".passage").count() == 0  # never active
    page = open_page("#latent=20")
    assert page.is_hidden("#tip")
    page.hover(".passage >> nth=0 >> .token.peak")
    assert "21.0" in page.inner_text("#tip")
    assert "100% of the largest" in page.inner_text("#tip")
    page.hover("#latent-heading")
    assert page.is_hidden("#tip")


def test_the_keyboard_reads_from_token_to_token_and_escape_hides_before_it_goes_back(open_page):
    page = open_page("#latent=20")
    page.focus(".passage >> nth=0")
    page.keyboard.press("ArrowRight")
    assert "21.0" in page.inner_text("#tip")
    page.keyboard.press("ArrowRight")
    assert "10.5" in page.inner_text("#tip")
    assert "50% of the largest" in page.inner_text("#tip")
    page.keyboard.press("ArrowRight")
    assert "not active" in page.inner_text("#tip")
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")
    expect_latent(page, 20)
    page.keyboard.press("Escape")
    page.wait_for_selector("#list:not([hidden])")


def test_a_touch_shows_a_tokens_activation(open_page):
    page = open_page("#latent=20", **PHONE)
    page.tap(".passage >> nth=0 >> .token.peak")
    assert "21.0" in page.inner_text("#tip")
    page.tap("h3 >> nth=0")
    assert page.is_hidden("#tip")


def test_tokens_are_shaded_by_their_activation(open_page):
    page = open_page("#latent=20")
    colours = page.eval_on_selector_all(
        ".passage:first-child .token", "tokens => tokens.slice(0, 36).map(t => getComputedStyle(t).backgroundColor)"
    )
    alpha = [float(colour.rstrip(")").split("/")[1]) if "/" in colour else 1.0 for colour in colours]
    assert (alpha[24], alpha[25]) == (1.0, pytest.approx(0.12 + 0.88 * 127 / 255, abs=0.01))
    assert set(alpha[:24]) == {0.0}


def test_a_latent_with_examples_has_every_part(open_page):
    page = open_page("#latent=20")
    headings = page.locator("#latent h3").all_inner_texts()
    assert headings == [
        "Statistics",
        "Activations",
        "Tokens it promotes",
        "Tokens it fires on most",
        "Nearest latents",
        "Maximally activating examples",
        "Examples by quantile of activation",
    ]
    assert page.locator(".example").count() == 10 + 4 * 4
    assert page.locator("#latent h4").all_inner_texts()[2].startswith("Highest quarter 15.8 to 21.0")
    assert page.locator(".promoted").count() == 2
    lists = [set(page.locator(f".promoted >> nth={i} >> .chip").all_inner_texts()) for i in range(2)]
    alone = page.locator(".promoted >> nth=0 >> .alone").all_inner_texts()
    assert set(alone) == lists[0] - lists[1]
    assert page.locator("#latent svg rect").count() == 30


def test_a_latent_that_fires_on_one_page_alone_says_that_it_has_one_context(open_page):
    page = open_page("#latent=20")
    assert "one context" not in page.inner_text("#latent")
    page.evaluate("data.examples[22][0].length = 1; location.hash = 'latent=22';")
    expect_latent(page, 22)
    assert "All of its firings are on one page, so there is one context." in page.inner_text("#latent")


def test_a_latent_without_examples_shows_its_context_and_the_page_says_how_many_have_them(open_page):
    page = open_page("#latent=45")
    assert page.inner_text(".passage") == f"a context of «45»: {HOSTILE[0]}"
    assert "most interesting latents alone" in page.inner_text("#latent")
    n = sum(map(is_alive, range(WITH_EXAMPLES)))
    assert f"{n} of 225 active latents have examples. They are those that come first" in page.inner_text("#notes")


def test_the_page_says_what_its_figures_mean(open_page):
    page = open_page()
    page.click("footer summary")
    assert "1 − ν err: near 1 where one model alone has the latent." in page.inner_text("#meanings")


def test_hostile_text_is_shown_as_text(open_page):
    page = open_page(f"#latent={HOSTILE_LATENT}")
    text = page.inner_text(".passage >> nth=0")
    for hostile in HOSTILE[:4]:
        assert hostile in text
    assert page.inner_text("h1") == "made-up </title><script>window.broken = 4</script>"
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 4  # data, script, what opens both, and the script as it runs


def test_a_difference_sae_shows_what_it_has(open_page):
    page = open_page(file="sae")
    assert page.input_value("#sort") == "difference_share"
    assert rows(page) == [latent for latent in range(30) if is_alive(latent)][::-1]
    heads = page.inner_text("#heads")
    for missing in ("relative norm", "class", "cosine", "ν err"):
        assert missing not in heads
    for there in ("frequency", "on template", "share of difference", "difference promotes"):
        assert there in heads
    page.click("#filters summary")
    fields = set(page.eval_on_selector_all("#filter-fields input", "inputs => inputs.map(input => input.name)"))
    assert {"difference_share-from", "template_share-to", "content"} <= fields
    assert not fields & {"kind", "relative_decoder_norm-from", "nu_err-from", "instruct_norm-from"}
    page.click("#heads button[data-sort=frequency]")
    set_range(page, "frequency", "", "0.000012")
    assert rows(page) == [11, 10, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    page.click("#rows a >> nth=0")
    expect_latent(page, 11)
    assert page.locator(".promoted").count() == 1
    assert page.locator(".nearest thead th").all_inner_texts() == ["latent", "cosine", "fires on"]
    assert "by the difference" in page.inner_text("#latent")
    assert page.locator(".promoted .alone").count() == 0  # there is no other vector to tell it from
    assert "relative norm" not in page.inner_text("#latent")
    page.hover(".passage >> nth=0 >> .token.peak")
    assert "12.0" in page.inner_text("#tip")


def test_a_partition_tells_its_two_parts_apart(open_page):
    page = open_page(file="partition")
    heads = page.locator("#heads th").all_inner_texts()
    assert "part" in heads and "class" not in heads
    page.click("#filters summary")
    page.uncheck("input[name=part][value=shared]")
    assert rows(page) == [28, 27, 26, 25, 24, 23, 22]
    again = open_page("#" + page.url.split("#")[1], file="partition")
    assert rows(again) == rows(page)
    page.click("#rows a >> nth=0")
    expect_latent(page, 28)
    assert "delta latent of the partition" in page.inner_text("#latent-heading")
    assert "delta" in page.inner_text("#latent .statistics")


def test_latents_that_are_confirmed_can_be_picked_whatever_their_class(open_page):
    page = open_page()
    page.click("#filters summary")
    page.uncheck("input[name=confirmed][value='']")
    confirmed = [latent for latent in ALIVE if latent % 4 == 0]
    assert count(page).startswith(f"{len(confirmed)} of {N}")
    assert set(rows(page)) <= set(confirmed)
    page.click("#rows a >> nth=0")
    page.wait_for_selector("#latent-heading")
    assert "confirmed as fine-tuned-only" in page.inner_text("#latent-heading")


OUTLIER = """() => {
  data.values.cosine[0] = 1e6;
  view.descending = !view.descending;
  refreshTable();
}"""


def test_one_value_far_off_does_not_squeeze_the_chart_of_the_others(open_page):
    page = open_page()
    page.evaluate("() => { view.sort = 'cosine'; refreshTable(); }")
    assert "lie outside" not in page.inner_text("#overview")
    bars = page.locator("#overview rect.here").count()
    page.evaluate(OUTLIER)
    assert page.locator("#overview rect.here").count() > 0.8 * bars > 20
    assert "of the active latents lie outside of what is drawn" in page.inner_text("#overview")


# How it looks


@pytest.mark.parametrize("file", ["crosscoder", "sae", "matched"])
@pytest.mark.parametrize("fragment", ["", "#matched=1", "#latent=20", f"#latent={HOSTILE_LATENT}", "#latent=45"])
def test_on_a_phone_nothing_sticks_out(open_page, fragment, file):
    page = open_page(fragment, file, **PHONE)
    if "latent" not in fragment:
        page.click("#filters summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.evaluate("scrollTo(500, 0)")
    assert page.evaluate("scrollX") == 0
    if "latent" not in fragment:
        assert page.locator("#changed .firing >> nth=0").bounding_box()["width"] > 200


def luminance(page: Any) -> float:
    colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    return sum(float(part) for part in colour.strip("rgb()").split(",")) / 3


def test_it_follows_the_systems_colours_and_the_switch_overrules_them(open_page):
    assert luminance(open_page(color_scheme="light")) > 200
    page = open_page(color_scheme="dark")
    assert luminance(page) < 50
    page.click("#theme")
    assert "light" in page.inner_text("#theme")
    assert luminance(page) > 200
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert luminance(page) > 200


CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return canvas.getImageData(0, 0, 1, 1).data.slice(0, 3);
  };
  const light = (colour) => [...colour].map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const texts = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!texts || !element.checkVisibility() || element.closest("script, option, :disabled")) continue;
    const behind = [];
    for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
    const style = getComputedStyle(element);
    const fore = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(rgb(behind)), light(rgb([...behind, fore]))].sort();
    if ((b + 0.05) / (a + 0.05) < 4.5) poor.push(`${element.tagName}.${element.className}: ${element.textContent}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("fragment", ["#examples=1", "#latent=20"])
def test_all_text_has_the_contrast_that_reading_needs(open_page, scheme, fragment):
    """4.5 to 1, WCAG AA, on every shade of activation too."""
    assert open_page(fragment, color_scheme=scheme).evaluate(CONTRASTS) == []


def test_on_a_screen_the_table_has_room_for_all_of_its_columns(open_page):
    views = {"crosscoder": "", "sae": "", "partition": "", "measured": "", "matched": "#matched=1&sort=-match_cosine"}
    for file, fragment in views.items():
        page = open_page(fragment, file)
        assert page.evaluate("document.getElementById('scroll').scrollWidth") <= 1300 - 2 * 24
        assert (
            page.evaluate("Math.max(...[...document.querySelectorAll('#rows tr')].map(row => row.offsetHeight))") < 45
        )


@pytest.mark.parametrize("fragment", ["", "#latent=20", "#matched=1&sort=-match_cosine"])
def test_everything_that_is_used_has_a_name_and_headings_leave_out_no_level(open_page, fragment):
    page = open_page(fragment, "matched")
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, a, table, svg, [tabindex]")]
      .filter((e) => e.checkVisibility() && !(e.textContent.trim() || e.ariaLabel || e.labels?.length || e.caption))
      .map((e) => e.outerHTML)""")
    assert nameless == []
    levels = page.evaluate("""() => [...document.querySelectorAll("h1, h2, h3, h4")]
      .filter((e) => e.checkVisibility()).map((e) => Number(e.tagName[1]))""")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
