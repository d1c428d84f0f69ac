"""The page in a real browser: headless Chromium, without any network."""

import html
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright
from runs import ON, Finish, configure
from test_report_page import HOSTILE, HOSTILE_END, make_report_data

from fruitdask import report
from fruitdask.cli import cli
from fruitdask.core.config import InputConfig, ModelConfig
from fruitdask.core.storage import Location
from fruitdask.report.figures.styles import INK
from fruitdask.report.page import render_page
from fruitdask.store.catalog import list_images

#: A separate browser profile that sends no requests by itself.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
N_CLASSES = 14
READY = "html[data-maps=ready]"

#: The position on the screen of a point in a map: among those of a class, with or without a thumbnail, the one farthest
#: from all others.
FIND_POINT = """([name, number, withPicture]) => {
  const data = JSON.parse(document.getElementById("maps-data").textContent);
  const plot = Bokeh.documents[0].get_model_by_name(`plot-${name}`);
  const view = Bokeh.index.find_one(plot);
  const { glyph, data_source } = plot.renderers[0];
  const box = view.canvas_view.events_el.getBoundingClientRect();
  const [xs, ys] = ["x", "y"].map((axis) => Array.from(data_source.get_column(glyph[axis].field)));
  const places = xs.map((x, point) => ({
    x: box.x + view.frame.x_scale.compute(x), y: box.y + view.frame.y_scale.compute(ys[point]),
  }));
  const room = (point) => Math.min(...places.map((each, other) => (
    other === point ? Infinity : Math.hypot(each.x - places[point].x, each.y - places[point].y))));
  const wanted = (point) =>
    data.class_of_point[point] === number && (data.picture_of_point[point] >= 0) === withPicture;
  const point = places.map((_, each) => each).filter(wanted).sort((a, b) => room(b) - room(a))[0];
  return { ...places[point], path: data.paths[point], label: data.labels[number] };
}"""
LIST_MUTED = """() => Bokeh.documents[0].roots().map(
  (plot) => plot.renderers.filter((each) => each.muted).map((each) => each.name))"""
LIST_SELECTED = "() => Bokeh.documents[0].roots().map((plot) => plot.renderers[0].data_source.selected.indices.length)"


pytestmark = pytest.mark.browser


@dataclass
class Watched:
    """A page, its requests, and its errors and warnings."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs a chromium on the PATH, such as Debian's package of that name")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which not all points have thumbnails, and two names of classes must be escaped."""
    names = {N_CLASSES - 2: f"{HOSTILE}", N_CLASSES - 1: f"fruit {HOSTILE_END}"}
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_page(make_report_data(700, N_CLASSES, names=names, n_thumbnails=200)), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Browser, report_file: Path, request: pytest.FixtureRequest) -> Iterator[Watched]:
    """The report with its maps drawn, in a browser with the options that a test gives."""
    options: dict[str, Any] = {"viewport": DESKTOP} | getattr(request, "param", {})
    with browser.new_context(**options) as context:
        watched = Watched(context.new_page())
        watched.page.on("request", lambda each: watched.requests.append(each.url))
        watched.page.on("pageerror", lambda error: watched.complaints.append(str(error)))
        watched.page.on(
            "console",
            lambda message: watched.complaints.append(message.text) if message.type in ("error", "warning") else None,
        )
        watched.page.goto(report_file.as_uri())
        watched.page.wait_for_selector(READY, state="attached")
        yield watched


def hover(page: Page, name: str, number: int, *, with_picture: bool = True) -> dict[str, Any]:
    """Move the mouse onto a point of a class; returns its path and label."""
    page.locator(f"#map-{name}").scroll_into_view_if_needed()
    point: dict[str, Any] = page.evaluate(FIND_POINT, [name, number, with_picture])
    page.mouse.move(point["x"] - 3, point["y"])
    page.mouse.move(point["x"], point["y"])
    page.wait_for_selector("#tip", state="visible")
    return point


def drag_box(page: Page, name: str) -> None:
    """Select what is in the middle of a map with its box."""
    page.evaluate(
        """(name) => {
          const tools = Bokeh.documents[0].get_model_by_name(`plot-${name}`).toolbar.tools;
          tools.find((tool) => tool.type === "BoxSelectTool").active = true;
        }""",
        name,
    )
    page.locator(f"#map-{name}").scroll_into_view_if_needed()
    box = page.locator(f"#map-{name}").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5, steps=3)
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.75, steps=3)
    page.mouse.up()


