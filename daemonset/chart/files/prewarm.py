"""Asks the daemon of every node for models, and waits until all of them are ready.

prewarm.py HOST PORT MODELS.json: HOST is a name that leads to every node's daemon, MODELS a list of bodies of
POST /v1/models. CACHD_TOKEN_FILE names the file of the token. Exit code 1 if a node failed, or was not ready
within TIMEOUT_SECONDS. It needs Python's own library alone.
"""

import http.client
import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

AT_ONCE = 64  # nodes asked at the same time
WAIT_SECONDS = 20  # of one request


def nodes(host, port):
    """The address of each node's daemon."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({address[0] for *_, address in found})


def call(node, port, method, path, body=None):
    """The status and the answer of one call."""
    token = Path(os.environ["CACHD_TOKEN_FILE"]).read_text().strip()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(node, port, timeout=WAIT_SECONDS + 40)
    try:
        connection.request(method, path, body and json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def keeps(node, port, model, deadline):
    """What became of one model on one node: its state when it ended, or why there is none."""
    status, answer = call(node, port, "POST", "/v1/models", model)
    if status not in (200, 202):
        return False, answer.get("detail", status)
    name = answer["name"]
    while status != 200:
        if time.monotonic() > deadline:
            return False, "not ready in time"
        time.sleep(1)  # a daemon with many callers answers at once
        status, answer = call(node, port, "GET", f"/v1/models/{name}/ready?wait={WAIT_SECONDS}")
        if status != 200 and answer.get("final"):
            return False, answer.get("detail", status)
        if status not in (200, 503):
            return False, answer.get("detail", status)
    return True, "ready"


def prewarm(node, port, models, deadline):
    """Whether every model is ready on one node; prints a line for each."""
    is_ready = True
    for model in models:
        try:
            is_there, words = keeps(node, port, model, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            is_there, words = False, error
        print(f"{node}: {model.get('name', model['ref'])}: {words}", flush=True)
        is_ready = is_ready and is_there
    return is_ready


def main(host, port, models):
    """The exit code."""
    deadline = time.monotonic() + float(os.environ.get("TIMEOUT_SECONDS", "7200"))
    wanted = json.loads(Path(models).read_text())
    with ThreadPoolExecutor(AT_ONCE) as pool:
        ended = list(
            pool.map(lambda node: prewarm(node, int(port), wanted, deadline), nodes(host, int(port)))
        )
    print(f"{sum(ended)} of {len(ended)} nodes are ready")
    return 0 if ended and all(ended) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
