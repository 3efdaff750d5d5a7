"""The review page in real browsers, driven by keys: what a key says is shown and sent."""

import re
import time

import pytest
from review_page import EVIL, PAGE, await_answers, badges, cursor, opened, said, shown, state_of


def test_keys_do_what_the_help_says(browser, serve):
    server = opened(browser, serve())
    browser.key("?")
    names = browser.js("[...document.querySelectorAll('#list kbd')].map((one) => one.textContent)")
    browser.keys("M", "Space", "Z", "C")  # nothing happens under the list
    assert shown(browser, "help")
    browser.key("?")
    assert not shown(browser, "help") and badges(browser) == "-" * 24

    tried = {"?"}
    browser.keys("M", "L", "U", "X")
    assert badges(browser) == "MLUX" + "-" * 20 and cursor(browser) == 4
    browser.key("Z")
    assert badges(browser) == "MLU" + "-" * 21 and cursor(browser) == 3
    tried |= {"M", "L", "U", "X", "Z"}
    for key, place in (("Down", 9), ("Right", 10), ("Up", 4), ("Left", 3), ("Up", 3), ("Down", 9)):
        browser.key(key)
        assert cursor(browser) == place
    tried.add("Arrows")
    browser.key("C")
    browser.wait("document.querySelector('#context img').naturalWidth === 640")
    browser.wait("document.querySelector('#overview img').naturalWidth")
    assert not shown(browser, "gallery") and "256 µm" in browser.text() and "Cell 10 of 60" in browser.text()
    browser.key("M")  # the next cell is shown large
    assert "Cell 11 of 60" in browser.text() and "Cell 10: mitosis" in said(browser)
    browser.key("Escape")
    assert badges(browser) == "MLU------M" + "-" * 14 and cursor(browser) == 10
    tried |= {"C", "Escape"}
    browser.key("Shift+L")
    assert badges(browser) == "MLULLLLLLM" + "L" * 14
    tried.add("Shift+M L U X")
    browser.key("Space")
    assert cursor(browser) == 24 and badges(browser) == "-" * 24
    browser.key("Shift+Space")
    assert cursor(browser) == 0 and "first page" not in said(browser)
    browser.key("Shift+Space")
    assert cursor(browser) == 0 and "first page" in said(browser)
    browser.keys("Space", "Space")
    assert cursor(browser) == 48 and len(badges(browser)) == 12
    browser.key("Space")
    browser.wait("document.querySelectorAll('#facts li').length > 2")
    assert shown(browser, "closing")
    browser.keys("M", "Shift+Space")
    assert cursor(browser) == 48 and badges(browser) == "-" * 12
    tried |= {"Space", "Shift+Space"}
    assert tried == set(names)

    rest = [item for item in range(24) if item not in (0, 1, 2, 9)]
    first = [(0, "M"), (1, "L"), (2, "U"), (3, "X"), (3, None), (9, "M")]
    await_answers(server, *first, *((item, "L") for item in rest))
    browser.open(server.url)  # and it goes on where it was left
    browser.wait("document.querySelector('.here')")
    assert cursor(browser) == 24 and "24 of 60" in browser.text()


def test_an_undo_takes_back_the_right_cell(chromium, serve):
    server = opened(chromium, serve())
    chromium.keys("M", "L", "Left", "Left", "U")  # the first cell was a mitosis, now unsure
    assert badges(chromium)[:3] == "UL-"
    chromium.keys("Right", "Right", "Down", "Shift+X", "Space", "M")
    chromium.key("Z")
    assert cursor(chromium) == 24 and badges(chromium) == "-" * 24
    chromium.key("Z")  # the page that one key filled, and only what it filled
    assert badges(chromium) == "UL" + "-" * 22 and "22 cells" in said(chromium) and cursor(chromium) == 2
    chromium.key("Z")
    assert badges(chromium) == "ML" + "-" * 22 and cursor(chromium) == 0
    chromium.keys("Z", "Z")
    assert badges(chromium) == "-" * 24 and cursor(chromium) == 0
    chromium.key("Z")
    assert "Nothing to take back" in said(chromium)
    page = [(item, letter) for letter in ("X", None) for item in range(2, 24)]
    known = [
        (0, "M"),
        (1, "L"),
        (0, "U"),
        *page[:22],
        (24, "M"),
        (24, None),
        *page[22:],
        (0, "M"),
        (1, None),
        (0, None),
    ]
    await_answers(server, *known)


