"""The program that `proxy.Proxy` runs: proxy.py, which finds every name below .test at 127.0.0.1."""

from __future__ import annotations

import sys

import proxy
from proxy.http.proxy import HttpProxyBasePlugin


class Names(HttpProxyBasePlugin):
    def resolve_dns(self, host: str, port: int) -> tuple[str | None, None]:
        return ("127.0.0.1" if host.endswith(".test") else None), None


if __name__ == "__main__":
    with proxy.Proxy(sys.argv[1:], plugins=[Names]):
        print("ready", flush=True)
        sys.stdin.read()
