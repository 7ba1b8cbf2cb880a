"""Options of the way to the sources."""

from typing import Annotated

from pydantic import Field

from cachd.config.group import Group
from cachd.fields import AbsolutePath, Seconds
from cachd.settings.given import Also
from cachd.settings.types import Exemptions, ProxyUrl


class NetworkOptions(Group):
    """Which authorities and proxies connections to sources use."""

    ca_file: Annotated[AbsolutePath | None, Also(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"))] = Field(
        None,
        description="PEM file of the certificate authorities to trust for sources; default: the system's",
    )
    s3_ca_file: Annotated[AbsolutePath | None, Also(("AWS_CA_BUNDLE",))] = Field(
        None, description="PEM file of the certificate authorities to trust for S3; default: ca_file"
    )
    proxy: ProxyUrl | None = Field(
        None,
        description="reach all sources through this HTTP proxy (CONNECT), such as http://proxy:3128; env:"
        " take HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY from the environment",
    )
    no_proxy: Exemptions = Field(
        (),
        description="hosts to reach without the proxy: host, .domain, host:port, 10.0.0.0/8 or *; localhost"
        " and loopback addresses are never proxied",
    )
    proxy_credentials_file: AbsolutePath | None = Field(
        None, description="file with user:password for the proxy, on one line; re-read at every use"
    )
    connect_seconds: Seconds = Field(
        10.0, gt=0, le=600, description="timeout for opening a connection to a source"
    )
    stall_seconds: Seconds = Field(
        30.0, gt=0, le=3600, description="close a connection that delivers no byte for this long"
    )
