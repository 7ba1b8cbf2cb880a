"""Options of the sources that models come from."""

from typing import Annotated

from pydantic import Field

from cachd.config.group import RELOADED, Group
from cachd.fields import AbsolutePath, Endpoint
from cachd.settings.given import Also
from cachd.settings.types import Reachable, Refusals, Several
from cachd.sources.entries import MAX_ENTRIES, Addressing, Entry


class SourcesOptions(Group):
    """What may be pulled, from which servers, with which credentials."""

    allow: Annotated[Reachable, RELOADED] = Field(
        (),
        description="what sources may reach besides public https: private networks (10.0.0.0/8) and URL"
        " prefixes (http://host:port/path/, file:///share/)",
    )
    refuse: Annotated[Refusals, RELOADED] = Field(
        (),
        description="file patterns, such as *.bin: a pull that selects a matching file is refused; and"
        " digests (sha256:…): every model that contains one is withdrawn",
    )
    sources: Annotated[tuple[Entry, ...], Several, RELOADED] = Field(
        (),
        max_length=MAX_ENTRIES,
        description="settings for all refs that begin with a prefix, such as hf://org/; see Sources",
    )
    trust_claimed_digests: bool = Field(
        default=False,
        description="let a source share a cached file by stating its sha256 alone, without a proof that it"
        " has the bytes",
    )
    hf_endpoint: Annotated[Endpoint, Also(("HF_ENDPOINT",))] = Field(
        "https://huggingface.co", description="URL of the Hub or of a mirror; cachd sends the Hub token there"
    )
    hf_token_file: AbsolutePath | None = Field(
        None,
        description="file with the Hub token; default: HF_TOKEN, the file that HF_TOKEN_PATH names, or the"
        " token of `hf auth login`",
    )
    ms_endpoint: Endpoint = Field(
        "https://modelscope.cn", description="URL of ModelScope; cachd sends its token there"
    )
    ms_token_file: AbsolutePath | None = Field(None, description="file with an access token of ModelScope")
    s3_endpoint_url: Annotated[
        Endpoint | None,
        Also(("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), unless="AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"),
    ] = Field(None, description="URL of an S3 server other than AWS")
    s3_region: Annotated[str | None, Also(("AWS_REGION", "AWS_DEFAULT_REGION"))] = Field(
        None,
        description="AWS region that requests are signed for; default: that of the AWS client's own"
        " configuration",
    )
    s3_addressing: Addressing = Field(
        "auto",
        description="how URLs name the bucket: path (host/bucket/key), virtual (bucket.host/key), or auto: as"
        " the server wants it",
    )
