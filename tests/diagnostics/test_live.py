"""The served page in a real Chromium; left out where there is none."""

import time

import pytest

from tests.diagnostics import browser
from tests.diagnostics.test_page import full_rows
from tests.diagnostics.test_watch import add, serving
from tests.diagnostics.written import collapsing, run_folder

pytestmark = pytest.mark.skipif(not browser.CHROMIUM, reason="no Chromium is installed")

LOSS = "plots.values().next().value"


@pytest.fixture(scope="module")
def chromium():
    with browser.browser() as opened:
        yield opened


@pytest.mark.parametrize("first", [20, 99])
def test_new_rows_are_on_the_page_within_three_seconds_and_nothing_else_changes(chromium, tmp_path, first):
    rows = collapsing()
    folder = run_folder(tmp_path / "<img src=x onerror=alert(1)>", rows[:first], total=500)
    with serving(folder) as server:
        chromium.messages.clear(), chromium.requests.clear()
        chromium.open(server.address, height=500)
        chromium.wait("plots.size >= 2")
        chromium.value("figures.forEach(build)")
        chromium.value(f"zoom({LOSS}.group, [20, 60])")
        chromium.value("document.querySelector('figure .legend button').click()")
        chromium.value("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        chromium.value("document.querySelector('figure .chart').focus({preventScroll: true})")
        chromium.key("ArrowRight")
        chromium.value(
            "document.querySelector('figure').scrollIntoView({behavior: 'instant'}); window.old = [...plots.values()]; true"
        )
        # A sentence above may take another line: the page then scrolls along, so that what is looked at stays.
        top = "0 | Math.round(document.querySelector('figure').getBoundingClientRect().top)"
        place = chromium.value(top)
        begin = time.monotonic()
        add(folder, rows[first])
        chromium.wait(f"{LOSS}.x.at(-1) === {rows[first]['step']}")
        assert time.monotonic() - begin < 3
        assert f"at step {rows[first]['step']} of 500" in chromium.value(
            "document.querySelector('main').textContent"
        ) or (first == 99)
        assert chromium.value(f"{LOSS}.chartOf.data[1].length") == first + 1
        assert chromium.value(f"[{LOSS}.range(), {LOSS}.chartOf.scales.x.min]") == [[20, 60], 20]
        assert chromium.value(f"{LOSS}.chartOf.series.slice(1).map(({{show}}) => show)") == [False, True]
        assert chromium.value(top) == place
        assert chromium.value("[...plots.values()].every((plot, i) => plot === window.old[i])")
        assert chromium.value("[...document.querySelectorAll('details')].every(each => each.open)")
        assert chromium.value("document.activeElement === document.querySelector('figure .chart')")
        assert chromium.value("document.querySelector('figure .tip').hidden") is False
        # Without a zoom the plots follow the run.
        chromium.value(f"zoom({LOSS}.group, null)")
        step = 510
        add(folder, {**rows[-1], "step": step})
        chromium.wait(f"{LOSS}.chartOf.scales.x.max === {step}")
        assert chromium.messages == []
        assert all(address.startswith(server.address) for address in chromium.requests)
        # A metric that is new has a plot of its own, in its place; the others stay.
        add(folder, *({"step": at, "eval/test/accuracy": 0.5} for at in (step, step + 5)))
        chromium.wait("figures.some(each => each.textContent.includes('Metric: accuracy'))")
        assert chromium.value("figures.length") == chromium.value("content.panels.length")
        assert chromium.value("figures.every((each, i) => Number(each.dataset.panel) === i && each.id === `plot-${i}`)")
        assert chromium.value("window.old.every(each => [...plots.values()].includes(each))")
    chromium.wait("document.querySelector('[role=status]').textContent.startsWith('No connection')")
    chromium.messages.clear()


def test_runs_that_are_added_are_drawn(chromium, tmp_path):
    run_folder(tmp_path / "runs/a", full_rows(), total=500)
    with serving(tmp_path / "runs") as server:
        chromium.messages.clear()
        chromium.open(server.address)
        chromium.wait("plots.size >= 1")
        assert chromium.value("document.title") == "Training stability: a"
        run_folder(tmp_path / "runs/b", collapsing(), total=500)
        chromium.wait("document.title === 'Training stability: 2 runs'")
        chromium.value("figures.forEach(build)")
        assert chromium.value("content.panels[0].lines.map(({name}) => name)") == ["a", "b"]
        assert chromium.value("plots.size") == chromium.value("figures.length")
        assert chromium.messages == []
