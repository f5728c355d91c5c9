"""The inspector in a real browser, over a real gateway and embedded pods."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright, expect

from gateway.embedded.fleet import EmbeddedFleet
from tests.crowded import ENGINE, Gate, SmallPod, agent_body, held, of
from tests.programs import program
from tests.served import Running, gateway_over, until
from tests.test_inspector import fill

PATIENCE_MS = 20_000
expect.set_options(timeout=PATIENCE_MS)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium-browser") or program("chromium", "chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        await browser.close()


class Tab:
    """A page, with all that it said and all that it asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    @property
    def rows(self) -> Any:
        return self.page.locator(".row:visible")

    def number(self, state: str) -> Any:
        return self.page.locator(f"#chips [data-state={state}] b")


@asynccontextmanager
async def opened(
    browser: Browser, gateway: Running, *, scheme: Any = "light", path: str = "/ui", **options: Any
) -> AsyncIterator[Tab]:
    """The page, open; when it closes it has asked nothing but the gateway and told no error."""
    context = await browser.new_context(
        viewport={"width": 1440, "height": 900}, color_scheme=scheme, **options
    )
    context.set_default_timeout(PATIENCE_MS)
    try:
        tab = Tab(await context.new_page())
        await tab.page.goto(gateway.url + path)
        yield tab
        assert {url for url in tab.asked if not url.startswith(gateway.url + "/")} == set()
        assert [line for line in tab.said if "401 (Unauthorized)" not in line] == []
    finally:
        await context.close()


def script(*names: str, tokens: int = 40) -> dict[str, str]:
    """An answer that calls these tools."""
    calls = [{"name": name, "arguments": {"command": "ls"}} for name in names]
    return {
        "x-embedded-script": json.dumps({"turns": [{"tool_calls": calls}], "output_tokens": tokens})
    }


async def turn(
    gateway: Running, name: str, tools: tuple[str, ...] = ("bash",), tokens: int = 40, **more: str
) -> None:
    body = agent_body(
        "chat", name, "embedded", tokens=3_000, stream=True, stream_options={"include_usage": True}
    )
    headers = of(name) | {"user-agent": "opencode/1"} | script(*tools, tokens=tokens) | more
    answer = await gateway.post("chat", body, headers=headers)
    assert answer.status == 200


async def test_sessions_appear_as_they_work_and_the_empty_page_says_how_to_begin(
    browser: Browser,
) -> None:
    async with (
        EmbeddedFleet(pods=2, config=ENGINE, speedup=20) as fleet,
        gateway_over(*fleet.urls) as gateway,
        opened(browser, gateway) as tab,
    ):
        page = tab.page
        await expect(page.locator("#empty h2")).to_have_text("No session yet")
        await expect(page.locator("#empty pre")).to_contain_text(
            f"ANTHROPIC_BASE_URL={gateway.url}\n"
        )
        await expect(page.locator("#empty pre")).to_contain_text("--model embedded")
        await page.get_by_role("tab", name="Codex").click()
        await expect(page.locator("#empty pre")).to_contain_text(f'base_url = "{gateway.url}/v1"')
        await expect(page.locator(".pod")).to_have_count(2)

        await turn(gateway, "parent", ("task",), tokens=800)
        await turn(
            gateway, "child", ("bash", "read"), **{"x-cachewise-parent-session-id": "parent"}
        )
        await expect(tab.rows).to_have_count(2)
        await expect(page.locator("#empty")).to_be_hidden()
        await expect(tab.number("tool")).to_have_text("2")
        first, second = tab.rows.nth(0), tab.rows.nth(1)
        await expect(first.locator("b")).to_have_text("OpenCode")
        await expect(first.locator(".what")).to_have_text("task")
        await expect(second.locator("b")).to_have_text("Sub-agent")
        await expect(second.locator(".what")).to_have_text("bash +1")
        await expect(page.locator("[data-tile=sessions] strong")).to_have_text("2")
        await page.locator(".fold:visible").click()
        await expect(tab.rows).to_have_count(1)
        await page.locator("#window").select_option("60")
        await page.wait_for_function(
            "() => { const c = document.getElementById('lanes');"
            " const d = c.getContext('2d').getImageData(0, 0, c.width, 36).data;"
            " const seen = new Set(); for (let i = 0; i < d.length; i += 4)"
            " seen.add(`${d[i]},${d[i + 1]},${d[i + 2]},${d[i + 3]}`);"
            " return seen.has('59,111,224,255') && seen.has('224,161,31,255'); }"
        )  # the turn's answer and the wait for its tool are drawn, each in its colour


