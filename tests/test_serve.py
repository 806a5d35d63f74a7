"""`waveflow serve`: each route, each limit, batches, a real process, and the page in a browser."""

import concurrent.futures
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import uvicorn
from conftest import make_voice
from starlette.testclient import TestClient

from waveflow.engine.vocoder import Vocoder
from waveflow.serve import worker as worker_module
from waveflow.serve.app import ServerLimits, make_app
from waveflow.tts.speaker import PAUSE, Speaker, load_speaker


@pytest.fixture(scope="module")
def speaker(tiny_voice: Path, tiny_model: Path) -> Speaker:
    return load_speaker(tiny_voice, tiny_model)


@pytest.fixture(scope="module")
def vocoder(speaker: Speaker) -> Vocoder:
    return speaker.vocoder


LIMITS = ServerLimits(body_bytes=400_000, audio_seconds=12, characters=60)


@pytest.fixture(scope="module")
def client(speaker: Speaker) -> Iterator[TestClient]:
    with TestClient(make_app(speaker, LIMITS), raise_server_exceptions=False) as client:
        yield client


def npy(mel: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, mel)
    return file.getvalue()


def some_mel(n_frames: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (-6 + rng.standard_normal((80, n_frames))).astype(np.float32)


def wav(data: bytes) -> np.ndarray:
    audio, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == 22050
    return audio


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits until it holds; fails if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def message(response) -> str:
    error = response.json()["error"]
    assert error["type"] in ("invalid_request_error", "server_error")
    assert "\n" not in error["message"]
    return error["message"]


# --- routes ---


def test_a_mel_becomes_a_file(client: TestClient, vocoder: Vocoder) -> None:
    mel = some_mel(30)
    response = client.post("/v1/vocode?sigma=0.5&seed=3&refine=1", content=npy(mel))
    assert response.status_code == 200 and response.headers["content-type"] == "audio/wav"
    expected = vocoder(mel, sigma=0.5, seed=3, refine=1).numpy()
    np.testing.assert_allclose(wav(response.content), expected, atol=1 / 32768)
    flac = client.post("/v1/vocode?sigma=0.5&seed=3&refine=1&format=flac", content=npy(mel))
    np.testing.assert_array_equal(wav(flac.content), wav(response.content))


def test_a_mel_becomes_a_stream(client: TestClient, vocoder: Vocoder) -> None:
    mel = some_mel(300)
    with client.stream("POST", "/v1/vocode?format=pcm", content=npy(mel)) as response:
        assert response.headers["content-type"] == "audio/pcm;rate=22050"
        chunks = [chunk for chunk in response.iter_raw() if chunk]
    assert len(chunks) > 1
    samples = np.frombuffer(b"".join(chunks), "<i2") / 32768
    np.testing.assert_allclose(samples, vocoder(mel).numpy(), atol=1.5 / 32768)


def test_a_mel_of_another_convention(client: TestClient, vocoder: Vocoder) -> None:
    mel = some_mel(40).T / np.log(10)
    response = client.post("/v1/vocode?convention=log10&time_major=true", content=npy(mel))
    expected = vocoder(mel, convention="log10", time_major=True).numpy()
    np.testing.assert_allclose(wav(response.content), expected, atol=1 / 32768)


def test_a_recording_becomes_its_copy(client: TestClient, vocoder: Vocoder) -> None:
    voice = make_voice(0.5)
    file = io.BytesIO()
    soundfile.write(file, voice, 22050, format="WAV", subtype="FLOAT")
    response = client.post("/v1/resynth", content=file.getvalue())
    copy = vocoder.resynth(voice).numpy()
    np.testing.assert_allclose(wav(response.content), copy, atol=1 / 32768)


def test_a_text_is_spoken_as_openai_has_it(client: TestClient, speaker: Speaker) -> None:
    body = {"model": "any", "input": "Hello. World.", "voice": "any", "response_format": "wav"}
    response = client.post("/v1/audio/speech", json=body)
    np.testing.assert_allclose(wav(response.content), speaker("Hello. World."), atol=1 / 32768)
    slow = client.post("/v1/audio/speech", json=body | {"speed": 0.25})
    assert len(wav(slow.content)) > len(wav(response.content))


def test_openais_defaults(client: TestClient, speaker: Speaker) -> None:
    """MP3, and samples at 24 kHz."""
    mp3 = client.post("/v1/audio/speech", json={"input": "Hello."})
    assert mp3.headers["content-type"] == "audio/mpeg"
    with soundfile.SoundFile(io.BytesIO(mp3.content)) as file:
        assert file.format == "MP3"
    body = {"input": "Hello. World.", "response_format": "pcm"}
    pcm = client.post("/v1/audio/speech", json=body)
    n_expected = len(speaker("Hello. World.")) * 24000 / 22050
    assert abs(len(pcm.content) / 2 - n_expected) < 2


def test_health_and_metrics(client: TestClient) -> None:
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["waiting"] == 0
    before = client.get("/metrics").text
    client.post("/v1/vocode", content=npy(some_mel(86)))
    after = client.get("/metrics").text

    def value(text: str, name: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0

    asked = 'waveflow_requests_total{route="/v1/vocode",status="200"}'
    assert value(after, asked) == value(before, asked) + 1
    made = value(after, "waveflow_audio_seconds_total")
    assert made - value(before, "waveflow_audio_seconds_total") == pytest.approx(86 * 256 / 22050)


def test_the_page_is_there(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]


# --- what is refused ---


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/v1/vocode", b"", "no array"),
        ("/v1/vocode", b"no array", "no .npy array"),
        ("/v1/vocode", npy(some_mel(20)[:60]), "60 bands"),
        ("/v1/vocode", npy(some_mel(20)) + npy(some_mel(20)), "more than one array"),
        ("/v1/vocode", npy(np.full((80, 5), np.nan)), "NaN"),
        ("/v1/vocode", npy(np.array([object()], dtype=object)), "array 1"),
        ("/v1/vocode", npy(some_mel(1100)), "at most 12"),
        ("/v1/vocode?sigma=-1", npy(some_mel(20)), "sigma -1"),
        ("/v1/vocode?sigma=loud", npy(some_mel(20)), "sigma"),
        ("/v1/vocode?convention=none", npy(some_mel(20)), "convention"),
        ("/v1/vocode?format=ogg", npy(some_mel(20)), "format"),
        ("/v1/vocode?speed=2", npy(some_mel(20)), "speed"),
        ("/v1/resynth", b"RIFF....", "not an audio file"),
        ("/v1/audio/speech", b"{", "JSON"),
        ("/v1/audio/speech", b"{}", "input"),
        ("/v1/audio/speech", b'{"input": "..."}', "no word"),
        ("/v1/audio/speech", b'{"input": "Hi", "speed": 9}', "speed"),
        ("/v1/audio/speech", b'{"input": "Hi", "response_format": "aac"}', "response_format"),
    ],
)
def test_a_wrong_request_is_one_line(
    client: TestClient, path: str, body: bytes, problem: str
) -> None:
    response = client.post(path, content=body)
    assert response.status_code == 400
    assert problem in message(response)
    assert "/tmp" not in message(response)


