"""The page of a comparison, opened in a browser."""

import re

import chromium
import matplotlib.image
import numpy as np
import pytest
from made_runs import EQUAL, made_results, shifted

from mtl_jax.compare import Results
from mtl_jax.compare.report import write_report

COMMAND = "mtl-jax compare <my>.problem:build --name 'a & b' " + "--weightings dwa " * 9
GAIN = {"topic": [0.100, 0.110, 0.090, 0.105], "depth": [-0.1, 0.1, -0.2, 0.3]}
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def browser():
    with chromium.browser() as running:
        yield running


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of two problems, one of which is interrupted, with a picture."""
    folder = tmp_path_factory.mktemp("runs")
    rows = {"equal": EQUAL, "adaptive": shifted(GAIN), "<b>bold</b>": shifted(GAIN)}
    made = made_results(rows, alone={"topic": [0.6] * 4, "depth": [0.8] * 4})
    made.of("made")["adaptive"][1].failure = "no finite update in epoch 1"
    other = made_results({"equal": EQUAL}, name="other")
    other.planned["other"] += [("dwa", 0), ("dwa", 1)]
    other.runs[0].provenance = {"versions": {"jax": "0.9.9", "numpy": "2.3.1"}}
    for name in ("made_metrics.png", "other_metrics.png"):
        matplotlib.image.imsave(folder / name, np.zeros((300, 1200, 3)))
    results = Results.combine([made, other])
    results.command = COMMAND
    write_report(results, folder, pictures=())
    return (folder / "report.html").as_uri()


@pytest.fixture
def opened(browser, address):
    """The page in a window of a desktop; it may ask for nothing and must not raise an error."""
    tab = browser.new_page(viewport=DESKTOP)
    errors, requests = [], []
    tab.on("pageerror", lambda error: errors.append(error))
    tab.on("console", lambda message: errors.append(message.text))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(address)
    yield tab
    tab.close()
    assert errors == []
    assert [url for url in requests if not url.startswith("data:")] == [address]


def table_with(opened, header):
    """The first table with such a column."""
    return opened.locator("table.sortable", has_text=header).first


def column(table, number):
    return [row.locator("td").nth(number).inner_text() for row in table.locator("tbody tr").all()]


def test_tables_sort_when_a_header_is_clicked(opened):
    table = table_with(opened, "topic accuracy")
    header = table.locator("th").nth(1)
    before = column(table, 1)
    assert header.inner_text().startswith("topic accuracy, % ↑")

    def values():
        return [float(re.match(r"[\d.]+", cell)[0]) for cell in column(table, 1)]

    assert values() != sorted(values())
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert values() == sorted(values())
    assert sorted(column(table, 1)) == sorted(before)
    names = dict(zip(column(table, 0), column(table, 1), strict=True))
    assert names["equal"] == before[0]  # rows stay whole
    header.locator("button").press("Enter")  # by keyboard, too
    assert header.get_attribute("aria-sort") == "descending"
    assert values() == sorted(values(), reverse=True)
    # Names sort as words; what is empty comes last, in both directions.
    table.locator("th button").first.click()
    assert column(table, 0) == sorted(column(table, 0), key=str.lower)
    assert header.get_attribute("aria-sort") is None
    for _ in range(2):
        table.locator("th button").nth(3).click()
        assert column(table, 3)[-1] == ""
        assert column(table, 0)[-1] == "equal"


def test_numbers_sort_by_their_values(opened):
    """And not by what is written of them."""
    values = ["10", "9.5", "-3e-2", "1200", "", "0.5"]
    table = table_with(opened, "topic accuracy")
    table.evaluate(
        """(table, values) => {
            table.tBodies[0].replaceChildren(...values.map((value) => {
                const row = document.createElement("tr");
                row.innerHTML = `<td>name</td><td>v${value}</td>`;
                if (value) row.cells[1].dataset.value = value;
                return row;
            }));
        }""",
        values,
    )
    table.locator("th button").nth(1).click()
    assert column(table, 1) == ["v-3e-2", "v0.5", "v9.5", "v10", "v1200", "v"]


def test_everything_is_on_the_page(opened):
    text = opened.locator("body").inner_text()
    for wanted in (
        "Over all problems",
        "<b>bold</b>: better in topic by 10, undecided in depth; mean +",  # text, not HTML
        "Against equal weights",
        "Trade-offs",
        "Cost beside quality",
        "Interrupted: 2 runs not finished.",
        "Failed: adaptive, seed 1: no finite update in epoch 1.",
        "undecided: missing seeds",
        "jax 0.9.9 (1 run), 0.10.0 (3 runs)",
        COMMAND.strip(),
    ):
        assert wanted in text
    assert text.index("Verdicts") < text.index("After the last epoch")
    assert opened.locator("b").count() == 0
    for row in ("jax", "numpy", "learning rate", "batch size", "seeds"):
        found = opened.locator("table.settings td:first-child", has_text=re.compile(f"^{row}$"))
        assert found.count() >= 1
        cell = found.first.locator("xpath=following-sibling::td")
        assert cell.text_content().strip()
    # The pictures of a comparison that is not finished would be old ones.
    sizes = opened.locator("img").evaluate_all("all => all.map((image) => image.naturalWidth)")
    assert sizes == [1200]
    better = opened.locator("td.better")
    assert better.count() > 0
    assert all(cell.endswith("better") for cell in better.all_inner_texts())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_it_fits_the_window_and_can_be_read(opened, size, scheme):
    opened.set_viewport_size(size)
    opened.emulate_media(color_scheme=scheme)
    opened.locator("details").first.locator("summary").click()
    widths = opened.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]
    brightness = "color => color.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3"
    text, ground = (
        opened.evaluate(f"({brightness})(getComputedStyle(document.body).{name})")
        for name in ("color", "backgroundColor")
    )
    assert (text < 60 and ground > 240) if scheme == "light" else (text > 200 and ground < 40)
    # A wide table can be scrolled, with its names staying.
    wide = opened.locator(".scrolls", has=table_with(opened, "topic accuracy")).first
    wide.evaluate("box => { box.scrollLeft = 200; }")
    assert wide.evaluate("box => box.scrollLeft > 100") == (size == PHONE)
    assert abs(wide.locator("td").first.bounding_box()["x"] - wide.bounding_box()["x"]) < 2
