"""A person at a terminal: a real shell in tmux, which is typed into and read off its screen."""

from __future__ import annotations

import os
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

PATIENCE_SECONDS = 120.0
PROMPT = "$"
_PS1 = r"\[\e[1;32m\]$\[\e[0m\] "


class Terminal:
    """A terminal of `size` columns and lines. Its shell is in the directory `place`, and has only `env`.

    A context manager. At its end, it interrupts what runs there.
    """

    def __init__(self, place: Path, size: tuple[int, int], env: Mapping[str, str]) -> None:
        self._place, self._size = place, size
        self._env = {"PS1": _PS1, "TERM": "tmux-256color", "LC_ALL": "C.UTF-8", **env}
        self._resources = ExitStack()
        self._socket, self._output = "", -1

    def __enter__(self) -> Self:
        # The path of a socket has at most 108 bytes, and the directories of tests are often longer.
        own = Path(self._resources.enter_context(tempfile.TemporaryDirectory()))
        self._socket, fifo = str(own / "tmux"), own / "output"
        os.mkfifo(fifo)
        self._output = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        self._resources.callback(os.close, self._output)
        columns, lines = map(str, self._size)
        size, at = ("-x", columns, "-y", lines), ("-c", str(self._place))
        env = (f"{name}={value}" for name, value in self._env.items())
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, *at, "env", "-i", *env, "bash", "--norc")
        self._resources.callback(self._tmux, "kill-server")
        self._resources.callback(self._interrupt)
        self._tmux("pipe-pane", f"exec cat > '{fifo}'")  # so that a change of the screen is an event
        self.wait_for_prompt()
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def run(self, command: str) -> None:
        """Type a command, and wait until the shell asks for the next one."""
        self.type(command)
        self.wait_for_prompt()

    def type(self, command: str) -> None:
        """Type a command and Enter."""
        self._tmux("send-keys", "-l", command)
        self.wait_for(re.escape(command.split()[-1]) + r"\s*$")
        self.press("Enter")

    def press(self, key: str) -> None:
        """Press a key, by its name in tmux: `C-c` is Ctrl-C."""
        self._tmux("send-keys", key)

    def clear(self) -> None:
        """Leave an empty screen with a prompt, by Ctrl-L."""
        self.press("C-l")
        self._wait(lambda text: text.strip() == PROMPT, "an empty screen")
        self._tmux("clear-history")

    def wait_for(self, pattern: str) -> None:
        """Wait until the screen matches. Raises AssertionError with the screen if it never does."""
        self._wait(lambda text: re.search(pattern, text) is not None, repr(pattern))

    def wait_for_prompt(self) -> None:
        """Wait until the shell asks for a command."""
        self._wait(lambda text: text.split("\n")[-1] == PROMPT, "the prompt")

    def colours(self) -> str:
        """The screen and what scrolled out of it, with the escape sequences of its colours."""
        return self._tmux("capture-pane", "-e", "-p", "-S", "-")

    def _interrupt(self) -> None:
        """End what runs. The daemon would outlive its terminal: SIGHUP makes it read its configuration."""
        self.press("C-c")
        self.wait_for_prompt()

    def _wait(self, is_there: Callable[[str], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not is_there(text := self._tmux("capture-pane", "-p").rstrip()):
            left = max(deadline - time.monotonic(), 0)
            changed, *_ = select.select([self._output], [], [], left)
            assert changed, f"waited in vain for {what}:\n{text}"
            os.read(self._output, 1 << 16)

    def _tmux(self, *words: str) -> str:
        command = ("tmux", "-S", self._socket, *words)
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout
