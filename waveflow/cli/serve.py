"""`waveflow serve`: speech over HTTP."""

import math
import signal
import socket
from typing import Annotated

import typer

from waveflow.cli import options
from waveflow.cli.console import note
from waveflow.errors import ConfigError
from waveflow.pretrained import voice_folder

# Seconds after a signal to stop, beside those that a request may take.
GRACE = 5


def serve(
    loading: options.Loading,
    voice: Annotated[
        str | None,
        typer.Option("--voice", metavar="NAME|FOLDER|espeak", help="The voice, as in say."),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="0.0.0.0: reachable by others.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="0: any free one.")
    ] = 8000,
    waiting: Annotated[
        int, typer.Option("--waiting", min=1, metavar="N", help="Requests that may wait.")
    ] = 64,
) -> None:
    """Serves speech over HTTP, with a page to try it at /.

    POST /v1/vocode takes a mel as .npy, /v1/resynth a recording, /v1/audio/speech a
    text as OpenAI's API does. Answers are WAV, FLAC or MP3 files, or streams of
    16-bit samples. /health and /metrics are for those who run it. SIGTERM or Ctrl-C
    ends it once the requests are answered.

    \b
    Examples:
      waveflow serve
      waveflow serve --host 0.0.0.0 --port 80 --model runs/x --threads 4
      curl --data-binary @mel.npy localhost:8000/v1/vocode -o out.wav
    """
    try:
        import uvicorn

        from waveflow.serve.app import ServerLimits, make_app
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'waveflow[serve]'") from error
    from waveflow.tts.speaker import load_speaker

    if voice != "espeak":
        voice_folder(voice)
    listener = _listener(host, port)
    speaker = load_speaker(voice, loading.load())
    list(speaker.stream(["Ready."]))  # what does not fit together is an error now
    limits = ServerLimits(waiting=waiting)
    app = make_app(speaker, limits)
    config = uvicorn.Config(
        app,
        log_level="warning",
        limit_concurrency=max(64, 4 * waiting),
        timeout_graceful_shutdown=math.ceil(limits.seconds) + GRACE,
    )
    server = uvicorn.Server(config)
    # uvicorn raises the signal again once it has stopped; that end is as wanted.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    address, number = listener.getsockname()[:2]
    note(f"listening on http://{f'[{address}]' if ':' in address else address}:{number}")
    server.run(sockets=[listener])


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such name"
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from error
