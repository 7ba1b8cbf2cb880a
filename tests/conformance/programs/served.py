"""Starts a server by the command of `cachd env`, waits until it is healthy, and asks for a completion."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

PORT, LONGEST_SECONDS = os.environ["PORT"], 1500


def asked(path, body=None):
    data = json.dumps(body).encode() if body else None
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read() or b"{}")


def serve(words):
    """Run the server until its completions are checked."""
    with open(os.path.join(os.environ["TMPDIR"], "log"), "w+") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + LONGEST_SECONDS
            while True:
                try:
                    asked("/health")
                    break
                except (urllib.error.URLError, OSError):
                    if server.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        text = log.read()
                        print(text, file=sys.stderr)
                        lines = [line for line in text.splitlines() if "Error" in line or "error" in line]
                        sys.exit(f"status {server.poll()}: {(lines or [text[-300:]])[-1][-300:]}")
                    time.sleep(0.2)
            for name in os.environ["ASK"].split():
                answer = asked("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 2})
                assert answer["choices"], answer
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


words = shlex.split(os.environ["RUN"])
serve([os.path.join(os.path.dirname(sys.executable), words[0]), *words[1:]])
