"""The modules of odd origins, by kind. To import this one registers all of them."""

from tests.wild import (
    http,
    http_headers,
    http_lines,
    http_pages,
    http_reports,
    hub,
    hub_listings,
    hub_mirrors,
    rclone,
    s3,
    s3_gateways,
    s3_listings,
    share,
)

MODULES = {
    "http": (http, http_headers, http_lines, http_pages, http_reports, rclone),
    "hub": (hub, hub_listings, hub_mirrors),
    "s3": (s3, s3_gateways, s3_listings, rclone),
    "share": (share,),
}
