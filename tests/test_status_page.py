"""The web pages in a real browser: what they show and change, and how they look."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.ground.browser import DARK, DESKTOP, LIGHT, PHONE, chromium, visit
from tests.ground.models import noise
from tests.ground.needs import needs, require
from tests.ground.node import Node
from tests.ground.origin import Status
from tests.ground.scripted import Scripted, heard
from tests.ground.site import MIB, PATIENCE_SECONDS, Ground
from tests.ground.weights import safetensors

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = needs("chromium")
TOKEN = "canary-token-of-the-operator"
HOSTILE = "<img src=x onerror=document.title='taken'><script>document.title='taken'</script>"
Alone = Callable[..., Ground]
Visit = Callable[..., AbstractContextManager["Page"]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require("chromium")
    with chromium() as started:
        yield started


@pytest.fixture
def visitor(browser: Browser) -> Visit:
    """Opens a page of a node: `with visitor(node.url) as page`."""
    return partial(visit, browser)


def expect(locator: Locator) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def row(page: Page, name: str) -> Locator:
    """The row of a model."""
    return page.get_by_role("listitem").filter(has=page.get_by_role("heading", name=name))


def state(page: Page, name: str) -> Locator:
    return row(page, name).locator("[data-at=state]")


def button(page: Page, action: str, name: str) -> Locator:
    return page.get_by_role("button", name=f"{action} {name}", exact=True)


def ask_for(page: Page, ref: str, name: str) -> None:
    """Fill in the form and send it."""
    page.get_by_role("textbox", name="Model", exact=True).fill(ref)
    page.get_by_role("textbox", name="Name", exact=True).fill(name)
    page.get_by_role("button", name="Pull", exact=True).click()


def agree(page: Page, label: str) -> None:
    page.get_by_role("dialog").get_by_role("button", name=label).click()


def two_revisions(ground: Ground, name: str) -> None:
    """A model whose name moved to a second revision."""
    for number in (1, 2):
        files = {"config.json": b"{}", "model.safetensors": noise(MIB, number)}
        ground.hub.tag(f"org/{name}", f"v{number}", ground.hub.add(f"org/{name}", files))
        ref = f"hf://org/{name}@v{number}"
        ground.node.pull(ref, name=name, replace=True)
        ground.node.wait_for("pull ended", name=name, ref=ref)


# --- in a browser: what it shows and changes ---


def test_a_pull_moves_its_bar_and_ends_ready(ground: Ground, visitor: Visit) -> None:
    ref = ground.add("moving.bin")
    hold = ground.origin.hold("/moving.bin", after=3 * MIB)
    with visitor(ground.node.url) as page:
        ask_for(page, ref, "moving")
        expect(page.get_by_text("has begun")).to_be_visible()
        assert hold.reached.wait(PATIENCE_SECONDS)
        expect(state(page, "moving")).to_have_text("downloading")
        bar = page.get_by_role("progressbar", name="Progress of moving")
        page.wait_for_function("bar => bar.value > 0 && bar.value < bar.max", arg=bar.element_handle())
        expect(row(page, "moving")).to_contain_text("of 6.3 MB")
        hold.release()
        expect(state(page, "moving")).to_have_text("ready")
        expect(bar).to_be_hidden()
        expect(page.locator("#news")).to_contain_text("moving is ready.")
        expect(row(page, "moving")).to_contain_text(ref)
    assert ground.show("moving")["state"] == "ready"


def test_a_pin_is_set_and_taken_away_by_the_keyboard_alone(ground: Ground, visitor: Visit) -> None:
    ground.have("kept.bin")
    with visitor(ground.node.url) as page:
        button(page, "Pin", "kept.bin").focus()
        page.keyboard.press("Enter")
        expect(row(page, "kept.bin").get_by_text("pinned", exact=True)).to_be_visible()
        assert ground.show("kept.bin")["pinned"]
        expect(button(page, "Unpin", "kept.bin")).to_be_focused()
        page.keyboard.press("Enter")
        expect(row(page, "kept.bin").get_by_text("pinned", exact=True)).to_be_hidden()
        assert not ground.show("kept.bin")["pinned"]


def test_a_failure_shows_its_reason_and_hint_and_is_pulled_again(ground: Ground, visitor: Visit) -> None:
    ref = ground.add("lost.bin")
    ground.origin.fault("/lost.bin", Status(404))
    with visitor(ground.node.url) as page:
        ask_for(page, ref, "lost")
        expect(state(page, "lost")).to_have_text("failed")
        error = ground.show("lost")["pull"]["error"]
        for text in (error["detail"], error["hint"], error["code"]):
            expect(row(page, "lost")).to_contain_text(text)
        ground.add("lost.bin")
        ground.origin.clear()
        button(page, "Pull again", "lost").click()
        expect(state(page, "lost")).to_have_text("ready")
        expect(row(page, "lost").get_by_text(error["detail"])).to_be_hidden()


def test_what_a_preflight_found_is_shown_as_text(ground: Ground, visitor: Visit) -> None:
    ground.hub.add("org/cut", {"config.json": b"{}", "model.safetensors": safetensors(100) + b"more"})
    ground.node.pull("hf://org/cut", name="cut")
    ground.node.ready("cut")
    with visitor(ground.node.url) as page:
        finding = "refused: model.safetensors: its tensors take 100 bytes, and 104 follow the header"
        expect(row(page, "cut").get_by_text(finding)).to_be_visible()


def test_a_rollback_and_a_delete_are_done_when_they_are_confirmed(ground: Ground, visitor: Visit) -> None:
    two_revisions(ground, "blue")
    with visitor(ground.node.url) as page:
        for action in ("Roll back", "Delete"):
            button(page, action, "blue").click()
            agree(page, "Cancel")
        assert ground.show("blue")["ready"]["ref"] == "hf://org/blue@v2"
        button(page, "Roll back", "blue").click()
        agree(page, "Roll back")
        expect(row(page, "blue")).to_contain_text("hf://org/blue@v1")
        assert ground.show("blue")["ready"]["ref"] == "hf://org/blue@v1"
        button(page, "Delete", "blue").click()
        agree(page, "Delete")
        expect(row(page, "blue")).to_have_count(0)
    assert ground.node.ask("GET", "/v1/models/blue").status == 404


def test_what_the_daemon_refuses_is_shown_with_its_hint(ground: Ground, visitor: Visit) -> None:
    ground.have("pinned.bin")
    ground.node.ask("PUT", "/v1/models/pinned.bin/pin")
    with visitor(ground.node.url) as page:
        button(page, "Delete", "pinned.bin").click()
        agree(page, "Delete")
        answer = ground.node.ask("DELETE", "/v1/models/pinned.bin").document
        expect(page.locator("#said")).to_contain_text(answer["detail"])
        expect(page.locator("#said")).to_contain_text(f"code: {answer['code']}")
    assert ground.show("pinned.bin")["state"] == "ready"


def test_the_disk_and_the_memory_are_shown(ground: Ground, visitor: Visit) -> None:
    ground.have("sized.bin")
    with visitor(ground.node.url) as page:
        total = ground.node.ask("GET", "/v1/capacity").document["total_bytes"]
        shown = page.evaluate("count => import('/assets/text.js').then(text => text.bytes(count))", total)
        expect(page.locator("#disk-text")).to_contain_text(f"of {shown} free")
        expect(page.locator("#memory-text")).to_contain_text("of the ready models are in the page cache")
        widths = "bar => [...bar.children].map(each => each.getBoundingClientRect().width)"
        assert sum(page.locator("#disk").evaluate(widths)) == pytest.approx(
            page.locator("#disk").evaluate("bar => bar.clientWidth"), abs=1
        )


# --- tokens ---


@pytest.fixture
def guarded(tmp_path: Path, node: Callable[..., Node]) -> Callable[..., Node]:
    """Starts daemons that know one token."""
    tokens = tmp_path / "tokens"
    tokens.write_text(json.dumps({"tokens": [{"name": "operator", "role": "admin", "token": TOKEN}]}))
    return partial(node, token_file=str(tokens))


def test_a_wrong_token_changes_nothing_and_the_right_one_stays_in_memory(
    guarded: Callable[..., Node], ground: Ground, visitor: Visit
) -> None:
    node, ref = guarded(), ground.add("asked.bin")
    with visitor(node.url) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for token, problem in (("", "the request has none"), ("wrong", "is unknown"), ("日本", "characters")):
            page.get_by_label("Token").fill(token)
            page.get_by_label("Token").blur()
            ask_for(page, ref, "asked")
            expect(page.locator("#said")).to_contain_text(problem)
            expect(page.locator("#said")).to_contain_text("code: unauthorized")
        assert node.ask("GET", "/v1/models").document["models"] == []
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_label("Token").press("Enter")
        ask_for(page, ref, "asked")
        expect(state(page, "asked")).to_have_text("ready")
        kept = (
            "[document.cookie, JSON.stringify(localStorage), JSON.stringify(sessionStorage), location.href]"
        )
        assert TOKEN not in " ".join([*page.evaluate(kept), *asked])
        page.reload()
        ask_for(page, ref, "asked")
        expect(page.locator("#said")).to_contain_text("the request has none")


def test_where_reads_need_a_token_too_the_page_opens_and_asks_for_it(
    guarded: Callable[..., Node], visitor: Visit
) -> None:
    node = guarded(anonymous_reads=False)
    for path, shown in (("/", "No model is here yet."), ("/docs", "PUT/v1/limits")):
        with visitor(node.url, path) as page:
            expect(page.get_by_text("this call needs a bearer token with the role read")).to_be_visible()
            page.get_by_label("Token").fill(TOKEN)
            page.get_by_label("Token").press("Enter")
            expect(page.get_by_text(shown)).to_be_visible()


# --- what others write ---


def test_no_text_of_others_becomes_html(alone: Alone, visitor: Visit) -> None:
    ground = alone()
    ground.have("leased.bin")
    ground.node.ask("POST", "/v1/models/leased.bin/leases", {"seconds": 600, "holder": HOSTILE})

    def answers(connection: socket.socket, _: int) -> None:
        while heard(connection):
            connection.sendall(f"HTTP/1.1 404 {HOSTILE}\r\nContent-Length: 0\r\n\r\n".encode())

    with Scripted(answers) as origin:
        ground.node.pull(f"{origin.url}/x", name="failing")
        ground.node.ready("failing")
    with visitor(ground.node.url) as page:
        expect(row(page, "leased.bin")).to_contain_text(HOSTILE)
        expect(row(page, "failing")).to_contain_text(HOSTILE)
        ask_for(page, HOSTILE, HOSTILE)
        expect(page.locator("#said")).to_contain_text("code: ")
        page.locator("#filter").fill(HOSTILE)
        assert page.locator("main img, main script").count() == 0
        assert page.title() == f"cachd on {ground.node.url.removeprefix('http://')}"


def test_text_that_would_become_html_is_refused_by_the_browser_itself(
    ground: Ground, browser: Browser
) -> None:
    """Of the test above: should a change forget to write text as text, the page's policy still holds."""
    for path in ("/", "/docs"):
        with visit(browser, ground.node.url, path, provoked="TrustedHTML") as page:
            for sink in ("innerHTML", "outerHTML"):
                attempt = f"document.querySelector('main').{sink} = '<b>taken</b>'"
                assert "TrustedHTML" in page.evaluate(
                    f"(() => {{ try {{ {attempt} }} catch (e) {{ return String(e) }} }})()"
                )


