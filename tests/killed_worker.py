"""Work for processes that must start fast: they import this file alone."""

import os
import signal

from waveflow.data.clips import ClipTask, Refusal, refuse


def killed_by_clip1(task: ClipTask) -> None:
    """As a process is that reads a recording whose samples take all memory."""
    if task.path.name == "clip1.wav":
        os.kill(os.getpid(), signal.SIGKILL)
    refuse(task, Refusal(reason="silent", detail=task.path.name))