def test_too_much_is_refused(client: TestClient) -> None:
    large = client.post("/v1/vocode", content=bytes(LIMITS.body_bytes + 1))
    assert large.status_code == 413 and "400,000 bytes" in message(large)
    # The same in pieces, without a length.
    chunked = client.post("/v1/vocode", content=(bytes(100_000) for _ in range(5)))
    assert chunked.status_code == 413
    text = client.post("/v1/audio/speech", json={"input": "a " * 40})
    assert text.status_code == 413 and "80 characters" in message(text)


def test_other_paths_and_methods(client: TestClient) -> None:
    assert client.get("/v1/nothing").status_code == 404
    assert client.get("/v1/vocode").status_code == 405
    assert message(client.get("/v1/nothing"))


class _Slow:
    """An acoustic model that waits for an event before each sentence."""

    convention = None
    refine_steps = None

    def __init__(self) -> None:
        self.go = threading.Event()
        self.started = threading.Event()

    def mels(self, text: str, pace: float, seed: int) -> Iterator[torch.Tensor]:
        self.started.set()
        self.go.wait(30)
        yield torch.full((80, 20), -6.0)


def test_a_full_line_and_a_late_request(vocoder: Vocoder) -> None:
    slow = _Slow()
    limits = ServerLimits(waiting=1, seconds=0.5)
    with TestClient(make_app(Speaker(slow, vocoder), limits)) as client:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            first = pool.submit(client.post, "/v1/audio/speech", json={"input": "Hello."})
            assert slow.started.wait(30)
            busy = client.post("/v1/vocode", content=npy(some_mel(10)))
            assert busy.status_code == 503 and busy.headers["retry-after"] == "1"
            assert "1 requests wait already" in message(busy)
            late = first.result()
            assert late.status_code == 504 and "within" in message(late)
            slow.go.set()
        until(lambda: client.get("/health").json()["waiting"] == 0)
        assert client.post("/v1/vocode", content=npy(some_mel(10))).status_code == 200


