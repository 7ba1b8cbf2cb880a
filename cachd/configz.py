"""Asks the kubelet of this node for its configuration: GET /configz.

Whoever may `get` the subresource `nodes/configz` gets an answer (Kubernetes 1.33 and later). Before, that
took `nodes/proxy`, which also allows to run commands in every container of the node: nobody should grant it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from cachd import files
from cachd.errors import CachdError, Unavailable
from cachd.foreign import Limit, load_json
from cachd.sources.detached import DetachedThread
from cachd.sources.kubernetes_place import Place
from cachd.sources.trust import Authorities

_SECONDS = 3.0
_LIMIT = Limit(size_bytes=1 << 20, tokens=20_000, depth=20)
_HINT = (
    "set kubelet_thresholds, or allow the service account to get nodes/configz (Kubernetes 1.33 and later)"
)


def configuration(kubelet: Place, *, seconds: float = _SECONDS) -> Mapping[str, Any]:
    """The KubeletConfiguration in force. Raises Unavailable, at the latest after `seconds`."""
    try:
        with DetachedThread(seconds) as thread:
            return thread.call(_configuration, kubelet, seconds)
    except TimeoutError:
        raise _unavailable(kubelet, f"no answer within {seconds:g} s") from None


def _configuration(kubelet: Place, seconds: float) -> Mapping[str, Any]:
    from http.client import HTTPException, HTTPSConnection

    try:
        headers = kubelet.authorization()
        context = Authorities(str(kubelet.ca_file)).context()
        connection = HTTPSConnection(*kubelet.address, timeout=seconds, context=context)
        with closing(connection):
            connection.request("GET", "/configz", headers=headers)
            answer = connection.getresponse()
            content = answer.read(_LIMIT.size_bytes + 1)
        if answer.status != 200:
            raise _unavailable(kubelet, f"it answered {answer.status}")
        found = load_json(content, "the kubelet's configuration", _LIMIT)["kubeletconfig"]
        return {str(key): value for key, value in found.items()}
    except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = files.reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise _unavailable(kubelet, reason) from error
    except CachdError as error:
        raise _unavailable(kubelet, error.detail) from error


def _unavailable(kubelet: Place, reason: str) -> Unavailable:
    return Unavailable(f"the kubelet at {kubelet.url}: {reason}"[:500], code="no_kubelet", hint=_HINT)