async def test_words_and_states_narrow_the_list_and_keys_move_in_it(browser: Browser) -> None:
    async with (
        EmbeddedFleet(pods=1, config=ENGINE, speedup=50) as fleet,
        gateway_over(*fleet.urls) as gateway,
    ):
        for name, tool in (("a", "bash"), ("b", "grep"), ("c", "webfetch")):
            await turn(gateway, name, (tool,))
        await turn(gateway, "d", ())
        async with opened(browser, gateway) as tab:
            page = tab.page
            await expect(tab.rows).to_have_count(4)
            await page.keyboard.press("/")
            await page.keyboard.type("tool:GREP")
            await expect(tab.rows).to_have_count(1)
            await expect(tab.rows.locator(".what")).to_have_text("grep")
            await expect(page.locator("#shown")).to_have_text("1 of 4 sessions")
            await page.keyboard.press("Escape")
            await expect(tab.rows).to_have_count(4)
            await page.locator("#chips [data-state=human]").click()
            await expect(tab.rows).to_have_count(1)
            await page.locator("#search").fill("nothing at all")
            await expect(page.locator("#empty h2")).to_have_text("No session fits")
            await page.get_by_role("button", name="Show all sessions").click()
            await expect(tab.rows).to_have_count(4)
            await page.locator("#search").fill("pod-0 opencode")
            await expect(tab.rows).to_have_count(4)
            await page.locator("#search").fill("")
            await page.locator("#viewport").focus()
            for key in ("Home", "ArrowDown", "ArrowDown", "Enter"):
                await page.keyboard.press(key)
            await expect(tab.rows.nth(2)).to_have_attribute("aria-selected", "true")
            await expect(page.locator("#detail h2")).to_have_text("OpenCode")
            await page.keyboard.press("Escape")
            await expect(page.locator("#detail")).to_be_hidden()
            await page.locator("#sort").select_option("turns")
            await page.locator("#window").select_option("600")
            await expect(tab.rows).to_have_count(4)


async def test_a_turn_is_explained_why_there_why_held_what_was_lost(browser: Browser) -> None:
    gate = Gate()
    async with SmallPod(gate) as pod, gateway_over(pod) as gateway:
        first = asyncio.create_task(
            gateway.post("chat", agent_body("chat", "first"), headers=of("first", final=True))
        )
        await until(lambda: any(p.in_flight for p in gateway.gateway.fleet))
        second = asyncio.create_task(
            gateway.post("chat", agent_body("chat", "second"), headers=of("second"))
        )
        await until(lambda: held(gateway) == 1)
        async with opened(browser, gateway) as tab:
            page = tab.page
            await expect(tab.number("held")).to_have_text("1")
            await page.locator(".row[data-state=held]").click()
            detail = page.locator("#detail")
            await expect(detail.locator(".headline")).to_contain_text("no pod had room for it")
            await page.locator("#detail .turn").click()
            why = page.locator("#detail .why")
            await expect(why).to_contain_text("It needed")
            await expect(why).to_contain_text("of a budget of 16,000")
            await expect(why.locator("th", has_text="pod-0")).to_be_visible()
            gate.open("first", "second")
            await asyncio.gather(first, second)
            await expect(tab.number("held")).to_have_text("0")
            await expect(why).to_contain_text("the first pod that had room for it")
            await expect(why).to_contain_text("no pod had room for it")
            await expect(detail.locator(".turn")).to_have_attribute("aria-expanded", "true")
            sid = await page.locator(".row[aria-selected=true]").get_attribute("data-sid")
            assert page.url.endswith(f"#{sid}")
        async with opened(browser, gateway, path=f"/ui/#{sid}") as tab:
            await expect(tab.page.locator("#detail .ids")).to_have_text(str(sid))


async def test_a_forecast_is_drawn_with_its_uncertainty(browser: Browser) -> None:
    async with (
        EmbeddedFleet(pods=1, config=ENGINE, speedup=50) as fleet,
        gateway_over(*fleet.urls) as gateway,
    ):
        await turn(gateway, "one", ())
        async with opened(browser, gateway) as tab:
            page = tab.page
            await tab.rows.first.click()
            await expect(page.locator(".chart .curve")).to_have_count(1)
            await expect(page.locator("#detail .headline")).to_contain_text(
                "half of such waits end"
            )
            await page.locator("#detail .turn").click()
            await expect(page.locator(".why")).to_contain_text("Forecast: median")
            await expect(page.locator(".why")).to_contain_text("the session is new")


async def test_the_dark_and_the_light_page_differ_and_the_choice_is_kept(browser: Browser) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    async with gateway_over("http://127.0.0.1:9") as gateway:
        async with opened(browser, gateway, scheme="dark") as tab:
            page = tab.page
            assert await page.evaluate(ground) == "rgb(20, 20, 19)"
            await page.locator("#theme").click()
            assert await page.evaluate(ground) == "rgb(246, 245, 242)"
            await page.reload()
            await expect(page.locator("html")).to_have_attribute("data-theme", "light")
            await page.keyboard.press("t")
            assert await page.evaluate(ground) == "rgb(20, 20, 19)"
        async with opened(browser, gateway, reduced_motion="reduce") as tab:
            still = "() => getComputedStyle(document.querySelector('.link i')).animationName"
            await expect(tab.page.locator(".link")).to_have_attribute("data-state", "live")
            assert await tab.page.evaluate(still) == "none"


