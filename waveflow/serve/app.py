"""The HTTP application: routes, limits, errors and metrics."""

import asyncio
import io
import itertools
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import soundfile
from fastapi import FastAPI, Query
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from waveflow import __version__
from waveflow.audio.io import read_audio, read_mels, to_int16
from waveflow.audio.mel_names import NATIVE
from waveflow.engine.options import SynthesisOptions
from waveflow.engine.streaming import WINDOW_FRAMES
from waveflow.errors import AudioError, MelMismatchError, WaveflowError, fault
from waveflow.model_files import first_problem
from waveflow.serve.metrics import Measured, Metrics
from waveflow.serve.worker import (
    Busy,
    Gone,
    MelRequest,
    Pieces,
    PiecesRequest,
    Request,
    TooLate,
    Worker,
)
from waveflow.tts.speaker import FASTEST, SLOWEST, Speaker

PAGE = Path(__file__).parent / "page.html"
SPECTROGRAM = Path(__file__).parent / "spectrogram.js"
# What OpenAI's API states for its `pcm`.
PCM_RATE = 24000
# Of the JSON around a text.
TEXT_BODY_BYTES = 2**14
# The status that logs and metrics have for a client that left; nobody receives it.
CLIENT_LEFT = 499
# Seconds in which a body must have arrived.
BODY_SECONDS = 30

Format = Literal["wav", "flac", "mp3", "pcm"]
_MEDIA = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg"}


class ServerLimits(BaseModel):
    """What a client may ask for.

    Attributes:
        body_bytes: of a request.
        audio_seconds: of a mel or a recording.
        characters: of a text.
        waiting: requests that wait or are being spoken; more get status 503.
        seconds: in which a request must be done; else status 504.
    """

    model_config = ConfigDict(frozen=True)

    body_bytes: int = 2**25
    audio_seconds: float = 600
    characters: int = 4096
    waiting: int = 64
    seconds: float = 60


class SpeechBody(BaseModel):
    """The body of `POST /v1/audio/speech`, as OpenAI's API has it; other fields are ignored."""

    input: str = Field(min_length=1)
    response_format: Format = "mp3"
    speed: float = Field(default=1.0, ge=SLOWEST, le=FASTEST)
    seed: int = 0


