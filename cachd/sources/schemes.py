"""One source a scheme, each made when a pull first asks for it.

The clients of the Hub and of S3 take longer to load than the whole daemon to start, and few nodes use both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from cachd.policy.reach import Reach
from cachd.sources.http import Http
from cachd.sources.secrets import Secret
from cachd.sources.share import ShareSource
from cachd.sources.source import Source
from cachd.sources.trust import Authorities
from cachd.sources.web import WebSource


class Sources:
    """The sources of one daemon. The endpoints an operator configured are within reach by that alone.

    `http` makes the byte path to a Reach, with other `authorities` where they are given.
    Safe from any thread. Raises Invalid at once for an endpoint that is none.
    """

    def __init__(
        self,
        http: Callable[..., Http],
        reach: Reach,
        *,
        s3_authorities: Authorities,
        stall_seconds: float,
        hf_endpoint: str,
        hf_token: Secret,
        s3_endpoint_url: str | None,
        s3_region: str | None,
    ) -> None:
        self._http, self._reach = http, reach
        self._s3_authorities, self._stall_seconds = s3_authorities, stall_seconds
        self._hf_endpoint, self._hf_token = hf_endpoint, hf_token
        self._s3_endpoint_url, self._s3_region = s3_endpoint_url, s3_region
        self._hf_reach = reach.also([hf_endpoint])
        self._s3_reach = reach.also([s3_endpoint_url] if s3_endpoint_url else [])
        self._lock = threading.Lock()
        self._made: dict[str, Source] = {}

    def of(self, scheme: str) -> Source:
        """The source of a scheme that a Ref can have."""
        with self._lock:
            if scheme not in self._made:
                self._made[scheme] = self._make(scheme)
            return self._made[scheme]

    def _make(self, scheme: str) -> Source:
        if scheme == "hf":
            from cachd.sources.huggingface import HubSource  # with huggingface_hub

            return HubSource(self._http(self._hf_reach), endpoint=self._hf_endpoint, token=self._hf_token)
        if scheme == "s3":
            from cachd.sources.s3 import BucketSource  # with botocore

            return BucketSource(
                self._http(self._s3_reach, authorities=self._s3_authorities),
                endpoint_url=self._s3_endpoint_url,
                region=self._s3_region,
            )
        if scheme == "file":
            return ShareSource(self._reach, stall_seconds=self._stall_seconds)
        return WebSource(self._http(self._reach))