# --- how often it asks ---


def test_a_page_that_nobody_sees_asks_for_nothing(ground: Ground, browser: Browser) -> None:
    with visit(browser, ground.node.url) as page:
        page.clock.install()
        page.reload()
        expect(page.locator("#space")).to_be_visible()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        with page.expect_response("**/v1/capacity"):
            page.clock.fast_forward(60_000)
        assert any("/v1/models?" in url for url in asked)
        set_hidden(page, True)
        asked.clear()
        page.clock.run_for(600_000)
        assert asked == []
        with page.expect_response("**/v1/models?**"):
            set_hidden(page, False)


def set_hidden(page: Page, whether: bool) -> None:
    """Say that another tab is in front: without windows, the browser has no other way."""
    page.evaluate(
        """hidden => {
            Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        whether,
    )


def test_a_daemon_that_is_gone_is_said_and_asked_again(node: Callable[..., Node], browser: Browser) -> None:
    running = node(listen="127.0.0.1:0")
    with visit(browser, running.url) as page:
        expect(page.locator("#space")).to_be_visible()
        page.clock.install()
        page.reload()
        expect(page.locator("#space")).to_be_visible()
        address = running.url.removeprefix("http://")
        running.stop()
        page.clock.fast_forward(60_000)
        expect(page.locator("#connection")).to_have_text("The daemon does not answer.")
        running.configure(**{**running.options, "listen": address})
        running.start()
        page.clock.fast_forward(60_000)
        expect(page.locator("#connection")).to_be_hidden()


def test_every_page_of_many_models_is_read_and_the_first_are_shown(alone: Alone, browser: Browser) -> None:
    ground = alone(allow=[])
    count = 501
    with ThreadPoolExecutor(8) as callers:
        for number in range(count):
            callers.submit(ground.node.pull, f"https://10.0.0.1/{number}", name=f"m{number}")
    with visit(browser, ground.node.url) as page:
        expect(page.locator("#counts")).to_contain_text(re.compile(rf"^{count} failed$"))
        expect(page.locator("#more")).to_contain_text(f"{count - 200} more models match")
        assert page.locator(".model").count() == 200
        page.locator("#filter").fill("m500")
        expect(page.locator(".model")).to_have_count(1)


# --- events ---


def test_events_are_shown_where_the_daemon_has_them(ground: Ground, browser: Browser) -> None:
    has_them = "/v1/events" in ground.node.ask("GET", "/openapi.json").document["paths"]
    with visit(browser, ground.node.url) as page:
        with page.expect_response("**/v1/events") as answered:
            page.reload()
        assert (answered.value.status == 404) != has_them
        if has_them:
            ground.have("eventful.bin")
            line = page.locator("#events li", has_text="eventful.bin").filter(has_text="pull ready")
            expect(line.first).to_be_visible()
            expect(state(page, "eventful.bin")).to_have_text("ready")
        else:
            expect(page.locator("#space")).to_be_visible()
            expect(page.locator("#events-section")).to_be_hidden()


# --- how it looks ---

# Texts whose contrast is below 4.5:1 (WCAG 2.2, success criterion 1.4.3), each with its ratio.
FAINT = """
() => {
  const rgba = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(value => value / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!hasText && !element.placeholder || !element.checkVisibility() || element.disabled) continue;
    const style = getComputedStyle(element, element.placeholder ? "::placeholder" : null);
    const pair = [light(rgba(style.color)), light(behind(element))].sort((a, b) => b - a);
    const ratio = (pair[0] + .05) / (pair[1] + .05);
    if (ratio < 4.5) found.push([element.tagName, element.textContent || element.placeholder, ratio]);
  }
  return found;
}
"""
UNNAMED = """
() => [...document.querySelectorAll("input, button, a, progress, [role=img]")]
  .filter(each => each.checkVisibility() && !each.labels?.length)
  .filter(each => !each.getAttribute("aria-label") && !each.textContent.trim())
  .map(each => each.outerHTML)
