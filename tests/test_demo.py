"""The page that speaks in the browser: built, opened in Chromium, and compared with Python."""

import http.server
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLE_RATE, make_voice

import waveflow
from waveflow.engine.vocoder import Vocoder
from waveflow.export.program import Speaker

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page, built and served from its folder."""
    pytest.importorskip("onnxscript", reason="graphs are made with onnxscript")
    if shutil.which("npm") is None or CHROMIUM is None:
        pytest.skip("the page needs npm to be built and Chromium to be seen")
    site = tmp_path_factory.mktemp("demo") / "site"
    build = [sys.executable, ROOT / "docs" / "demo" / "build.py", site]
    subprocess.run(build, check=True)
    handler = partial(_Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    tools = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with tools.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, ready, on a phone's width; whatever it asks of other hosts fails the test."""
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": 390, "height": 844})
    problems: list[str] = []
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if not request.url.startswith(
        (address, "blob:", "data:")) else None)  # fmt: skip
    page.goto(address)
    expect(page.locator("#status")).to_have_text("Ready.", timeout=60_000)
    yield page
    page.close()
    assert not problems


@pytest.fixture(scope="module")
def vocoder() -> Vocoder:
    return waveflow.load()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recordings") / "voice.wav"
    soundfile.write(path, make_voice(1.0), SAMPLE_RATE, "PCM_16")
    return path


def in_page(page: Any, expression: str, *arrays: np.ndarray) -> Any:
    """The value of a JavaScript function of arrays."""
    lists = [array.flatten().tolist() for array in arrays]
    return page.evaluate(f"async (lists) => {{ {expression} }}", lists)


def test_the_pages_audio_is_pythons(page: Any, vocoder: Vocoder) -> None:
    mel = vocoder.example_mel()[:, :100][None]
    noise = vocoder.flow.noise(100, [0])
    expected = Speaker(vocoder, vocoder.refine_steps)(mel, torch.tensor(0.4), noise)[0].numpy()
    found = in_page(
        page,
        """const [mel, noise] = lists.map((list) => Float32Array.from(list));
        return Array.from(await waveflow.speak(mel, noise, 0.4));""",
        mel.numpy(),
        noise.numpy(),
    )
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_page_hears_what_python_hears(page: Any, vocoder: Vocoder) -> None:
    audio = vocoder.draw(vocoder.example_mel()[:, :100]).numpy()
    mel = vocoder.mel(audio)
    # A graph finds no phase path: its likelihood is the one under which z becomes the audio again.
    samples = torch.from_numpy(audio)[None]
    with torch.no_grad():
        expected = vocoder.flow.by_frame(samples, mel[None], fitted=False)[0][0].numpy()
    found = in_page(
        page,
        """const heard = await waveflow.listen(Float32Array.from(lists[0]));
        return [Array.from(heard.mel), Array.from(heard.logProb)];""",
        audio,
    )
    np.testing.assert_allclose(np.reshape(found[0], mel.shape), mel.numpy(), atol=0.01)
    np.testing.assert_allclose(found[1], expected, atol=0.02)


def test_a_recording_is_copied_by_keyboard_alone(page: Any, recording: Path) -> None:
    from playwright.sync_api import expect

    page.get_by_label("Choose a recording, or drop it here.").set_input_files(recording)
    status = page.locator("#status")
    expect(status).to_have_text("Here is the copy.", timeout=60_000)
    expect(page.locator("#speed")).to_contain_text("times real time")
    expect(page.locator("#likelihood")).to_contain_text("nats per sample")
    expect(page.locator("#audio-copy")).to_have_js_property("readyState", 4)
    seconds = page.evaluate("() => document.querySelector('#audio-copy').duration")
    assert abs(seconds - 1) < 256 / SAMPLE_RATE
    first = page.get_attribute("#audio-copy", "src")
    page.get_by_label("Seed: another one, another draw").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Tab")
    expect(page.locator("#audio-copy")).not_to_have_attribute("src", first)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390


def test_two_recordings_are_mixed(page: Any, recording: Path) -> None:
    from playwright.sync_api import expect

    page.set_input_files("#file", recording)
    expect(page.locator("#status")).to_have_text("Here is the copy.", timeout=60_000)
    page.get_by_role("button", name="Keep this recording").press("Enter")
    page.get_by_role("button", name="Take an example").press("Enter")
    expect(page.locator("#mixed")).to_have_js_property("readyState", 4, timeout=60_000)
    seconds = page.evaluate("() => document.querySelector('#mixed').duration")
    assert abs(seconds - 1) < 2 * 256 / SAMPLE_RATE


def test_the_microphone(page: Any) -> None:
    from playwright.sync_api import expect

    page.get_by_role("button", name="Speak into the microphone").press("Enter")
    expect(page.locator("#status")).to_have_text("Recording …")
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Stop").press("Enter")
    expect(page.locator("#status")).to_have_text("Here is the copy.", timeout=60_000)


def test_what_is_no_recording_is_said(page: Any, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    (tmp_path / "text.wav").write_text("no audio")
    page.set_input_files("#file", tmp_path / "text.wav")
    expect(page.locator("#status")).to_contain_text("no recording that the browser can read")