class _Broken:
    convention = None
    refine_steps = None

    def mels(self, text: str, pace: float, seed: int) -> Iterator[torch.Tensor]:
        raise ZeroDivisionError("oh")
        yield


def test_a_fault_of_ours_is_said_to_be_one(vocoder: Vocoder) -> None:
    app = make_app(Speaker(_Broken(), vocoder))
    with TestClient(app, raise_server_exceptions=False) as client:
        response = client.post("/v1/audio/speech", json={"input": "Hello."})
        assert response.status_code == 500 and "internal error" in message(response)
        assert client.get("/health").json()["waiting"] == 0
        assert 'status="500"' in client.get("/metrics").text


# --- together ---


def test_mels_that_wait_together_get_what_they_get_alone(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = threading.Event()
    taken = worker_module.Worker._new_requests

    def late(self, wait):
        if wait:
            hold.wait(30)
        return taken(self, wait)

    monkeypatch.setattr(worker_module.Worker, "_new_requests", late)
    mels = [some_mel(60 + i, i) for i in range(5)]
    mels[3] = mels[3][:70]  # wrong, which must not hurt the others
    with (
        TestClient(make_app(speaker)) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        posts = [
            pool.submit(client.post, f"/v1/vocode?seed={i}", content=npy(mel))
            for i, mel in enumerate(mels)
        ]
        until(lambda: client.get("/health").json()["waiting"] == len(mels))
        hold.set()
        answers = [post.result() for post in posts]
        metrics = client.get("/metrics").text
    assert "waveflow_batch_size_count 2.0" in metrics and "waveflow_batch_size_sum 5.0" in metrics
    assert answers[3].status_code == 400 and "70 bands" in message(answers[3])
    for i in (0, 1, 2, 4):
        expected = speaker.vocoder(mels[i], seed=i).numpy()
        np.testing.assert_allclose(wav(answers[i].content), expected, atol=1.5 / 32768)


# --- a real process ---


@pytest.fixture(scope="module")
def server(
    tiny_voice: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[subprocess.Popen, str]]:
    process, address = start(tiny_voice, tiny_model, tmp_path_factory.mktemp("server") / "log")
    yield process, address
    process.kill()
    process.wait()


def start(voice: Path, model: Path, log: Path) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "waveflow", "serve", "--port", "0", "--threads", "1"]
    command += ["--voice", str(voice), "--model", str(model)]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stderr=file)
    until(lambda: "\n" in log.read_text() or process.poll() is not None, 60)
    assert "listening on http://127.0.0.1:" in log.read_text()
    return process, log.read_text().split()[-1]


