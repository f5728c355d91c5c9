"""Pictures of the inspector while a hundred agents work: ``python -m bench.inspector.screenshots``.

In real time: a crowd of scripted agents through a gateway over embedded pods whose KV is too small
for all of them, so that turns are held and KV is lost. Needs Debian's ``chromium``.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from playwright.async_api import Browser, Page, async_playwright

from bench.inspector.agents import World, crowd
from bench.inspector.world import crowded_gateway

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "img"
WIDE = (1440, 900)
NARROW = (1024, 768)


def main(
    sessions: Annotated[int, typer.Option(help="agents that work at once")] = 100,
    seconds: Annotated[float, typer.Option(help="how long they work before the pictures")] = 170.0,
    out: Annotated[Path, typer.Option(help="where the pictures go")] = IMAGES,
) -> None:
    """Run the crowd and take the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    asyncio.run(take(sessions, seconds, out))


async def take(sessions: int, seconds: float, out: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("screenshots: there is no chromium here (apt-get install chromium)")
    async with (
        crowded_gateway(seconds + 120) as (world, _),
        async_playwright() as playwright,
    ):
        browser = await playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        await picture(browser, world, out / "inspector-empty.png", "light", WIDE)
        working = asyncio.create_task(crowd(world, sessions, spread_s=25.0))
        await asyncio.sleep(seconds)
        await picture(browser, world, out / "inspector-light.png", "light", WIDE)
        await picture(browser, world, out / "inspector-dark.png", "dark", WIDE)
        await picture(browser, world, out / "inspector-narrow.png", "light", NARROW)
        await picture(browser, world, out / "inspector-explained.png", "light", WIDE, explained)
        await picture(browser, world, out / "inspector-explained-dark.png", "dark", WIDE, explained)
        await browser.close()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        if world.failures:
            print(f"{len(world.failures)} turns failed: {world.failures[0]}")


async def picture(
    browser: Browser,
    world: World,
    path: Path,
    scheme: Literal["light", "dark"],
    size: tuple[int, int],
    prepare: Any = None,
) -> None:
    """One picture, a few seconds after the page was opened."""
    page = await browser.new_page(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, device_scale_factor=1.5
    )
    await page.goto(f"{world.url}/ui")
    await page.wait_for_selector("#link[data-state=live]")
    await page.wait_for_timeout(10_000 if prepare is None else 3_000)
    if prepare is not None:
        await prepare(world, page)
    await page.screenshot(path=path)
    await page.close()
    print(path)


async def explained(world: World, page: Page) -> None:
    """Open the turn that has the most to tell."""
    sid, number = await most_telling(world)
    await page.evaluate("sid => { location.hash = sid; }", sid)
    await page.wait_for_timeout(2_500)
    turn = page.locator(f"[data-key='turn-{number}']")
    await turn.click()
    await turn.evaluate("element => element.scrollIntoView({ block: 'center' })")
    await page.wait_for_timeout(1_500)


async def most_telling(world: World) -> tuple[str, int]:
    """A session that waits with a forecast, and its latest turn that was held and lost KV."""
    found: list[tuple[float, str, int]] = []
    async with world.client.get(f"{world.url}/v1/cachewise/sessions?limit=1000") as answer:
        sessions = (await answer.json())["data"]
    for session in sessions:
        sid = session["id"]
        async with world.client.get(f"{world.url}/v1/cachewise/sessions/{sid}/turns") as answer:
            turns = (await answer.json())["data"]
        for place, turn in enumerate(turns[:3]):
            span = turn["span"]
            score = (
                2.0 * (session["state"] == "idle" and session["forecast"] is not None)
                + 2.0 * ("held" in span)
                + ("evicted" in span.get("lost", {}) or "moved" in span.get("lost", {}))
                + ("break" in span)
                + ("q" in span)
                + 0.5 * (session["turns"] > 4)
                - 0.2 * place
            )
            if "s" in span:
                found.append((score, sid, span["n"]))
    _, sid, number = max(found)
    return sid, number


if __name__ == "__main__":
    typer.run(main)