def select_points(page: Page, name: str) -> None:
    """Select the middle of a map; a busy browser may have missed the mouse, as the tool was not active yet."""
    for _ in range(5):
        drag_box(page, name)
        with suppress(TimeoutError):
            page.wait_for_function(f"() => ({LIST_SELECTED})().every((count) => count > 0)", timeout=6000)
            page.wait_for_selector("#selection-clear", state="visible", timeout=6000)
            return
    pytest.fail("nothing was selected")


@pytest.mark.slow
def test_page_makes_no_requests_and_has_no_errors(opened: Watched, report_file: Path) -> None:
    page = opened.page
    hover(page, "pca", 0)
    select_points(page, "tsne")
    assert opened.requests == [report_file.as_uri()]
    assert opened.complaints == []


@pytest.mark.slow
def test_policy_blocks_foreign_scripts_and_requests(opened: Watched, report_file: Path) -> None:
    page = opened.page
    refused = page.evaluate("""async () => {
          const script = document.createElement("script");
          script.textContent = "window.harmed = 3";
          document.head.append(script);
          const fetched = await fetch("https://example.org/").then(() => "fetched", () => "refused");
          return [fetched, window.harmed === undefined];
        }""")
    assert refused == ["refused", True]
    assert opened.requests == [report_file.as_uri()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pca", "tsne"])
def test_hover_shows_thumbnail_path_and_label(opened: Watched, name: str) -> None:
    point = hover(opened.page, name, 3)
    tip = opened.page.locator("#tip")
    assert (tip.locator("b").text_content(), tip.locator("span").text_content()) == (point["label"], point["path"])
    picture = tip.locator("img")
    assert picture.get_attribute("alt") == point["label"]
    assert picture.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])") == [64, 64]
    opened.page.mouse.move(5, 5)
    opened.page.wait_for_selector("#tip", state="hidden")


@pytest.mark.slow
def test_hover_shows_a_point_without_thumbnail(opened: Watched) -> None:
    point = hover(opened.page, "pca", 3, with_picture=False)
    tip = opened.page.locator("#tip")
    assert tip.locator("span").text_content() == point["path"]
    assert tip.locator("img").count() == 0


@pytest.mark.slow
def test_hostile_names_stay_text(opened: Watched) -> None:
    page = opened.page
    labels = page.evaluate("() => JSON.parse(document.getElementById('maps-data').textContent).labels")
    for label in (HOSTILE, f"fruit {HOSTILE_END}"):
        point = hover(page, "pca", labels.index(label))
        assert page.locator("#tip b").text_content() == label == point["label"]
        page.mouse.move(5, 5)
        page.wait_for_selector("#tip", state="hidden")
    page.get_by_role("button", name="Fade all").click()
    drag_box(page, "pca")
    assert page.evaluate("() => window.harmed") is None
    assert page.locator("img[src='x']").count() == 0
    assert opened.complaints == []


@pytest.mark.slow
def test_legend_mutes_a_class_in_both_maps(opened: Watched) -> None:
    page = opened.page
    assert page.get_by_text("fade together").count() == 0
    button = page.locator("#legend .class").nth(2)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert page.evaluate(LIST_MUTED) == [["class-2"], ["class-2"]]
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert page.evaluate(LIST_MUTED) == [[], []]


@pytest.mark.slow
def test_legend_works_by_keyboard(opened: Watched) -> None:
    page = opened.page
    page.locator("#legend-none").focus()
    page.keyboard.press("Tab")
    # The list scrolls, so a browser may focus it before its first button.
    if page.evaluate("() => document.activeElement.tagName") != "BUTTON":
        page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.dataset.class") == "0"
    outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.press("Space")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert outline == "solid"
    assert page.evaluate(LIST_MUTED) == [["class-0", "class-1"]] * 2


@pytest.mark.slow
def test_legend_filter_limits_the_effect_of_its_buttons(opened: Watched) -> None:
    page = opened.page
    page.locator("#legend-filter").fill("  FRUIT_00")
    assert page.locator("#legend .class:visible").count() == 10
    page.get_by_role("button", name="Fade all").click()
    assert (
        page.evaluate(LIST_MUTED)
        == [
            [
                f"class-{n}"
                for n in page.evaluate(
                    "() => [...document.querySelectorAll('#legend li:not([hidden]) .class')]"
                    ".map((each) => each.dataset.class)"
                )
            ]
        ]
        * 2
    )
    page.locator("#legend-filter").fill("no such fruit")
    assert page.locator("#legend-empty").is_visible()
    page.locator("#legend-filter").fill("")
    page.get_by_role("button", name="Show all").click()
    assert page.evaluate(LIST_MUTED) == [[], []]


