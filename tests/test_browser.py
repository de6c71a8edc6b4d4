"""The pages in a real browser: what is decided is never lost, and every page is whole at any width, light and dark."""

import re
import shutil
import signal
import subprocess

import numpy as np
import pytest
from cli import begin
from made_labels import drawn, labels
from PIL import Image, ImageDraw
from test_report import make_run

from flywheel_fast import audit, report
from flywheel_fast.data import reviews
from flywheel_fast.data.manifest import DROPPED, NOT_REVIEWED, Manifest

NASTY = ("<script>alert(1)</script>", '"it\'s" & co', "עברית", "a" * 200, "{{ 1 / 0 }}", "two\nlines")
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@pytest.fixture
def page_at(chromium):
    """Opens an address at a width and in a scheme; at the end no page has complained, but of what a test expects."""
    contexts, complaints = [], []

    def open_page(url, width=1280, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.complaints, page.asked = complaints, []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def fits(page):
    width, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= room, f"{width} px in a window of {room}"


def with_pictures(found, most=400, size=(24, 24)):
    """Writes the first of its images."""
    for file, label in list(zip(found.files, found.given, strict=True))[:most]:
        path = found.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", size, "teal")
        ImageDraw.Draw(image).text((4, 4), str(label), "white")
        image.save(path)
    return found


# -- review ------------------------------------------------------------------------------------------------------------


class Reviewer:
    """`flywheel-fast review` as a process of its own, and a page of it."""

    def __init__(self, run, page_at, **look):
        self.process = begin("review", run, stdout=subprocess.PIPE)
        self.url = re.search(r"http://127\.0\.0\.1:\d+/\S+/", self.process.stdout.readline()).group()
        self.page = page_at(self.url, **look)

    def __enter__(self):
        return self.page

    def __exit__(self, *error):
        """Nobody looks any more when it ends."""
        self.page.close()
        self.end(signal.SIGKILL)

    def end(self, how) -> str:
        self.process.send_signal(how)
        return self.process.communicate(timeout=60)[0]


@pytest.fixture
def reviewed_run(tmp_path):
    found = with_pictures(drawn(200, 3, tmp_path / "images"))
    return make_run(tmp_path / "run", found, config="name: made\ndata: {reviews: null}\n")


def decided(page, count):
    from playwright.sync_api import expect

    expect(page.locator("#count")).to_have_text(re.compile(f"^{count} decided"), timeout=60_000)


def state(run):
    found = audit.read_labels(run / "labels")
    return reviews.of_manifest(run / "reviews.csv", Manifest(found.root, found.files, found.given, found.classes))


def test_fifty_decisions_a_reload_and_a_kill_and_nothing_is_lost(reviewed_run, page_at):
    server = Reviewer(reviewed_run, page_at)
    page = server.page
    decided(page, 0)
    first = [page.inner_text("#title"), page.inner_text("#facts")]
    keys = list("aakdaauakd") * 3
    for key in keys[:20]:
        page.keyboard.press(key)
    decided(page, 20)
    page.reload()
    decided(page, 20)
    for key in keys[20:]:
        page.keyboard.press(key)
    decided(page, 30)
    before = state(reviewed_run)
    assert np.count_nonzero(before == DROPPED) == 6 and np.count_nonzero(before >= 0) == 21
    server.end(signal.SIGKILL)
    assert np.array_equal(state(reviewed_run), before)

    page.keyboard.press("k")  # nobody is there to save it
    page.wait_for_selector("#error:not([hidden])")
    assert "the server has ended" in page.inner_text("#error")
    decided(page, 30)
    assert page.complaints and all("ERR_CONNECTION" in text for text in page.complaints)
    page.close()
    page.complaints.clear()

    server = Reviewer(reviewed_run, page_at)
    page = server.page
    decided(page, 30)
    for number in range(20):
        page.keyboard.press("p")
        page.keyboard.type(f"class {number % 3}")
        page.keyboard.press("Enter")
    decided(page, 50)
    assert np.count_nonzero(state(reviewed_run) >= 0) == 41
    for _ in range(50):
        page.keyboard.press("z")
    decided(page, 0)
    assert [page.inner_text("#title"), page.inner_text("#facts")] == first
    page.keyboard.press("k")
    decided(page, 1)
    page.close()
    said = server.end(signal.SIGINT)
    assert "1 labels reviewed" in said and f"train --resume {reviewed_run} data.reviews=" in said
    rows = reviews.read(reviewed_run / "reviews.csv").rows
    assert [row.decision for row in rows].count("undo") == 50 and len(rows) == 101
    assert np.count_nonzero(state(reviewed_run) != NOT_REVIEWED) == 1


def test_every_way_to_decide(reviewed_run, page_at):
    found = audit.read_labels(reviewed_run / "labels")
    with Reviewer(reviewed_run, page_at) as page:

        def at_cursor():
            return found.files.tolist().index(page.locator("#facts dd").first.inner_text())

        decided(page, 0)
        sample = at_cursor()
        page.keyboard.press("Enter")
        decided(page, 1)
        assert state(reviewed_run)[sample] == found.suggested[sample]
        sample = at_cursor()
        page.click("button[data-do=drop]")
        decided(page, 2)
        assert state(reviewed_run)[sample] == DROPPED
        page.keyboard.press("n")
        title = page.inner_text("#title")
        page.keyboard.press("b")
        page.click("#next")
        assert page.inner_text("#title") == title
        sample = at_cursor()
        page.keyboard.press("ArrowRight")
        assert at_cursor() != sample
        page.keyboard.press("ArrowLeft")
        assert at_cursor() == sample
        page.keyboard.press("?")
        page.wait_for_selector("dialog#help[open]")
        page.keyboard.press("k")  # decides nothing while the help is open
        page.keyboard.press("Escape")
        page.keyboard.press("p")
        page.keyboard.type("no such class")
        page.keyboard.press("Enter")
        page.keyboard.press("Escape")
        page.click("button[data-do=pick]")
        page.click("#choices button >> nth=2")
        decided(page, 3)
        assert state(reviewed_run)[sample] == 2
        page.keyboard.press("Control+z")
        decided(page, 2)
        page.locator(".tile").last.click()
        sample = at_cursor()
        page.keyboard.press("k")
        decided(page, 3)
        assert state(reviewed_run)[sample] == found.given[sample]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_review_of_odd_names_fits_and_runs_none_of_them(tmp_path, page_at, width):
    given = np.arange(60) % 6
    found = labels(given, (given + 1) % 6, [0.01] * 60, true=given, classes=NASTY, root=tmp_path / "images")
    with_pictures(found, 30)
    run = make_run(tmp_path / "run", found, config="data: {}\n")
    with Reviewer(run, page_at, width=width) as page:
        decided(page, 0)
        for _ in range(12):
            page.keyboard.press("k")
        decided(page, 12)
        for scheme in SCHEMES:
            page.emulate_media(color_scheme=scheme)
            fits(page)
        page.keyboard.press("p")
        assert page.locator("#choices button").count() == 6
        fits(page)
        assert all(url.startswith((page.url, "data:")) for url in page.asked)
        assert all("404" in text for text in page.complaints)  # of pictures that are gone
        page.close()
        page.complaints.clear()
    assert np.count_nonzero(state(run) == found.given) == 12


def test_thousands_of_images_do_not_lag(tmp_path, page_at):
    run = make_run(tmp_path / "run", drawn(30_000, 10, tmp_path / "images"), config="data: {}\n")
    with Reviewer(run, page_at) as page:
        decided(page, 0)
        assert page.locator(".tile").count() <= 24
        took = page.evaluate(
            """() => {
              const start = performance.now();
              for (let i = 0; i < 100; i++) document.dispatchEvent(new KeyboardEvent("keydown", {key: "k"}));
              return (performance.now() - start) / 100;
            }"""
        )
        assert took < 100, f"{took} ms a key"
        decided(page, 100)
        page.close()
        page.complaints.clear()  # there are no pictures


# -- report ------------------------------------------------------------------------------------------------------------


def odd_names(root):
    given = np.arange(60) % 6
    return labels(given, (given + 1) % 6, [0.01] * 60, true=given, classes=NASTY, root=root)


def many_classes(root):
    return drawn(3000, 300, root)


def no_suspects(root):
    given = np.arange(100) % 4
    return labels(given, given, [0.99] * 100, true=given, classes=tuple("abcd"), root=root)


def many_suspects(root):
    given = np.arange(100_000) % 10
    return labels(given, (given + 1) % 10, [0.01] * 100_000, classes=[f"class {k}" for k in range(10)], root=root)


@pytest.mark.parametrize("kind", [odd_names, many_classes, no_suspects, many_suspects])
def test_the_report_fits_and_asks_for_nothing(tmp_path, page_at, kind):
    found = kind(tmp_path / "images")
    with_pictures(found, size=(96, 72))
    path = report.write([make_run(tmp_path / "run", found)])
    assert path.stat().st_size < 5_000_000
    for width in WIDTHS:
        for scheme in SCHEMES:
            page = page_at(path.as_uri(), width, scheme)
            fits(page)
            assert page.locator("h2").count() >= 7
            assert [url for url in page.asked if not url.startswith("data:")] == [path.as_uri()]
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_comparison_fits(tmp_path, page_at):
    runs = [make_run(tmp_path / name, drawn(300, 5, tmp_path)) for name in ("a", "b" * 100)]
    path = report.write(runs, tmp_path / "comparison.html")
    for width in WIDTHS:
        fits(page_at(path.as_uri(), width))
