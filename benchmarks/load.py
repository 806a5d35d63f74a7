"""Load on `waveflow serve`: many clients over loopback for minutes; what is lost, and what grows.

    python benchmarks/load.py --clients 16 --minutes 3

Starts a server of its own. Each client sends one request after another: a mel of 1 to 4 seconds
(four of five), or a sentence. Memory is the server's resident set after the first tenth of the time
and at the end.
"""

import argparse
import http.client
import io
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from waveflow.audio.io import read_mel
from waveflow.cli.console import show
from waveflow.pretrained import model_folder

SENTENCES = (
    "Good morning, and welcome to the station.",
    "The train at nine thirty leaves from platform four.",
    "Please keep your ticket until the end of the journey.",
)


class Client(threading.Thread):
    """Sends requests until the time is over, and keeps what they took.

    Attributes:
        seconds: of each answer.
        spoken: seconds of speech received.
        problems: of each request that failed.
    """

    def __init__(self, address: str, mel: np.ndarray, end: float, seed: int) -> None:
        super().__init__()
        self.address, self.mel, self.end = address, mel, end
        self.random = random.Random(seed)
        self.seconds: list[float] = []
        self.spoken = 0.0
        self.problems: list[str] = []

    def run(self) -> None:
        while time.monotonic() < self.end:
            begin = time.monotonic()
            try:
                data = self._ask()
            except (OSError, http.client.HTTPException) as error:
                self.problems.append(repr(error))
                continue
            self.seconds.append(time.monotonic() - begin)
            self.spoken += (len(data) - 44) / 2 / 22050

    def _ask(self) -> bytes:
        if self.random.random() < 0.2:
            text = {"input": self.random.choice(SENTENCES), "response_format": "wav"}
            return self._post("/v1/audio/speech", json.dumps(text).encode())
        n_frames = self.random.randint(86, 344)
        first = self.random.randint(0, max(0, self.mel.shape[1] - n_frames))
        file = io.BytesIO()
        np.save(file, self.mel[:, first : first + n_frames])
        return self._post(f"/v1/vocode?seed={self.random.randint(0, 9)}", file.getvalue())

    def _post(self, path: str, body: bytes) -> bytes:
        request = urllib.request.Request(self.address + path, body)
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.read()


def resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        [line] = [line for line in file if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1000


def main(argv: Sequence[str] | None = None) -> None:
    """Prints requests, losses, times and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    args = parser.parse_args(argv)
    command = [sys.executable, "-m", "waveflow", "serve", "--port", "0"]
    command += ["--threads", str(args.threads)]
    log = Path(tempfile.mkdtemp()) / "log"
    with open(log, "w") as file:
        server = subprocess.Popen(command, stderr=file)
    while "\n" not in log.read_text() and server.poll() is None:
        time.sleep(0.1)
    address = log.read_text().split()[-1]
    try:
        mel = read_mel(model_folder() / "example.npy")
        mel = np.concatenate([mel, mel], 1)
        begin = time.monotonic()
        end = begin + 60 * args.minutes
        clients = [Client(address, mel, end, seed) for seed in range(args.clients)]
        for client in clients:
            client.start()
        time.sleep(6 * args.minutes)
        early = resident_mb(server.pid)
        for client in clients:
            client.join()
        took = time.monotonic() - begin
        late = resident_mb(server.pid)
    finally:
        server.terminate()
        status = server.wait()
    seconds = np.concatenate([client.seconds for client in clients])
    problems = [problem for client in clients for problem in client.problems]
    spoken = sum(client.spoken for client in clients)
    show(f"{args.clients} clients, {took:.0f} s, {args.threads} thread(s) of the model")
    show(f"answered {len(seconds):,}, lost {len(problems)} {sorted(set(problems))[:3]}")
    show(f"{len(seconds) / took:.1f} requests/s, {spoken / took:.1f} s of speech a second")
    half, most = np.percentile(seconds, [50, 95])
    show(f"an answer takes {half:.2f} s (median), {most:.2f} s (95 %)")
    show(f"memory {early:.0f} MB after a tenth of the time, {late:.0f} MB at the end")
    show(f"ended with status {status}")


if __name__ == "__main__":
    main()