"""


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_each_page_is_readable_on_any_screen(
    ground: Ground, browser: Browser, scheme: str, size: tuple[int, int]
) -> None:
    """No text is faint, none is beyond the edge, and each control has a name."""
    long = "n" * 96
    ground.node.pull(f"https://10.0.0.1/{'a' * 300}/{'b c' * 50}", name=long)
    ground.node.ready(long)
    ground.have("ready.bin")
    with ground.held(f"held-{scheme}-{size[0]}.bin"):
        for path, shown in (("/", state), ("/docs", None)):
            with visit(browser, ground.node.url, path, size=size, scheme=scheme) as page:
                if shown:
                    expect(shown(page, "ready.bin")).to_be_visible()
                else:
                    expect(page.get_by_text("/v1/limits").first).to_be_visible()
                    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
                assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
                assert page.evaluate(FAINT) == []
                assert page.evaluate(UNNAMED) == []
                background = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 300) == (scheme == DARK)


def test_the_page_of_the_api_describes_every_call(ground: Ground, browser: Browser) -> None:
    document = ground.node.ask("GET", "/openapi.json").document
    calls = {f"{method.upper()}{path}" for path, calls in document["paths"].items() for method in calls}
    with visit(browser, ground.node.url, "/docs") as page:
        expect(page.locator("#version")).to_have_text(document["info"]["version"])
        assert {*page.locator("#calls summary").all_text_contents()} == calls
        page.locator("#calls summary", has_text="PUT/v1/limits").click()
        page.get_by_role("link", name="AskedLimits").click()
        expect(page.get_by_text("limit for all sources together")).to_be_visible()
