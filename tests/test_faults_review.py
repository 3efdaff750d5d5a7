"""The review page loses no answer: a server that fails or is gone, pictures and storage that are gone, page mode."""

import re

from review_page import Fake, await_answers, badges, cursor, data_page, opened, said, saved, shown


def test_a_server_that_fails_loses_nothing(chromium, serve):
    server = opened(chromium, serve())
    chromium.key("M")
    chromium.wait("document.body.innerText.includes('all saved')")
    server.fails = 500
    chromium.keys("L", "U", "Z", "X")
    chromium.wait("document.getElementById('lost').checkVisibility()", 2)
    assert "the disk is full" in chromium.text() and "not confirmed: 4" in chromium.text()
    assert badges(chromium)[:3] == "MLX" and len(server.answers) == 1
    server.fails = 0
    await_answers(server, (0, "M"), (1, "L"), (2, "U"), (2, None), (2, "X"))
    chromium.wait("!document.getElementById('lost').checkVisibility()")
    chromium.wait("document.body.innerText.includes('all saved')")


def test_a_server_that_hangs_loses_nothing(chromium, serve):
    server = opened(chromium, serve())
    chromium.key("M")
    chromium.wait("document.body.innerText.includes('all saved')")
    server.hangs.clear()
    chromium.keys("L", "U")
    assert "2 not saved" in chromium.text()  # before it is known that the server hangs
    chromium.wait("document.getElementById('lost').checkVisibility()", 8)
    assert "does not answer" in chromium.text() and "not confirmed: 2" in chromium.text()
    server.hangs.set()
    chromium.wait("document.body.innerText.includes('all saved')")
    last = {row["item"]: row["answer"] for row in server.answers}
    assert last == {0: "M", 1: "L", 2: "U"}  # the answer that hung may have come twice


def test_a_server_that_is_gone_and_comes_back_loses_nothing(browser, serve):
    server = opened(browser, serve())
    browser.key("M")
    browser.wait("document.body.innerText.includes('all saved')")
    port = server.server_port
    server.stop()
    browser.keys("L", "U", "Shift+L", "Z", "X")
    browser.wait("document.getElementById('lost').checkVisibility()", 3)
    assert "does not answer" in browser.text() and f"--port {port}" in browser.text()
    again = Fake(server.state, port)
    try:
        again.answers, again.token = list(server.answers), "another"  # a new server has a new token
        browser.wait("document.getElementById('trouble').textContent.includes('wrong token')")
        assert again.pairs() == [(0, "M")]
        browser.open(f"http://127.0.0.1:{port}/?token=another")  # the old page is left with answers unsent
        page = [(item, letter) for letter in ("L", None) for item in range(3, 24)]
        await_answers(again, (0, "M"), (1, "L"), (2, "U"), *page, (3, "X"))
        browser.wait("document.body.innerText.includes('all saved')")
        assert badges(browser) == "MLUX" + "-" * 20 and cursor(browser) == 4
    finally:
        again.stop()


def test_answers_of_one_queue_never_reach_another(chromium, serve):
    server = opened(chromium, serve())
    server.fails = 500
    chromium.keys("M", "M")
    chromium.wait("document.getElementById('lost').checkVisibility()")
    server.state["queue_sha256"], server.fails = "q2", 0
    opened(chromium, server)
    chromium.key("L")
    await_answers(server, *[(0, "L")])
    server.state["queue_sha256"] = "q1"
    chromium.open(server.url + "&back")
    await_answers(server, (0, "L"), (0, "M"), (1, "M"))


def test_unsent_answers_can_be_saved_as_a_file(chromium, serve):
    server = opened(chromium, serve())
    server.fails = 500
    chromium.keys("M", "L")
    chromium.wait("document.getElementById('lost').checkVisibility()")
    chromium.js("document.querySelector('#lost .save').focus()")
    chromium.key("Enter")
    rows = saved(chromium)
    assert [(row["item"], row["answer"]) for row in rows] == [("0", "M"), ("1", "L")]