async def test_the_admin_token_is_asked_for_and_kept_out_of_addresses(browser: Browser) -> None:
    access = {"admin_token": "correct-horse-battery"}
    async with gateway_over("http://127.0.0.1:9", access=access) as gateway:
        fill(gateway.gateway, 2)
        async with opened(browser, gateway) as tab:
            page = tab.page
            dialog = page.locator("#token")
            await expect(dialog).to_be_visible()
            await expect(tab.rows).to_have_count(0)
            await page.keyboard.press("Escape")
            await expect(dialog).to_be_visible()
            await page.locator("#token-input").fill("wrong")
            await page.keyboard.press("Enter")
            await expect(page.locator("#token-error")).to_contain_text("does not know this token")
            await page.locator("#token-input").fill("correct-horse-battery")
            await page.keyboard.press("Enter")
            await expect(tab.rows).to_have_count(2)
            await expect(dialog).to_be_hidden()
            assert not any("correct-horse" in url for url in [*tab.asked, page.url])
            kept = await page.evaluate("() => [localStorage.length, sessionStorage.length]")
            assert kept == [0, 1]
            await page.reload()
            await expect(tab.rows).to_have_count(2)


async def test_three_thousand_sessions_are_a_few_elements_and_scroll(browser: Browser) -> None:
    async with gateway_over("http://127.0.0.1:9") as gateway:
        fill(gateway.gateway, 3_000)
        async with opened(browser, gateway) as tab:
            page = tab.page
            await expect(tab.number("all")).to_have_text("3000")
            elements = "() => document.querySelectorAll('*').length"
            before = await page.evaluate(elements)
            assert before < 1_000
            await page.evaluate(
                "async () => { const view = document.getElementById('viewport');"
                " for (let i = 1; i <= 40; i += 1) { view.scrollTop = view.scrollHeight * i / 40;"
                " await new Promise(requestAnimationFrame); } }"
            )
            last = page.locator(".row[aria-rowindex='3000']")
            await expect(last).to_be_visible()
            assert await page.evaluate(elements) < before + 200
            await page.locator("#search").fill("tool:bash")
            await expect(page.locator("#viewport")).to_have_attribute("aria-rowcount", "3000")
            assert await page.evaluate(elements) < before + 200


async def test_hostile_names_are_shown_as_what_they_are(browser: Browser) -> None:
    hostile = "<img src=x onerror=alert(1)>\"'><script>alert(1)</script>"
    async with (
        EmbeddedFleet(pods=1, config=ENGINE, speedup=50) as fleet,
        gateway_over(*fleet.urls, models={"aliases": {"*": "embedded"}}) as gateway,
    ):
        await turn(gateway, "one", (hostile, "${alert(1)}"))
        async with opened(browser, gateway) as tab:
            page = tab.page
            dialogs: list[str] = []
            page.on("dialog", lambda dialog: dialogs.append(dialog.message))
            await expect(tab.rows.locator(".what")).to_have_text(f"{hostile[:64]} +1")
            await tab.rows.first.click()
            await page.locator("#detail .turn").click()
            await expect(page.locator(".why")).to_contain_text("onerror=alert(1)")
            box = await page.locator("#lanes").bounding_box()
            assert box is not None
            await page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 18)
            await expect(page.locator("#tip")).to_contain_text("<img src=x")
            await page.locator("#search").fill("<b>x</b>")
            await expect(page.locator("#empty h2")).to_have_text("No session fits")
            assert await page.locator("img, main script, b b").count() == 0
            assert dialogs == []


async def test_the_page_finds_the_gateway_again_and_shows_what_is_there_then(
    browser: Browser,
) -> None:
    async with gateway_over("http://127.0.0.1:9") as gateway:
        fill(gateway.gateway, 3)
        async with opened(browser, gateway) as tab:
            await expect(tab.rows).to_have_count(3)
            for connection in list(gateway.server.connections):
                connection.transport.abort()  # type: ignore[union-attr]
            await until(lambda: not gateway.inspector.feed.watchers)
            fill(gateway.gateway, 5)
            await expect(tab.rows).to_have_count(5)
            await expect(tab.page.locator("#link")).to_have_attribute("data-state", "live")
            tab.said = [line for line in tab.said if "ERR_" not in line]
        await until(lambda: not gateway.inspector.feed.watchers)


async def test_a_paused_page_stands_still_and_catches_up(browser: Browser) -> None:
    async with gateway_over("http://127.0.0.1:9") as gateway:
        fill(gateway.gateway, 1)
        async with opened(browser, gateway) as tab:
            await expect(tab.rows).to_have_count(1)
            await tab.page.get_by_role("button", name="Pause").click()
            fill(gateway.gateway, 4)
            await asyncio.sleep(1.2)
            await expect(tab.rows).to_have_count(1)
            await tab.page.get_by_role("button", name="Resume").click()
            await expect(tab.rows).to_have_count(4)