class Service:
    """What the routes share.

    Attributes:
        speaker: text to speech, and its vocoder.
        limits: of requests.
    """

    def __init__(self, speaker: Speaker, limits: ServerLimits) -> None:
        self.speaker = speaker
        self.vocoder = speaker.vocoder
        self.limits = limits
        self.metrics = Metrics(lambda: self.worker.n_open)
        self.worker = Worker(self.vocoder, limits.waiting, self.metrics.batches.observe)

    async def audio(self, http: HttpRequest, request: Request) -> AsyncIterator[np.ndarray]:
        """Puts a request into the line and gives its audio, unless the client leaves."""
        self.worker.submit(request)

        async def watch() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass
            request.answer(Gone())

        watcher = asyncio.create_task(watch())
        try:
            async for piece in request.audio():
                yield piece
        finally:
            watcher.cancel()

    async def body(self, http: HttpRequest, most: int) -> bytes:
        """The body of a request, of at most so many bytes."""
        if self.worker.is_full:
            raise Busy
        body = bytearray()
        if int(http.headers.get("content-length", 0)) > most:
            raise HTTPException(413, f"the body has more than {most:,} bytes")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in http.stream():
                    body += chunk
                    if len(body) > most:
                        raise HTTPException(413, f"the body has more than {most:,} bytes")
        except TimeoutError as error:
            raise HTTPException(408, f"the body took more than {BODY_SECONDS} seconds") from error
        return bytes(body)

    def mel_audio(
        self, http: HttpRequest, mel: np.ndarray, asked: "VocodeQuery"
    ) -> AsyncIterator[np.ndarray]:
        """Speech of a mel."""
        options, is_streamed = asked.options(), asked.format == "pcm"
        self._check_length(max(mel.shape) * self.vocoder.hop_length / self.vocoder.sample_rate)
        least = None if is_streamed else WINDOW_FRAMES

        def pieces() -> Pieces:
            for piece in self.vocoder.stream([mel], options, least, lambda note: None):
                yield piece.cpu().numpy()

        is_own = options.convention in (None, NATIVE)
        # A mel of another rate is converted as a whole.
        if not is_streamed and (not is_own or mel.shape[1] <= WINDOW_FRAMES):
            return self.audio(http, MelRequest(self._deadline(), mel=mel, options=options))
        return self.audio(http, PiecesRequest(self._deadline(), pieces=pieces))

    def copy_audio(
        self, http: HttpRequest, body: bytes, asked: "SamplingQuery"
    ) -> AsyncIterator[np.ndarray]:
        """The copy of a recording, any file that libsndfile reads."""

        def pieces() -> Pieces:
            recording = self._recording(body)
            mel = self.vocoder.mel_to_copy(recording)
            left = len(recording)
            for piece in self.vocoder.stream(
                [mel], asked.options(), WINDOW_FRAMES, lambda note: None
            ):
                yield piece[:left].cpu().numpy()
                left -= len(piece)

        return self.audio(http, PiecesRequest(self._deadline(), pieces=pieces))

    def _deadline(self) -> float:
        return time.monotonic() + self.limits.seconds

    def _recording(self, body: bytes) -> np.ndarray:
        with tempfile.NamedTemporaryFile(prefix="waveflow-") as file:
            file.write(body)
            file.flush()
            try:
                with suppress(soundfile.SoundFileError):  # read_audio says what is wrong
                    self._check_length(soundfile.info(file.name).duration)
                audio, rate, _ = read_audio(file.name, self.vocoder.sample_rate)
                self._check_length(len(audio) / rate)  # a header may say less
                return audio
            except WaveflowError as error:
                raise AudioError(str(error).replace(file.name, "this recording")) from error

    def _check_length(self, seconds: float) -> None:
        most = self.limits.audio_seconds
        if seconds > most:
            raise AudioError(f"this has {seconds:.0f} seconds, at most {most:.0f} are spoken here")

    def text_audio(self, http: HttpRequest, body: SpeechBody) -> AsyncIterator[np.ndarray]:
        """Speech of a text."""
        n, most = len(body.input), self.limits.characters
        if n > most:
            raise HTTPException(413, f"the text has {n:,} characters; at most {most:,} are spoken")
        options = SynthesisOptions(seed=body.seed)

        def pieces() -> Pieces:
            return self.speaker.stream([body.input], options, body.speed)

        return self.audio(http, PiecesRequest(self._deadline(), pieces=pieces))

    async def answer(
        self, audio: AsyncIterator[np.ndarray], format: Format, pcm_rate: int | None = None
    ) -> Response:
        """The audio as a file, or as a stream of 16-bit samples.

        The first piece is waited for, so that a request that is wrong has an error's status.
        """
        rate = self.vocoder.sample_rate
        if format == "pcm":
            first = await anext(audio)
            out = pcm_rate or rate
            return StreamingResponse(
                self._samples(first, audio, out), media_type=f"audio/pcm;rate={out}"
            )
        pieces = [piece async for piece in audio]
        self._count(pieces)
        data = await run_in_threadpool(encoded, np.concatenate(pieces), rate, format)
        return Response(data, media_type=_MEDIA[format])

    async def _samples(
        self, first: np.ndarray, audio: AsyncIterator[np.ndarray], rate: int
    ) -> AsyncIterator[bytes]:
        import soxr

        own = self.vocoder.sample_rate
        resampler = soxr.ResampleStream(own, rate, 1) if rate != own else None

        def samples(piece: np.ndarray, last: bool = False) -> bytes:
            if resampler is not None:
                piece = resampler.resample_chunk(piece, last)
            return to_int16(piece).astype("<i2").tobytes()

        # Whoever plays it in real time is done by then.
        end = self._deadline() + self.limits.audio_seconds
        self._count([first])
        yield samples(first)
        with suppress(Gone):  # nobody is there to be told
            async for piece in audio:
                if time.monotonic() > end:
                    return
                self._count([piece])
                yield samples(piece)
            yield samples(np.zeros(0, np.float32), last=True)

    def _count(self, pieces: list[np.ndarray]) -> None:
        self.metrics.audio.inc(sum(map(len, pieces)) / self.vocoder.sample_rate)


def encoded(audio: np.ndarray, sample_rate: int, format: str) -> bytes:
    """Audio (T,) as a file."""
    file = io.BytesIO()
    subtype = None if format == "mp3" else "PCM_16"
    data = audio if format == "mp3" else to_int16(audio)
    soundfile.write(file, data, sample_rate, subtype, format=format.upper())
    return file.getvalue()