def test_a_picture_that_is_gone_is_said_and_takes_only_x(browser, serve):
    server = serve(26)
    server.gone = {1, 5, 25}
    opened(browser, server)
    browser.wait("document.querySelectorAll('.gone').length === 2")
    assert "picture gone" in browser.text() and "a.tif: not found" in browser.text()
    browser.keys("Right", "M")
    assert badges(browser)[1] == "-" and "only answer is X" in said(browser)
    browser.key("X")
    assert badges(browser) == "-X" + "-" * 22
    browser.key("Shift+L")
    assert badges(browser) == "LXLLL-" + "L" * 18 and cursor(browser) == 5
    browser.key("X")
    assert badges(browser)[5] == "X" and browser.js("document.title") == "Review: doubtful labels"


def test_a_page_without_a_server_saves_the_same_columns(browser, tmp_path):
    page = data_page(tmp_path, 30, reader='Dr. "C", ü', **{"pass": 2}).as_uri()
    browser.open(page)
    browser.wait("document.querySelector('.here img')?.naturalWidth")
    browser.keys("M", "L", "Z", "U")
    browser.open(page)  # closed and opened again: the answers are in the browser
    browser.wait("document.querySelector('.here img')?.naturalWidth")
    assert badges(browser) == "MU" + "-" * 22 and cursor(browser) == 2
    browser.keys("C", "X", "Escape")
    browser.js("document.getElementById('csv').focus()")
    browser.key("Enter")
    rows = saved(browser)
    assert [(row["item"], row["answer"]) for row in rows] == [("0", "M"), ("1", "L"), ("1", ""), ("1", "U"), ("2", "X")]
    for row in rows:
        assert row["reader"] == 'Dr. "C", ü' and row["pass"] == "2" and row["queue_sha256"] == "abc123"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["time"]) and 0 <= float(row["seconds"]) < 60
    browser.keys("Space", "Space")
    assert shown(browser, "closing") and "Save the answers as a CSV file" in browser.text()


def test_a_page_without_its_pictures_says_so(chromium, tmp_path):
    page = data_page(tmp_path, 3, reader="none")
    text = page.read_text(encoding="utf-8")
    page.write_text(
        re.sub(r'"1": "data:[^"]*"', '"1": "data:image/jpeg;base64,AAAA"', text).replace('"2": "data:', '"9": "data:')
    )
    chromium.open(page.as_uri())
    chromium.wait("document.querySelectorAll('.gone').length === 2")
    chromium.key("Shift+M")
    assert badges(chromium) == "M--" and cursor(chromium) == 1
    chromium.key("Shift+X")
    assert badges(chromium) == "MXX"


def test_a_browser_that_keeps_nothing_says_so(chromium, tmp_path):
    page = data_page(tmp_path, 3, reader="nowhere")
    text = page.read_text(encoding="utf-8")
    refusal = (
        '<script>Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };</script>'
    )
    page.write_text(text.replace("<script>", refusal + "<script>", 1), encoding="utf-8")
    chromium.open(page.as_uri())
    chromium.wait("document.getElementById('lost').checkVisibility()")
    assert "keeps no answers (QuotaExceededError)" in chromium.text()
    chromium.keys("M", "L")
    chromium.js("document.querySelector('#lost .save').focus()")
    chromium.key("Enter")
    assert [row["answer"] for row in saved(chromium)] == ["M", "L"]


def test_an_empty_queue_and_a_server_without_a_queue_are_said(chromium, serve):
    chromium.open(serve(0).url)
    chromium.wait("document.body.innerText.includes('queue is empty')")
    chromium.keys("M", "Space", "Escape", "Z", "Left")
    assert shown(chromium, "closing")
    server = serve(3)
    del server.state["queue_sha256"]
    chromium.open(server.url)
    chromium.wait("document.body.innerText.includes('queue_sha256 is missing')")