def test_shift_marks_only_the_cells_of_the_page_without_answer(chromium, serve):
    server = serve(30)
    server.answers = [{"item": 3, "answer": "M"}, {"item": 26, "answer": "U"}]
    opened(chromium, server)
    chromium.key("Shift+L")
    assert badges(chromium) == "LLLM" + "L" * 20
    chromium.key("M")  # the cursor is at the end: a key too many changes nothing
    assert badges(chromium) == "LLLM" + "L" * 20 and "at its end" in said(chromium)
    chromium.key("Shift+U")
    assert badges(chromium) == "LLLM" + "L" * 20
    chromium.keys("Space", "C", "Shift+M", "Escape")  # a page that is not in sight is not marked
    assert badges(chromium) == "--U---"
    await_answers(server, (3, "M"), (26, "U"), *((item, "L") for item in range(24) if item != 3))


def test_a_held_key_is_one_key(chromium, serve):
    server = opened(chromium, serve())
    for key, shown_then in (("M", "M-"), ("L", "ML"), ("Z", "M-"), ("Space", "--"), ("U", "U-")):
        chromium.key(key)
        for _ in range(3):
            chromium.key(key, held=True)
        assert badges(chromium) == shown_then + "-" * 22
    chromium.wait("document.body.innerText.includes('all saved')")
    assert server.pairs() == [(0, "M"), (1, "L"), (1, None), (24, "U")]


def test_the_cursor_returns_to_a_cell_left_out(chromium, serve):
    opened(chromium, serve(8))
    chromium.keys("Right", "Right", *"LLLLLL")
    assert cursor(chromium) == 0 and badges(chromium) == "--LLLLLL"
    chromium.keys("M", "M")
    assert cursor(chromium) == 2  # the next cell; what is answered is not skipped


def test_answers_come_in_order_with_the_time_that_they_took(chromium, serve):
    server = opened(chromium, serve())
    chromium.key("X")
    await_answers(server, (0, "X"))
    start = time.monotonic()
    time.sleep(0.7)
    chromium.key("M")
    one = time.monotonic() - start
    start = time.monotonic()
    chromium.keys(*"LULMXUL")
    await_answers(server, (0, "X"), (1, "M"), *((2 + place, letter) for place, letter in enumerate("LULMXUL")))
    seconds = [row["seconds"] for row in server.answers]
    assert 0.69 <= seconds[1] <= one + 0.3
    assert sum(seconds[2:]) <= time.monotonic() - start + 0.1
    time.sleep(0.5)
    chromium.key("Shift+L")  # the time of one key is shared by the cells that it answers
    await_answers(server, *server.pairs()[:9], *((item, "L") for item in range(9, 24)))
    shares = [row["seconds"] for row in server.answers[9:]]
    assert len(set(shares)) == 1 and 0.5 <= sum(shares) + 0.2 <= 3
    rate = int(re.search(r"(\d+) cells per minute", chromium.text())[1])
    total = sum(row["seconds"] for row in server.answers)
    assert rate == pytest.approx(24 / total * 60, rel=0.1)


def test_pictures_of_the_next_page_are_loaded_ahead(chromium, serve):
    server = opened(chromium, serve(80))
    end = time.monotonic() + 10
    while len({path for path in server.asked if path.startswith("/crop/")}) < 48:
        assert time.monotonic() < end
        time.sleep(0.02)
    asked = [int(re.search(r"\d+", path)[0]) for path in server.asked if path.startswith("/crop/")]
    assert sorted(asked) == list(range(48))
    server.asked.clear()
    chromium.key("Space")
    chromium.wait("document.querySelectorAll('.cell img').length === 24")
    assert chromium.js("[...document.querySelectorAll('.cell img')].every((one) => one.complete && one.naturalWidth)")
    assert not [path for path in server.asked if re.match(r"/crop/(2[4-9]|3\d|4[0-7])\.", path)]


