"""The chat page in headless Chromium: it streams, stops, tells errors, and fits keyboards, screen readers and both themes.

ATTNSPAN_CHAT=ARTEFACT lets the last test talk to that artefact (the demo model's) and keep docs/pictures/chat.png.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_chat import FakeChat, serve
from PIL import Image
from server_sample import ROOT, running
from tiny_models import export_tiny

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra dev)")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromium-driver (Debian packages) on PATH")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --force-color-profile=srgb"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "--window-size=1100,820"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def fake(browser: Any) -> Iterator[FakeChat]:
    server = FakeChat(delay=0.01)
    with serve(server.app) as url:
        open_page(browser, url)
        yield server
        browser.get("about:blank")


def open_page(browser: Any, url: str) -> None:
    browser.get(url)
    wait(browser, lambda: browser.execute_script("return document.title") != "attnspan chat")


def wait(browser: Any, condition: Any, seconds: float = 60) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds, poll_frequency=0.05).until(lambda _: condition())


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


def ask(browser: Any, text: str, tokens: int = 12) -> None:
    field = find(browser, "#tokens")
    field.clear()
    field.send_keys(str(tokens))
    find(browser, "#input").send_keys(text + "\n")


def errors(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_conversation(browser: Any, fake: FakeChat) -> None:
    errors(browser)
    assert find(browser, "#model").text == "fake"
    ask(browser, "Tell me <b>about</b> the sea", 40)
    wait(browser, lambda: texts(browser, ".figures"))
    (answer,) = texts(browser, ".assistant .text")
    assert len(answer.split()) == 40
    assert texts(browser, ".assistant strong")[0] == "but"
    assert texts(browser, ".assistant code")[0] == "why"
    assert texts(browser, ".user") == ["Tell me <b>about</b> the sea"]
    (figures,) = texts(browser, ".figures")
    assert figures.startswith("40 tokens · ")
    assert " tokens/s · first after 0." in figures
    assert figures.endswith("cut at the most tokens")
    assert find(browser, "#memory-text").text == "KV 2.90 MB of 7.40 MB dense"
    ask(browser, "And the ship?")
    wait(browser, lambda: len(texts(browser, ".figures")) == 2)
    assert [message["role"] for message in fake.seen[1]["messages"]] == ["user", "assistant", "user"]
    assert fake.seen[0]["stream_options"] == {"include_usage": True}
    assert fake.sessions[0] == fake.sessions[1]
    assert fake.sessions[0]
    find(browser, "#new").click()
    assert texts(browser, ".message") == []
    ask(browser, "A new one")
    wait(browser, lambda: texts(browser, ".figures"))
    assert [message["content"] for message in fake.seen[2]["messages"]] == ["A new one"]
    assert fake.sessions[2] != fake.sessions[0]
    assert errors(browser) == []


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop(browser: Any, fake: FakeChat, by: str) -> None:
    ask(browser, "Go on for ever", 5000)
    wait(browser, lambda: len(texts(browser, ".assistant .text")[0].split()) > 5)
    assert not find(browser, "#send").is_displayed()
    if by == "button":
        find(browser, "#stop").click()
    else:
        find(browser, "#input").send_keys("\ue00c")  # Escape
    wait(browser, lambda: texts(browser, ".figures"))
    assert texts(browser, ".figures")[0].endswith("stopped")
    assert find(browser, "#send").is_displayed()
    wait(browser, lambda: fake.left == 1)  # the server is told
    ask(browser, "Next")
    wait(browser, lambda: len(texts(browser, ".figures")) == 2)


def test_errors_and_another_try(browser: Any, fake: FakeChat) -> None:
    fake.fault = "refused"
    ask(browser, "Anybody there?")
    wait(browser, lambda: texts(browser, "[role=alert]"))
    assert texts(browser, "[role=alert]")[0].startswith("the server is full")
    fake.fault = "lost"
    find(browser, "[role=alert] button").click()
    wait(browser, lambda: texts(browser, ".figures"))
    wait(browser, lambda: texts(browser, "[role=alert]"))
    fake.fault = None
    find(browser, "[role=alert] button").click()
    wait(browser, lambda: texts(browser, ".figures") and not texts(browser, "[role=alert]"))
    assert len(texts(browser, ".assistant")) == 1
    assert [message["content"] for message in fake.seen[-1]["messages"]] == ["Anybody there?"]


def test_themes_and_contrast(browser: Any, fake: FakeChat) -> None:
    """Text has a contrast of 4.5 to its background (WCAG AA) in both themes; the choice is kept."""
    ask(browser, "Hello")
    wait(browser, lambda: texts(browser, ".figures"))
    seen = set()
    for _ in range(3):
        find(browser, "#theme").click()
        label = find(browser, "#theme").get_attribute("aria-label")
        seen.add((label, browser.execute_script("return getComputedStyle(document.body).backgroundColor")))
        for selector in (".user", ".assistant", ".figures", "#send", ".hint", "#model", "#memory-text", "#new"):
            ratio = browser.execute_script(CONTRAST, find(browser, selector))
            assert ratio >= 4.5, (label, selector, ratio)
    assert len({colour for label, colour in seen if "system" not in label}) == 2
    chosen = find(browser, "#theme").get_attribute("aria-label")
    browser.refresh()
    assert find(browser, "#theme").get_attribute("aria-label") == chosen


CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (c) => c.slice(0, 3).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
let at = arguments[0], back = [0, 0, 0, 0];
for (; at && back[3] === 0; at = at.parentElement) {
  const c = parse(getComputedStyle(at).backgroundColor);
  back = c.length === 3 ? [...c, 1] : c;
}
const [a, b] = [light(parse(getComputedStyle(arguments[0]).color)), light(back)].sort((x, y) => y - x);
return (a + 0.05) / (b + 0.05);
"""