@pytest.mark.slow
def test_many_classes_are_drawn_by_as_many_renderers_as_there_are_styles(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "many.html"
    path.write_text(render_page(make_report_data(450, 150, n_thumbnails=0)), encoding="utf-8")
    with browser.new_context(viewport=DESKTOP) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        page.wait_for_selector(READY, state="attached")
        count = "() => Bokeh.documents[0].roots().map((plot) => plot.renderers.length)"
        assert page.evaluate(count) == [144, 144]
        buttons = page.locator("#legend .class")
        assert buttons.count() == 150
        assert page.get_by_text("Classes of the same colour and mark fade together.").is_visible()
        # The 146th class looks like the second one.
        buttons.nth(145).click()
        faded = page.locator("#legend .class[aria-pressed=false]")
        assert [faded.nth(n).get_attribute("data-class") for n in range(faded.count())] == ["1", "145"]
        assert page.evaluate(LIST_MUTED) == [["class-1"], ["class-1"]]
        shown = "() => { const d = Bokeh.documents[0].roots()[0].renderers[1].view.filter.indices; return d.length }"
        assert page.evaluate(shown) == 6


@pytest.mark.slow
def test_selection_is_shared_by_both_maps(opened: Watched) -> None:
    page = opened.page
    select_points(page, "pca")
    in_pca, in_tsne = page.evaluate(LIST_SELECTED)
    assert 0 < in_pca < 700 and in_pca == in_tsne
    assert page.locator("#selection-text").text_content().startswith(f"{in_pca} selected: ")
    assert page.locator("#selection-pictures img").count() > 0
    # A class that is faded out leaves the selection.
    page.get_by_role("button", name="Fade all").click()
    assert page.evaluate(LIST_SELECTED) == [0, 0]
    assert page.locator("#selection-text").text_content() == "Nothing is selected."


@pytest.mark.slow
def test_search_selects_images_by_name(opened: Watched) -> None:
    page = opened.page
    page.locator("#search").fill("  FRUIT_003/R0_15")
    found = page.evaluate(LIST_SELECTED)
    assert (
        found[0]
        == found[1]
        == page.evaluate("""() => JSON.parse(document.getElementById("maps-data").textContent).paths
          .filter((path) => path.includes("fruit_003/r0_15")).length""")
    )
    assert found[0] > 0
    assert (
        page.locator("#selection-text")
        .inner_text()
        .startswith(f"{found[0]} selected: \u2068fruit_003\u2069: {found[0]}.")
    )
    page.locator("#search").fill("no such fruit")
    assert page.locator("#selection-text").inner_text() == "No image on the map has such a name."
    assert page.locator("#selection-download").is_disabled()


@pytest.mark.slow
@pytest.mark.parametrize("opened", [{"permissions": ["clipboard-read", "clipboard-write"]}], indirect=True)
def test_paths_of_selected_images_are_copied(opened: Watched) -> None:
    page = opened.page
    page.locator("#search").fill("fruit_004")
    page.locator("#selection-copy").click()
    n_selected = page.evaluate(LIST_SELECTED)[0]
    page.get_by_text(f"{n_selected} copied.").wait_for()
    copied = page.evaluate("() => navigator.clipboard.readText()").split("\n")
    assert len(copied) == n_selected > 1 and all(path.startswith("fruit_004/") for path in copied)


@pytest.mark.slow
def test_pictures_enlarge_by_keyboard_and_return_the_focus(opened: Watched) -> None:
    page = opened.page
    pictures = page.locator("#examples button.picture:visible")
    pictures.nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#enlarged[open]")
    path = pictures.nth(1).get_attribute("data-path")
    assert path is not None and path in page.locator("#enlarged-text").inner_text()
    enlarged = page.locator("#enlarged-content img")
    assert enlarged.bounding_box()["width"] >= 3 * pictures.nth(1).bounding_box()["width"]
    page.keyboard.press("ArrowRight")
    assert pictures.nth(2).get_attribute("data-path") in page.locator("#enlarged-text").inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#enlarged-text").inner_text().startswith("Mean of all images of")
    page.keyboard.press("Escape")
    page.wait_for_selector("#enlarged", state="hidden")
    assert pictures.nth(1).evaluate("(each) => each === document.activeElement")


@pytest.mark.slow
def test_a_selected_picture_and_a_figure_enlarge_by_mouse(opened: Watched) -> None:
    page = opened.page
    page.locator("#search").fill("fruit_005")
    page.locator("#selection-pictures button.picture").first.click()
    assert "fruit_005/" in page.locator("#enlarged-text").inner_text()
    page.mouse.click(3, 3)
    page.wait_for_selector("#enlarged", state="hidden")
    page.locator("#quality .enlarge").first.click()
    assert page.locator("#enlarged-content svg").count() == 1
    assert page.locator("#enlarged-copy").is_hidden() and page.locator("#enlarged-after").is_hidden()
    page.locator("#enlarged-close").click()
    page.wait_for_selector("#enlarged", state="hidden")
    assert opened.complaints == []


@pytest.mark.slow
def test_downloaded_paths_leave_images_out_erase_them_and_label_them(
    browser: Browser, sample_folder: Path, tiny_model: ModelConfig, tmp_path: Path, finish: Finish
) -> None:
    shutil.copytree(sample_folder, source := tmp_path / "in")
    first = min(source.iterdir())
    for path, name in zip(sorted(first.iterdir()), ("=1+1.jpg", 'two [a] "b", c.jpg'), strict=False):
        path.rename(first / name)
    (source / "=sum").mkdir()
    shutil.copy(first / "=1+1.jpg", source / "=sum" / "-1.jpg")
    config = configure(source, tmp_path / "out", tiny_model, explore=ON, report=ON)
    n_images, table = len(finish(config).table), tmp_path / "selected.csv"
    with browser.new_context(accept_downloads=True) as context:
        page = context.new_page()
        page.goto((tmp_path / "out" / "report.html").as_uri())
        page.wait_for_selector(READY, state="attached")
        page.locator("#search").fill(first.name)
        page.evaluate("() => { Bokeh.documents[0].roots()[0].renderers[0].data_source.selected.indices.push(0) }")
        with page.expect_download() as download:
            page.locator("#selection-download").click()
        download.value.save_as(table)
    selected = {"=sum/-1.jpg", *(f"{first.name}/{path.name}" for path in first.iterdir())}
    labelled = list_images(InputConfig(url=str(source), manifest=str(table)))
    assert set(labelled["path"]) == selected
    left = list_images(InputConfig(url=str(source), exclude_from=str(table)))
    assert not selected & {*left["path"]} and len(left) == n_images - len(selected)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    done = CliRunner().invoke(cli, ["erase", str(tmp_path / "run.yaml"), "--paths", str(table), "--yes"])
    assert done.exit_code == 0 and f"{len(selected)} of {n_images} images" in done.output, done.output
    results = report.read_results(Location(config.output.url))
    assert list(results["path"]) == list(left["path"])


@pytest.mark.slow
@pytest.mark.parametrize("opened", [{"viewport": {"width": 1440, "height": 900}}, {"viewport": PHONE}], indirect=True)
def test_figures_fit_into_the_width(opened: Watched) -> None:
    page = opened.page
    widths = page.evaluate("""() => [...document.querySelectorAll(".figure, .examples, .cards")].map((each) => {
          const box = each.getBoundingClientRect();
          return [each.scrollWidth - each.clientWidth, box.left, innerWidth - box.right];
        })""")
    assert len(widths) >= 5
    assert all(hidden <= 1 and min(left, right) >= 0 for hidden, left, right in widths), widths
    assert page.evaluate("() => document.documentElement.scrollWidth === innerWidth")


@pytest.mark.slow
@pytest.mark.parametrize("opened", [{"viewport": PHONE, "is_mobile": True, "has_touch": True}], indirect=True)
def test_phone_shows_everything_without_scrolling_sideways(opened: Watched) -> None:
    page = opened.page
    assert page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    tools = page.evaluate(
        "() => Bokeh.documents[0].roots().map("
        "(plot) => plot.toolbar.tools.find((tool) => tool.type === 'PanTool').active)"
    )
    assert tools == [False, False], "a finger on a map must scroll the page"
    page.locator("#map-pca").scroll_into_view_if_needed()
    point = page.evaluate(FIND_POINT, ["pca", 1, True])
    page.touchscreen.tap(point["x"], point["y"])
    page.wait_for_selector("#tip", state="visible")
    assert page.locator("#tip span").text_content() == page.locator("#selection-pictures .path").first.text_content()


@pytest.mark.slow
@pytest.mark.parametrize("opened", [{"color_scheme": "light"}], indirect=True)
def test_dark_mode_reaches_page_and_maps(opened: Watched) -> None:
    page = opened.page

    def read_colours() -> list[str]:
        colours: list[str] = page.evaluate("""() => [
              getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
              Bokeh.documents[0].roots()[0].below[0].major_label_text_color,
            ]""")
        return colours

    light = read_colours()
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "(light) => Bokeh.documents[0].roots()[0].below[0].major_label_text_color !== light", arg=light[2]
    )
    dark = read_colours()
    assert light == ["rgb(255, 255, 255)", "rgb(27, 29, 33)", INK]
    assert dark == ["rgb(22, 24, 29)", "rgb(230, 232, 235)", "#e6e8eb"]


