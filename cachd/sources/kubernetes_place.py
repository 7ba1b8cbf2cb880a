"""The address of a server of Kubernetes, and the token that this pod sends to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cachd import files

_LONGEST_TOKEN_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Place:
    """A server at `https://HOST:PORT`, the file of the token to show, and the file of trusted authorities."""

    url: str
    token_file: Path
    ca_file: Path

    @property
    def address(self) -> tuple[str, int]:
        """Its host and port. An IPv6 address may stand without brackets, as `status.hostIP` has it."""
        host, _, port = self.url.removeprefix("https://").rstrip("/").rpartition(":")
        return host.strip("[]"), int(port)

    def authorization(self) -> dict[str, str]:
        """The header with the token. Raises OSError, and ValueError for a token that cannot be sent.

        The token is read at each call, because the kubelet replaces its file about once an hour.
        """
        token = files.content(self.token_file, at_most=_LONGEST_TOKEN_BYTES).decode("ascii").strip()
        return {"Authorization": f"Bearer {token}"}