def test_names_for_screen_readers_and_small_screens(browser: Any, fake: FakeChat) -> None:
    browser.execute_cdp_cmd("Accessibility.enable", {})
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    names = {(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if not n["ignored"]}
    assert {("textbox", "Message"), ("button", "Send"), ("button", "New chat"), ("log", "Conversation")} <= names
    assert {("spinbutton", "Temperature"), ("spinbutton", "Most tokens"), ("heading", "What would you like to know?")} <= names
    unnamed = {role for role, name in names if role in ("button", "textbox", "spinbutton", "link", "image") and not name}
    assert unnamed == set()
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        ask(browser, "word" * 200)
        wait(browser, lambda: texts(browser, ".figures"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        assert find(browser, "#send").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_real_server(browser: Any, tmp_path: Path) -> None:
    """samples/server serves the page, and tells the page what it shows."""
    kept = os.environ.get("ATTNSPAN_CHAT")
    artefact = Path(kept) if kept else export_tiny(tmp_path).folder
    errors(browser)
    with running(artefact, tmp_path / "log", "--rows", "2", "--model-name", "SmolLM2-135M" if kept else "tiny") as server:
        open_page(browser, server.url)
        field = find(browser, "#temperature")
        field.clear()
        field.send_keys("0")
        ask(browser, "Why is the sky blue? Answer in three sentences.", 96)
        wait(browser, lambda: texts(browser, ".figures"), 180)
        assert re.search(r"tokens? · .* tokens/s · first after", texts(browser, ".figures")[0])
        assert re.fullmatch(r"KV .* of .* dense", find(browser, "#memory-text").text)
        if kept:
            ask(browser, "And why are sunsets red?", 96)
            wait(browser, lambda: len(texts(browser, ".figures")) == 2, 180)
            picture(browser, ROOT / "docs" / "pictures" / "chat.png")
        browser.get("about:blank")
    assert errors(browser) == []


def picture(browser: Any, path: Path) -> None:
    """Write a picture of the page, with a palette: a third of the bytes."""
    shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    shot.quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def test_nothing_from_elsewhere() -> None:
    """The page asks no other host for anything."""
    static = ROOT / "samples" / "server" / "static"
    for file in static.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "//" not in text.replace("// ", ""), file.name
    assert os.path.getsize(static / "chat.js") + os.path.getsize(static / "chat.css") < 30_000
