"""The page at / in a real browser: an answer in pieces, its log-probabilities, the stop button, the metrics."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import CHROMIUM, Page, open_page
from tests.support.openai_api import Api

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (./install.sh --browser)")


async def ask(page: Page, **fields: Any) -> None:
    for name, value in fields.items():
        await page.evaluate(f"document.getElementById({name!r}).value = {value!r}")
    await page.evaluate("document.getElementById('form').requestSubmit()")


def test_page(api: Api, tmp_path: Path, tokenizer: Any, greedy: Any) -> None:
    prompt = "Once upon a time there was a king who"
    expected = tokenizer.decode(greedy(tokenizer.encode(prompt), 12))

    async def use() -> None:
        async with open_page(api.url + "/", tmp_path) as page:
            await page.until("document.getElementById('model').textContent === 'stories'")
            assert "512" in await page.evaluate("document.getElementById('about').textContent")
            await ask(page, prompt=prompt, temperature="0", max_tokens="12")
            await page.until("document.getElementById('figures').textContent.includes('length')")
            assert await page.evaluate("document.getElementById('answer').textContent") == prompt + expected
            figures = await page.evaluate("document.getElementById('figures').textContent")
            assert "12 tokens" in figures and "tokens/s" in figures
            spans = "document.querySelectorAll('#answer .token')"
            assert await page.evaluate(f"{spans}.length") == 12
            place = await page.evaluate(
                f"(r => [r.x + r.width / 2, r.y + r.height / 2])({spans}[3].getBoundingClientRect())"
            )
            await page.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
            tip = await page.until("getComputedStyle(tip).display === 'block' && tip.textContent")
            assert len(tip.split("\n")) == 5 and tip.split("\n")[0].endswith(
                '"' + await page.evaluate(f"{spans}[3].textContent") + '"'
            )
            await page.until("document.getElementById('metrics').textContent.includes('running')")
            if target := os.environ.get("PAGE_SCREENSHOT"):
                await page.screenshot(Path(target))
            # Stopped in the middle: fewer tokens than asked for.
            await ask(page, max_tokens="450")
            await page.until(f"{spans}.length > 3")
            await page.evaluate("document.getElementById('stop').click()")
            await page.until("document.getElementById('figures').textContent.includes('stopped')")
            assert await page.evaluate(f"{spans}.length") < 450
            # An error is shown.
            await ask(page, max_tokens="5000")
            assert "5000" in await page.until("document.getElementById('error').textContent")
            assert page.problems == [] or all("400" in problem for problem in page.problems)

    asyncio.run(use())