@pytest.mark.slow
@pytest.mark.parametrize("opened", [{"color_scheme": "dark"}], indirect=True)
def test_print_is_black_on_white_and_unfolded(opened: Watched) -> None:
    page = opened.page
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("() => Bokeh.documents[0].roots()[0].below[0].major_label_text_color") == "#000000"
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("() => dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "opened", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True, ids=["light", "dark"]
)
def test_text_has_enough_contrast(opened: Watched) -> None:
    worst = opened.page.evaluate("""() => {
          const parse = (text) => text.match(/[\\d.]+/g).map(Number);
          const light = (colour) => parse(colour).slice(0, 3)
            .map((each) => each / 255).map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4))
            .reduce((sum, each, place) => sum + each * [0.2126, 0.7152, 0.0722][place], 0);
          const behind = (element) => {
            for (let each = element; each; each = each.parentElement) {
              const colour = getComputedStyle(each).backgroundColor;
              if (parse(colour)[3] !== 0) return colour;
            }
          };
          let worst = [Infinity, ""];
          const mix = (front, back, opacity) => {
            const [over, under] = [parse(front), parse(back)];
            const share = opacity * (over[3] ?? 1);
            return `rgb(${over.slice(0, 3).map((each, place) => share * each + (1 - share) * under[place]).join(" ")})`;
          };
          const isNumber = (text) => /^\\d+$/.test(text.textContent.trim());
          const inCell = (text) => isNumber(text) && text.getAttribute("style")?.includes("#ffffff");
          for (const each of document.querySelectorAll("details")) each.open = true;
          for (const element of document.querySelectorAll("body *:not(script):not(noscript *)")) {
            const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
            // Numbers in white stand on dark cells of a heat map, which are an image.
            if (!hasText || !element.checkVisibility() || inCell(element)) continue;
            const style = getComputedStyle(element);
            const back = behind(element);
            const ink = element.closest("svg") ? mix(style.fill, back, style.fillOpacity * style.opacity) : style.color;
            const pair = [light(ink), light(back)].sort((a, b) => b - a);
            const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
            if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 200)];
          }
          return worst;
        }""")
    # WCAG 2.2, success criterion 1.4.3.
    assert worst[0] >= 4.5, worst[1]


@pytest.mark.slow
def test_page_works_in_a_frame_of_a_notebook(browser: Browser, report_file: Path, tmp_path: Path) -> None:
    notebook = tmp_path / "notebook.html"
    report = html.escape(report_file.read_text(encoding="utf-8"))
    notebook.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><iframe srcdoc="{report}" height="600"></iframe>', encoding="utf-8"
    )
    with browser.new_context(viewport=DESKTOP, reduced_motion="reduce") as context:
        page = context.new_page()
        page.goto(notebook.as_uri())
        frame = page.frames[1]
        frame.wait_for_selector(READY, state="attached")
        frame.get_by_role("link", name="Record").click()
        assert frame.url == "about:srcdoc"
        assert frame.evaluate("() => scrollY") > 1_000


def test_page_without_scripts_names_the_pictures(browser: Browser, report_file: Path) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(report_file.as_uri())
        assert "figures/pca.png and figures/tsne.png" in page.locator("#maps .note").inner_text()
        assert page.get_by_role("heading", name="Summary").is_visible()