def post(url: str, body: bytes) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as response:
        return response.read()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_it_answers_what_it_has_taken_and_ends(
    tiny_voice: Path, tiny_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process, address = start(tiny_voice, tiny_model, tmp_path / "log")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        mel = npy(some_mel(1000))
        posts = [pool.submit(post, f"{address}/v1/vocode", mel) for _ in range(4)]

        def all_are_in() -> bool:
            waiting = json.load(urllib.request.urlopen(f"{address}/health"))["waiting"]
            return waiting + sum(p.done() for p in posts) >= len(posts)

        until(all_are_in)
        process.send_signal(number)
        assert all(len(wav(p.result())) == 1000 * 256 for p in posts)
    assert process.wait(60) == 0
    assert (tmp_path / "log").read_text().count("\n") == 1


def test_a_client_that_leaves_gives_up_its_place(vocoder: Vocoder) -> None:
    """Over a real socket: the place is free although nobody waits for the audio."""
    slow = _Slow()
    server = uvicorn.Server(
        uvicorn.Config(make_app(Speaker(slow, vocoder)), port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        address = f"http://127.0.0.1:{port}"
        body = b'{"input": "Hello."}'
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST /v1/audio/speech HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            client.sendall(head.encode() + b"\r\n" + body)
            assert slow.started.wait(30)
        left = 'waveflow_requests_total{route="/v1/audio/speech",status="499"} 1.0'

        def has_left() -> bool:
            with urllib.request.urlopen(f"{address}/metrics") as metrics:
                return left in metrics.read().decode()

        until(has_left)
        slow.go.set()
        until(lambda: json.load(urllib.request.urlopen(f"{address}/health"))["waiting"] == 0)
    finally:
        slow.go.set()
        server.should_exit = True
        thread.join()


def test_a_port_that_is_taken_is_one_line(server: tuple[subprocess.Popen, str]) -> None:
    port = server[1].rsplit(":", 1)[1]
    command = [sys.executable, "-m", "waveflow", "serve", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr and done.stderr.count("\n") == 1


# --- the page, in a browser ---


def chromium() -> str | None:
    return next((p for name in ("chromium", "google-chrome") if (p := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = chromium()
    if path is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_the_page_speaks(browser, server: tuple[subprocess.Popen, str], tmp_path: Path) -> None:
    from playwright.sync_api import expect

    page = browser.new_page(viewport={"width": 390, "height": 800})
    problems: list[str] = []
    page.on("console", lambda text: problems.append(text.text) if text.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server[1])
    status, audio = page.locator("#status"), page.locator("#audio")
    page.fill("#text", "Hello. World.")
    page.click("#speak")
    expect(status).to_contain_text("s of speech in")
    expect(audio).to_be_visible()
    expect(page.locator("#spectrogram")).to_be_visible()
    assert float(audio.get_attribute("data-seconds")) > PAUSE

    np.save(tmp_path / "mel.npy", some_mel(172))
    page.set_input_files("#file", tmp_path / "mel.npy")
    expect(audio).to_have_attribute("data-seconds", "2.0")
    lit = page.evaluate(
        """() => { const c = document.querySelector('#spectrogram');
        return c.getContext('2d').getImageData(0, 0, c.width, c.height).data
            .some((v, i) => i % 4 < 3 && v > 0); }"""
    )
    assert lit
    # Nothing is wider than a phone.
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    assert not problems
    page.fill("#text", "...")
    page.click("#speak")
    expect(status).to_contain_text("no word")
    page.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_pages_curl_lines_run(server: tuple[subprocess.Popen, str], tmp_path: Path) -> None:
    page = Path(__file__).parent.parent / "docs" / "serve.md"
    lines = [line.strip() for line in page.read_text().splitlines() if line.startswith("    curl ")]
    assert len(lines) == 3
    np.save(tmp_path / "mel.npy", some_mel(100))
    soundfile.write(tmp_path / "in.wav", make_voice(0.5), 22050)
    for line in lines:
        command = line.replace("localhost:8000", server[1].removeprefix("http://"))
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0
        out = tmp_path / line.split()[-1]
        assert len(wav(out.read_bytes())) > 256