def make_app(speaker: Speaker, limits: ServerLimits | None = None) -> FastAPI:
    """The application, with its worker's thread."""
    service = Service(speaker, limits or ServerLimits())
    vocoder = speaker.vocoder

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.worker.stop)

    app = FastAPI(
        title="waveflow", version=__version__, lifespan=life, docs_url=None, redoc_url=None
    )

    @app.exception_handler(WaveflowError)
    async def wrong(http: HttpRequest, error: WaveflowError) -> Response:
        return problem(400, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return problem(400, f"{where}: {first['msg']}")

    @app.exception_handler(ValidationError)
    async def not_a_body(http: HttpRequest, error: ValidationError) -> Response:
        return problem(400, first_problem(error))

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> Response:
        response = problem(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Busy)
    async def busy(http: HttpRequest, error: Busy) -> Response:
        response = problem(503, f"{service.limits.waiting} requests wait already: try again")
        response.headers["retry-after"] = "1"
        return response

    @app.exception_handler(TooLate)
    async def late(http: HttpRequest, error: TooLate) -> Response:
        return problem(504, f"not done within {service.limits.seconds:.0f} seconds")

    @app.exception_handler(Exception)
    async def ours(http: HttpRequest, error: Exception) -> Response:
        return problem(500, fault(error))

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(Gone)
    async def gone(http: HttpRequest, error: Exception) -> Response:
        return problem(CLIENT_LEFT, "the client has left")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        sources = "default-src 'self' 'unsafe-inline' blob:; img-src data:"
        policy = f"{sources}; base-uri 'none'; form-action 'none'"
        return HTMLResponse(
            PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": policy}
        )

    @app.get("/spectrogram.js")
    async def spectrogram() -> Response:
        return Response(SPECTROGRAM.read_text(encoding="utf-8"), media_type="text/javascript")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {
            "status": "ok" if service.worker.is_alive else "broken",
            "version": __version__,
            "model": vocoder.config.model.type,
            "sample_rate": vocoder.sample_rate,
            "waiting": service.worker.n_open,
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/v1/audio/speech")
    async def speech(http: HttpRequest) -> Response:
        most = TEXT_BODY_BYTES + 12 * service.limits.characters  # of a character as \\u escapes
        body = SpeechBody.model_validate_json(await service.body(http, most))
        return await service.answer(
            service.text_audio(http, body), body.response_format, pcm_rate=PCM_RATE
        )

    @app.post("/v1/vocode")
    async def vocode(http: HttpRequest, asked: Annotated[VocodeQuery, Query()]) -> Response:
        body = await service.body(http, service.limits.body_bytes)
        mel = await run_in_threadpool(one_mel, body)
        return await service.answer(service.mel_audio(http, mel, asked), asked.format)

    @app.post("/v1/resynth")
    async def resynth(http: HttpRequest, asked: Annotated[SamplingQuery, Query()]) -> Response:
        body = await service.body(http, service.limits.body_bytes)
        return await service.answer(service.copy_audio(http, body, asked), asked.format)

    app.add_middleware(Measured, metrics=service.metrics)
    return app


class SamplingQuery(BaseModel):
    """How to sample, and the format of the answer."""

    model_config = ConfigDict(extra="forbid")

    sigma: float | None = None
    refine: int | None = None
    seed: int = 0
    format: Format = "wav"

    def options(self) -> SynthesisOptions:
        return SynthesisOptions(self.sigma, self.seed, self.refine, convention=NATIVE)


class VocodeQuery(SamplingQuery):
    """What a mel is in, too."""

    convention: str | None = None
    time_major: bool | Literal["auto"] = False
    lossy: bool = False

    def options(self) -> SynthesisOptions:
        return SynthesisOptions(
            self.sigma, self.seed, self.refine, self.convention, self.time_major, self.lossy
        )


def problem(status: int, message: str) -> JSONResponse:
    """An error, as OpenAI's API spells it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind}}, status)


def one_mel(body: bytes) -> np.ndarray:
    """The mel of a body, one array as numpy.save writes it."""
    mels = list(itertools.islice(read_mels(io.BytesIO(body)), 2))
    if len(mels) != 1:
        held = "more than one array" if mels else "no array"
        raise MelMismatchError(f"the body holds {held}: send one mel as .npy")
    return mels[0]
