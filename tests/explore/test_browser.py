"""The page in a real browser: each tab does its job, by mouse and keyboard, wide and narrow.

Needs gradio, playwright and Chromium. The pictures of docs/explore.md are taken here.
"""

import re
import shutil
from pathlib import Path

import pytest

from performers.explore import build, sample_subject, serve

pytest.importorskip("gradio", reason="the explorer needs pip install 'performers[explore]'")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="a browser is driven by pip install playwright"
)
Image = pytest.importorskip("PIL.Image")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DOCUMENTS = Path(__file__).parents[2] / "docs"
TABS = ("Attention", "Estimator", "Error and cost", "Runs", "Generation")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH"),
    pytest.mark.usefixtures("without_shape_checks"),
]

# Of every visible text the ratio of luminances that WCAG 2 asks to be at least 4.5, or 3 for large
# letters; those below it.
TOO_LITTLE_CONTRAST = """() => {
    const numbers = color => color.match(/[\\d.]+/g).map(Number);
    const luminance = color => {
        const [r, g, b] = numbers(color).slice(0, 3).map(x => x / 255).map(
            x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const background = element => {
        for (let e = element; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if ((numbers(color)[3] ?? 1) > 0.5) return color;
        }
        return "rgb(255, 255, 255)";
    };
    const found = [];
    for (const e of document.querySelectorAll("gradio-app *")) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        const typed = ["INPUT", "TEXTAREA"].includes(e.tagName) && e.value && e.type !== "range";
        const seen = e.checkVisibility({opacityProperty: true, visibilityProperty: true});
        if (!seen || !(own || typed)) continue;
        const style = getComputedStyle(e);
        const [a, b] = [luminance(style.color), luminance(background(e))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const size = parseFloat(style.fontSize);
        const large = size >= 24 || (size >= 18.66 && parseInt(style.fontWeight) >= 700);
        if (ratio < (large ? 3 : 4.5))
            found.push(`${(e.textContent || e.value).trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
    }
    return found;
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    page = build(sample_subject(), tmp_path_factory.mktemp("runs"))
    yield serve(page, "127.0.0.1", None)
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280])
def page(address, browser, request):
    """The page, opened at a width; it must say no error and ask nothing of another computer."""
    said = []
    page = browser.new_page(viewport={"width": request.param, "height": 800})
    page.set_default_timeout(90_000)
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else 0)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: said.append(asked.url) if is_elsewhere(asked.url) else 0)
    page.goto(address)
    shown(page, "#matrices img")
    yield page
    page.close()
    assert said == []


def is_elsewhere(url):
    return not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", url)


def shown(page, selector):
    """Wait for an element, and for what it is replaced by."""
    page.wait_for_selector(selector)
    settled(page)


# Long enough for the keys and values of its residues to need more memory than a state.
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"


def settled(page):
    page.wait_for_function("!document.querySelector('.pending, .generating')")


def open_tab(page, name):
    tab = page.get_by_role("tab", name=name, exact=True)
    if tab.is_visible():
        tab.click()
    else:  # a narrow screen has a menu of those for which there is no room
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()


def picture(page, selector):
    return page.locator(f"{selector} img").get_attribute("src")


def changed(page, selector, before):
    """Wait until another picture is shown."""
    page.wait_for_function(
        "([selector, before]) => document.querySelector(selector + ' img')?.src != before",
        arg=[selector, before],
    )
    settled(page)


def photograph(page, name):
    """Write a picture for the documents, of 256 colors, so that it is small."""
    path = DOCUMENTS / f"explore-{name}.png"
    page.mouse.move(0, 0)
    page.screenshot(path=path, full_page=True)
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def test_a_residue_is_picked_and_its_row_is_drawn_by_keys_alone(page):
    before = picture(page, "#row"), picture(page, "#matrices")
    slider = page.get_by_role("slider", name=re.compile("position picked"))
    slider.focus()
    page.keyboard.press("ArrowRight")
    changed(page, "#row", before[0])
    assert "at position 21 attends to" in page.locator("#row img").get_attribute("alt")
    page.get_by_label("number input for view to position").fill("40")
    page.keyboard.press("Enter")
    changed(page, "#matrices", before[1])
    photograph(page, "attention")


def test_another_protein_another_head_and_other_features_are_other_matrices(page):
    before = picture(page, "#matrices")
    page.get_by_label("number input for head").fill("3")
    page.keyboard.press("Enter")
    changed(page, "#matrices", before)
    assert "head 3 of 4" in page.locator("#attention-sentence").inner_text()
    before = picture(page, "#matrices")
    page.locator("#attention-text textarea").fill("MKTAYIAKQRQISFVKSHFSRQ")
    page.get_by_role("button", name="Read it").click()
    changed(page, "#matrices", before)
    assert "24 tokens" in page.locator("#attention-sentence").inner_text()
    before = picture(page, "#matrices")
    page.get_by_role("combobox", name="features of FAVOR+").click()
    page.locator("[role=option]", has_text="sharp").click()
    changed(page, "#matrices", before)


def test_what_is_no_protein_is_refused_on_the_page(page):
    page.locator("#attention-text textarea").fill("MK1")
    page.get_by_role("button", name="Read it").click()
    message = page.get_by_test_id("toast-body").first
    message.wait_for()
    assert "got '1' at position 3" in message.inner_text()


def test_an_estimate_has_its_closed_form_beside_it(page):
    open_tab(page, "Estimator")
    shown(page, "#estimates img")
    assert "0.3417" in page.locator("#estimates-numbers").inner_text()
    photograph(page, "estimator")
    before = picture(page, "#estimates")
    page.get_by_label("number input for projections m", exact=True).fill("32")
    page.keyboard.press("Enter")
    changed(page, "#estimates", before)
    assert "0.1708" in page.locator("#estimates-numbers").inner_text()  # half the variance


def test_costs_are_measured_with_a_bar_and_end_when_asked_to(page):
    open_tab(page, "Error and cost")
    shown(page, "#frontier img")
    before = picture(page, "#frontier")
    page.get_by_label("number input for projections m, 0 for nothing far").fill("64")
    page.keyboard.press("Enter")
    changed(page, "#frontier", before)
    assert "m = 64" in page.locator("#frontier-sentence").inner_text()
    before = picture(page, "#frontier")
    page.get_by_role("button", name="Measure the grid").click()
    page.wait_for_selector("#frontier-bar progress")
    changed(page, "#frontier", before)
    assert "all settings are measured" in page.locator("#frontier-bar").inner_text()
    photograph(page, "frontier")


def test_where_there_is_no_run_the_page_says_how_to_make_one(page):
    open_tab(page, "Runs")
    assert page.get_by_text("performers train demo --output").is_visible()


def test_tables_of_runs_can_be_read_whole_on_a_narrow_screen(browser, runs):
    served = build(sample_subject(), runs)
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.goto(serve(served, "127.0.0.1", None))
    open_tab(page, "Runs")
    shown(page, "#tables table")
    cut = page.evaluate(
        """() => [...document.querySelectorAll("#tables table")]
            .filter(table => table.getBoundingClientRect().right > innerWidth)
            .filter(table => getComputedStyle(table.parentElement).overflowX !== "auto").length"""
    )
    assert cut == 0
    page.close()
    served.close()


def test_the_model_trains_until_stopped_and_writes_with_a_state_that_does_not_grow(page):
    open_tab(page, "Generation")
    page.get_by_role("button", name="Train it").click()
    page.wait_for_function("/step \\d+/.test(document.querySelector('#training-bar').innerText)")
    page.get_by_role("button", name="Stop training").click()
    settled(page)
    bar = page.locator("#training-bar")
    said = bar.inner_text()
    page.locator("#prompt textarea").fill(UBIQUITIN)  # the model may end its text soon
    page.get_by_role("button", name="Write", exact=True).click()
    page.wait_for_function("document.querySelector('#writing-bar')?.innerText.includes('done')")
    assert bar.inner_text() == said  # no step came after
    settled(page)
    photograph(page, "generation")
    words = page.locator("#memory img").get_attribute("alt")
    here, there = (int(x) for x in re.findall(r"(\d+) (?:by|as)", words))
    assert here < there


def test_writing_ends_when_asked_to(page):
    open_tab(page, "Generation")
    # A model that takes the likeliest token does not end its text by chance.
    for name, value in {"tokens at most": "1000", "temperature": "0"}.items():
        page.get_by_label(f"number input for {name}").fill(value)
        page.keyboard.press("Tab")
    page.get_by_role("button", name="Write", exact=True).click()
    page.wait_for_selector("#written p")
    page.get_by_role("button", name="Stop writing").click()
    settled(page)
    assert "done" not in page.locator("#writing-bar").inner_text()


@pytest.mark.parametrize("page", [1280, 400], indirect=True)
def test_every_tab_fits_the_screen_and_has_enough_contrast(page):
    for name in TABS:
        open_tab(page, name)
        for selector in {"Estimator": ["#estimates img"], "Error and cost": ["#frontier img"]}.get(
            name, []
        ):
            shown(page, selector)
        settled(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        assert page.evaluate(TOO_LITTLE_CONTRAST) == [], name
    page.evaluate("document.querySelector('h1').style.color = '#999'")
    assert page.evaluate(TOO_LITTLE_CONTRAST) == ["performers explore: 2.85"]


def test_every_control_has_a_name_and_is_reached_by_the_tab_key(page):
    for name in TABS:
        open_tab(page, name)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input, textarea, button, [role=slider]")]
                .filter(e => e.checkVisibility({visibilityProperty: true}))
                .filter(e => !(e.ariaLabel || e.labels?.length || e.innerText || e.title))
                .map(e => e.outerHTML.slice(0, 120))"""
        )
        assert nameless == [], name
    open_tab(page, "Attention")
    page.locator("#attention-text textarea").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText").strip() == "Read it"
