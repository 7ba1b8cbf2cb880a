"""Checks secrets and credentials: their files, where they come from, and whether servers accept them.

No finding contains a secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from cachd.config import Config, Loaded
from cachd.daemon.sources import build_sources
from cachd.doctor.at_once import at_once
from cachd.doctor.codes import Code
from cachd.doctor.endpoints import endpoints_of, refs_of
from cachd.doctor.finding import Finding, State, of_error, ok
from cachd.errors import CachdError, Forbidden, NotFound, Unavailable
from cachd.model import Ref
from cachd.settings.tokens import TokenFile
from cachd.sources.cancel import CancelToken
from cachd.sources.headers import HeadersFile
from cachd.sources.schemes import Sources
from cachd.sources.secrets import Secret
from cachd.sources.source import Source

if TYPE_CHECKING:
    from cachd.sources.s3 import BucketSource

_SIGNED_BY = {  # botocore's word -> where that is
    "env": "the variables AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "shared-credentials-file": "a credentials file",
    "config-file": "the AWS configuration file",
    "assume-role": "a role that a profile assumes",
    "assume-role-with-web-identity": "a web identity token (IRSA)",
    "custom-process": "a program that the AWS configuration names",
    "container-role": "the container's role (EKS Pod Identity, ECS)",
    "iam-role": "the machine's metadata service",
    "sso": "a login of AWS IAM Identity Center",
}


def check_secret_files(config: Config) -> Iterator[Finding]:
    """Whether each secret file can be read and used, apart from those that their servers are asked about."""
    reads: dict[str, Callable[[], object]] = {}
    if config.proxy_credentials_file:
        reads["proxy_credentials_file"] = Secret(config.proxy_credentials_file).user_and_password
    if config.ms_token_file:
        reads["ms_token_file"] = Secret(config.ms_token_file).read
    for entry in config.sources:
        if entry.headers_file:
            reads[f"headers_file of {entry.prefix}"] = HeadersFile(entry.headers_file).read
    for subject, read in reads.items():
        try:
            read()
        except CachdError as error:
            yield of_error(Code.secret_file, error, subject=subject)
        else:
            yield ok(Code.secret_file, f"{subject} can be read", subject=subject)


def check_api_tokens(config: Config) -> Iterator[Finding]:
    """Whether the API's tokens can be read."""
    if config.token_file is None:
        return
    faults = TokenFile(config.token_file).faults()
    hint = "correct it, and let the daemon's user read it; tokens that were in force before stay in force"
    for fault in faults:
        what = f"{config.token_file}: {fault}"
        yield Finding(Code.api_tokens, State.wrong, what, hint, subject="token_file")
    if not faults:
        yield ok(Code.api_tokens, f"{config.token_file} can be read", subject="token_file")


def check_hub_tokens(loaded: Loaded, seconds: float) -> Iterator[Finding]:
    """Whether each Hub of the options and of `sources` accepts its token."""
    from cachd.sources.huggingface import HubSource  # it loads a large library, and so does S3

    found_sources = _distinct(loaded, "hf", "hf://cachd-doctor/model")
    hubs = [source for source, _ in found_sources if isinstance(source, HubSource)]
    found = at_once([partial(hub.account, CancelToken()) for hub in hubs], seconds)
    for hub, account in zip(hubs, found, strict=True):
        where = hub.token_from
        if isinstance(account, CachdError):
            yield _refused_token(account, hub.endpoint, where)
        elif account is None:
            yield ok(
                Code.hub_token, "no token is set: only public models can be pulled", subject=hub.endpoint
            )
        else:
            what = f"{hub.endpoint} accepts the token of {where}: it is {account}'s"
            yield ok(Code.hub_token, what, subject=hub.endpoint)


def _refused_token(error: CachdError, endpoint: str, where: str) -> Finding:
    is_unsure = isinstance(error, Unavailable | NotFound)
    hint = error.hint
    if is_unsure:
        hint = "a mirror may have no whoami; otherwise see the finding about its endpoint"
    elif isinstance(error, Forbidden):
        hint = f"write a valid token to {where}: it may have been revoked, or have expired"
    state = State.warning if is_unsure else State.wrong
    return of_error(Code.hub_token, error, subject=endpoint, state=state, hint=hint)