def test_text_is_never_run_and_nothing_leaves_the_page(chromium, serve):
    state = state_of(3, title=EVIL, reader=EVIL)
    for item in state["items"]:
        item["hint"] = EVIL
    server = serve(3, **state)
    chromium.open("about:blank")
    chromium.events.clear()
    opened(chromium, server)
    chromium.keys("M", "C")
    chromium.wait("document.querySelector('#context img')?.naturalWidth")
    assert EVIL in chromium.text() and EVIL in chromium.js("document.querySelector('.hint').textContent")
    chromium.keys("Escape", "Space")
    chromium.wait("document.querySelectorAll('#facts li').length > 2")
    assert f"Written: {EVIL}" in chromium.text()
    assert chromium.js("document.title") == f"Review: {EVIL}" and chromium.js("document.scripts.length") == 1
    requests = [
        event["params"]["request"]["url"] for event in chromium.events if event["method"] == "Network.requestWillBeSent"
    ]
    origin = f"http://127.0.0.1:{server.server_port}/"
    assert len(requests) > 5 and all(url.startswith((origin, "data:,")) for url in requests), requests
    assert not [event for event in chromium.events if event["method"] == "Runtime.exceptionThrown"]


def test_the_closing_page_says_what_was_written_and_copies_the_command(chromium, serve):
    opened(chromium, serve(2))
    chromium.keys("M", "Space")
    chromium.wait("document.querySelector('#command').textContent")
    text = chromium.text()
    assert "Labels changed: 12" in text and "9.5 minutes" in text and "Cell 2 is the first without" in text
    origin = chromium.js("location.origin")
    chromium.call(
        "Browser.grantPermissions", origin=origin, permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    chromium.js("document.getElementById('copy').focus()")
    chromium.key("Enter")
    chromium.wait("document.getElementById('said').textContent.includes('copied')")
    assert chromium.js("navigator.clipboard.readText()") == "python review.py --collect 'a b.csv'"
    chromium.key("Z")
    assert cursor(chromium) == 0 and badges(chromium) == "--"


def test_a_screen_reader_is_told(chromium, serve):
    state = state_of(30)
    state["items"][0]["hint"] = "mitosis, p 0.83"
    opened(chromium, serve(30, **state))
    label = "document.activeElement.getAttribute('aria-label')"
    assert chromium.js(label) == "Cell 1 of 30: no answer. mitosis, p 0.83"
    chromium.key("M")
    assert chromium.js(label) == "Cell 2 of 30: no answer" and said(chromium) == "Cell 1: mitosis. 1 of 30 answered."
    assert chromium.js("document.getElementById('said').ariaLive") == "polite"
    assert chromium.js("document.getElementById('lost').role") == "alert"
    assert chromium.js("[...document.images].every((one) => one.alt.length > 3)")
    assert chromium.js("getComputedStyle(document.activeElement).outlineWidth") == "4px"
    chromium.key("Tab")  # out of the gallery: one cell alone is in the order of Tab
    assert "mitosis" in chromium.js("document.activeElement.textContent")
    chromium.key("Enter")  # the button does what its key does
    assert badges(chromium)[:3] == "MM-" and cursor(chromium) == 2


def test_it_fits_a_laptop_and_scrolls_on_a_phone(chromium, serve):
    opened(chromium, serve())
    try:
        for height in (768, 620):
            chromium.size(1366, height)
            assert chromium.js("document.documentElement.scrollHeight") <= height
            assert chromium.js("document.documentElement.scrollWidth") <= 1366
        chromium.size(390, 844)
        chromium.wait("document.documentElement.scrollWidth <= 390")
        chromium.key("Down")
        assert cursor(chromium) == 3  # three columns
    finally:
        chromium.size(1366, 768)


def test_the_page_is_one_small_file_of_its_own():
    text = PAGE.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 400 and max(map(len, lines)) <= 120
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|https?://|@import", text
    )
    assert text.count("/*DATA*/null") == 1 and "default-src 'none'" in text
