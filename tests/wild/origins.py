"""Every module of odd origins, by the kind of its rows. Importing this module registers all origins."""

from __future__ import annotations

from tests.wild import (
    http,
    http_headers,
    http_pages,
    http_reports,
    hub,
    hub_mirrors,
    rclone,
    s3,
    s3_listings,
    share,
)
from tests.wild.field import WILD

__all__ = ["MODULES", "WILD"]
MODULES = {
    "http": (http, http_headers, http_pages, http_reports, rclone),
    "hub": (hub, hub_mirrors),
    "s3": (s3, s3_listings, rclone),
    "share": (share,),
}