def check_s3_credentials(loaded: Loaded, seconds: float) -> Iterator[Finding]:
    """Where credentials for S3 come from, and whether S3 accepts them, wherever the options name S3."""
    if not any(each.scheme == "s3" and each.is_named for each in endpoints_of(loaded)):
        return
    from cachd.sources import s3_trial
    from cachd.sources.s3 import BucketSource

    found_sources = _distinct(loaded, "s3", "s3://cachd-doctor/")
    asked = [(source, location) for source, location in found_sources if isinstance(source, BucketSource)]
    place_of = partial(s3_trial.credentials_from, cancel_token=CancelToken())
    places = at_once([partial(place_of, source) for source, _ in asked], seconds)
    tries = at_once([partial(_tried, source, location) for source, location in asked], seconds)
    for (_, location), place, tried in zip(asked, places, tries, strict=True):
        yield _signed(location, place, tried)


def _tried(source: BucketSource, location: str) -> CachdError | None:
    """Why the credentials cannot be used for the location; None if they can."""
    from cachd.sources.s3_trial import try_credentials

    try_credentials(source, location, CancelToken())
    return None


def _signed(location: str, place: str | CachdError | None, tried: CachdError | None) -> Finding:
    subject = f"s3://{location}" if location else "s3://"
    if isinstance(place, CachdError):
        return of_error(Code.s3_credentials, place, subject=subject)
    where = _SIGNED_BY.get(place, place) if place else "nowhere"
    if tried is None and not place:
        what = f"requests for {subject} are not signed, and answered"
        return ok(Code.s3_credentials, what, subject=subject)
    if tried is None:
        return ok(Code.s3_credentials, f"credentials from {where}, accepted for {subject}", subject=subject)
    if not location and tried.code == "source_forbidden" and place:
        what = f"credentials from {where}, accepted; they may not list buckets"
        return ok(Code.s3_credentials, what, subject=subject)
    is_unsure = isinstance(tried, Unavailable) or not (location or place)
    found = of_error(
        Code.s3_credentials, tried, subject=subject, state=State.warning if is_unsure else State.wrong
    )
    return Finding(
        found.code,
        found.state,
        f"credentials from {where}: {found.what}",
        found.hint or "see the finding about the endpoint",
        found.subject,
        found.error,
    )


def _distinct(loaded: Loaded, scheme: str, example: str) -> Iterator[tuple[Source, str]]:
    """Each source of a scheme once for each set of its settings, with a location that it is to be tried with.

    These are the sources of models and of entries; the one for all else has an empty location.
    """
    sources = build_sources(loaded.config)
    seen: set[int] = set()
    for ref, location in _examples(loaded, scheme, example):
        source = _source(sources, ref)
        if source is not None and (id(source) not in seen or location):
            seen.add(id(source))
            yield source, location


def _source(sources: Sources, ref: Ref) -> Source | None:
    """The source of a ref; None if it may not be pulled."""
    try:
        return sources.of(ref)
    except Forbidden:
        return None


def _examples(loaded: Loaded, scheme: str, example: str) -> Iterable[tuple[Ref, str]]:
    """Refs whose settings may differ, each with its location if it is one of the operator's own."""
    is_bucket = scheme == "s3"
    seen: set[tuple[str, ...]] = set()
    for ref in refs_of(loaded.config, scheme):
        place = tuple(ref.location.split("/")[:1])  # one model of each bucket or organisation will do
        if place not in seen:
            seen.add(place)
            yield ref, ref.location if is_bucket else ""
    for entry in loaded.config.sources:
        if entry.prefix.scheme == scheme and (entry.endpoint or entry.credentials or entry.prefix.steps):
            steps = "/".join(entry.prefix.steps)
            text = f"s3://{steps or 'cachd-doctor'}/" if is_bucket else _repository(steps)
            yield Ref.parse(text), f"{steps}/" if is_bucket and steps else ""
    yield Ref.parse(example), ""


def _repository(steps: str) -> str:
    """A ref of the Hub below an entry's prefix."""
    missing = ["cachd-doctor", "model"][steps.count("/") + 1 if steps else 0 :]
    return f"hf://{'/'.join([steps, *missing] if steps else missing)}"
