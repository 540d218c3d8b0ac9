"""The page in a real browser: it streams, shades, explains, stops, regenerates, and a link repeats an answer."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from llm.run_folder.loaded_run import LoadedRun
from llm.serving import api, engine
from tests.insight.test_report import contrasts
from tests.serving.conftest import Served, served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DONE, BUSY = "#turns[aria-busy=false] [data-p]", "#turns[aria-busy=true] [data-p]"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="install chromium")


@pytest.fixture(autouse=True)
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer ends by chance before its first word, which these tests then wait for."""
    jobs = api._jobs

    def longest(checkpoint: Any, asked: Any, *given: Any) -> Any:
        return jobs(checkpoint, asked.model_copy(update={"ignore_eos": True}), *given)

    monkeypatch.setattr(api, "_jobs", longest)


@contextmanager
def opened(address: str, width: int = 1280, scheme: Any = "light", expected: str = "") -> Iterator[Any]:
    """A browser's page at `address`; no console message but those with `expected` in them, no failed script."""
    playwright = pytest.importorskip("playwright.sync_api", reason="install the extra `test`")
    faults: list[str] = []
    with playwright.sync_playwright() as start:
        browser = start.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        yield page
        browser.close()
    assert not [each for each in faults if not expected or expected not in each], faults


def ask(page: Any, prompt: str) -> str:
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    return answer(page)


def answer(page: Any) -> str:
    page.wait_for_selector(DONE, state="attached")
    return str(page.text_content("#turns"))


def visible_token(page: Any, place: int = 0) -> Any:
    """A token that is more than white space, which a mouse could not rest on."""
    return page.locator("#turns [data-p]").filter(has_text=re.compile(r"\w")).nth(place)


@pytest.mark.parametrize(("width", "scheme"), [pytest.param(1280, "light", marks=pytest.mark.slow), (390, "dark")])
def test_a_text_is_continued_explained_and_repeated_by_its_link(tiny_server: Served, width: int, scheme: Any) -> None:
    with opened(tiny_server.url, width, scheme) as page:
        page.wait_for_selector("#run:not([hidden])")
        assert page.locator("#curve .dot").count() >= 1
        said = ask(page, "The river")
        assert said.startswith("The river") and len(said) > len("The river")
        visible_token(page).hover()
        rows = page.locator("#why tr")
        assert rows.count() >= 5 and page.locator("#why .chosen").count() == 1
        shown = [float(each.split()[0]) for each in page.locator("#why td:first-child").all_text_contents()]
        assert shown == sorted(shown, reverse=True) and sum(shown) <= 100.5
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it does not scroll sideways"
        assert contrasts(page) > 4.5
        page.reload()
        assert answer(page) == said, "a link repeats the answer"
        page.click("#again")
        page.wait_for_selector("#again:not([disabled])")
        assert answer(page).startswith("The river")
        page.keyboard.press("Escape")
        page.locator("#turns [data-p]").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("[...document.querySelectorAll('#turns [data-p]')].indexOf(document.activeElement)") == 1
        assert not page.locator("#why").is_hidden(), "the keyboard shows the alternatives too"


def test_a_conversation_goes_on_and_its_link_repeats_it(talk_server: Served) -> None:
    with opened(talk_server.url) as page:
        page.wait_for_selector("#system-row:not([hidden])")
        page.fill("#seed", "3")
        ask(page, "The river")
        said = ask(page, "It rises.")
        assert page.locator("#turns > .user").count() == page.locator("#turns > .model").count() == 2
        page.reload()
        page.wait_for_selector("#turns > .model:nth-child(4)")
        assert answer(page) == said
        page.click("#clear")
        assert page.text_content("#turns") == "" and "#" not in page.url


def test_a_conversation_goes_on_after_an_answer_without_text(talk_server: Served) -> None:
    with opened(talk_server.url) as page:
        page.wait_for_selector("#system-row:not([hidden])")
        page.fill("#max_tokens", "5")
        ask(page, "The river")
        page.evaluate("messages.at(-1).content = ''")  # as one that was stopped before its first token
        ask(page, "It rises.")
        assert page.locator("#turns > .model").count() == 2 and page.text_content("#error") == ""


def test_text_streams_and_stops(tiny_run: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = engine._advance

    def slowly(*given: Any) -> Any:
        time.sleep(0.15)
        return advance(*given)

    monkeypatch.setattr(engine, "_advance", slowly)
    with served(tiny_run) as server, opened(server.url) as page:
        page.wait_for_selector("#run:not([hidden])")
        page.fill("#prompt", "The")
        page.click("#send")
        page.wait_for_selector(BUSY, state="attached")
        first = page.locator("#turns [data-p]").count()
        page.wait_for_selector(f"{BUSY}:nth-of-type({first + 2})", state="attached")
        assert server.server.engine.running == 1
        page.click("#stop")
        page.wait_for_selector(DONE, state="attached")
        server.idle()
        count = page.locator("#turns [data-p]").count()
        time.sleep(0.5)
        assert count == page.locator("#turns [data-p]").count()


def test_a_refusal_is_shown_and_the_text_kept(talk_server: Served) -> None:
    with opened(talk_server.url, expected="400") as page:
        page.wait_for_selector("#system-row:not([hidden])")
        page.fill("#prompt", "The river rises. " * 80)
        page.keyboard.press("Enter")
        page.wait_for_selector("#error:not(:empty)")
        assert "context" in str(page.text_content("#error"))
        assert page.input_value("#prompt").startswith("The river") and page.locator("#turns > div").count() == 0


def test_a_key_is_asked_for(tiny_run: LoadedRun) -> None:
    with served(tiny_run, key="secret") as server, opened(server.url, expected="401") as page:
        page.wait_for_selector("#key-row:not([hidden])")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#run:not([hidden])")
        assert ask(page, "The river") and "secret" not in page.url
