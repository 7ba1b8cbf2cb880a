"""Checks the way to the sources: names, proxies, certificate authorities, endpoints and the clock."""

from __future__ import annotations

import ssl
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from cachd.api.tls import TlsFiles, expiry
from cachd.config import Config, Loaded
from cachd.daemon.sources import authorities_of, build_http, build_table, proxies_of
from cachd.doctor.at_once import NO_ANSWER, at_once
from cachd.doctor.codes import Code
from cachd.doctor.endpoints import Endpoint
from cachd.doctor.finding import Finding, State, of_error, ok
from cachd.errors import CachdError, Unavailable
from cachd.model import count_text
from cachd.policy.address_policy import Anywhere
from cachd.policy.proxy import Proxy
from cachd.settings.given import Giver
from cachd.sources.cancel import CancelToken
from cachd.sources.dial import dial
from cachd.sources.failures import said
from cachd.sources.names import Names
from cachd.sources.trust import Authorities

_SOON_SECONDS, _SOON_FOR_API_SECONDS = 30 * 86400.0, 14 * 86400.0
_SKEW_WARNING_SECONDS, _SKEW_WRONG_SECONDS = 60.0, 300.0


@dataclass(frozen=True, slots=True)
class Reached:
    """An endpoint that answered: with which status, after how long, and by how much its clock differs."""

    endpoint: Endpoint
    status: int
    seconds: float
    skew_seconds: float | None


def asked(config: Config, endpoints: Sequence[Endpoint], seconds: float) -> list[Reached | CachdError]:
    """Ask all endpoints at once. For each, in order: its answer, or why there is none within `seconds`."""
    patient = config.model_copy(
        update={
            "connect_seconds": min(config.connect_seconds, seconds),
            "stall_seconds": min(config.stall_seconds, seconds),
        }
    )
    return at_once([partial(_asked, patient, each) for each in endpoints], seconds)


def _asked(
    config: Config,
    endpoint: Endpoint,
    *,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], float] = time.time,
) -> Reached:
    own = authorities_of(config)
    # An endpoint of the options may be anywhere; where a ref leads is for `allow` and `sources` to say.
    policy = build_table(config).address_policy(config.allow) if endpoint.model_url else Anywhere()
    http = build_http(config)(policy, authorities=own.get(endpoint.scheme) or own[""])
    began = clock()
    with http.peek(endpoint.model_url or f"{endpoint.url.rstrip('/')}/", CancelToken()) as response:
        dated, skew = response.headers.get("Date"), None
        with suppress(ValueError, TypeError, IndexError, OverflowError):
            skew = now() - parsedate_to_datetime(dated or "").timestamp()
        return Reached(endpoint, response.status, clock() - began, skew)


def check_endpoints(
    endpoints: Sequence[Endpoint], found: Sequence[Reached | CachdError]
) -> Iterator[Finding]:
    """Whether each endpoint answers."""
    for endpoint, each in zip(endpoints, found, strict=True):
        if isinstance(each, CachdError):
            yield _unreached(endpoint, each)
        elif each.status >= 500:
            what = f"{endpoint.url} answers {each.status}"
            hint = "see the log of that server, or of the proxy in front of it"
            yield Finding(Code.endpoint, State.warning, what, hint, subject=endpoint.url)
        else:
            what = f"{endpoint.url} answers ({each.status}) after {each.seconds:.2f} s"
            yield ok(Code.endpoint, what, subject=endpoint.url)


def _unreached(endpoint: Endpoint, error: CachdError) -> Finding:
    state = State.wrong if endpoint.is_named else State.warning
    hint = error.hint or f"check that this node may connect to {endpoint.host}:{endpoint.port}, or set proxy"
    if not endpoint.is_named:
        hint += "; models from there cannot be pulled"
    if error.code == NO_ANSWER:
        error = Unavailable(f"{endpoint.url}: {error.detail}", code=error.code)
    return of_error(Code.endpoint, error, subject=endpoint.url, state=state, hint=hint)


def check_clock(
    found: Iterable[Reached | CachdError], *, now: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """By how much this node's clock differs from those of the endpoints: the median of them."""
    skews = [
        each.skew_seconds for each in found if isinstance(each, Reached) and each.skew_seconds is not None
    ]
    hint = "set the node's clock: chronyc tracking, timedatectl"
    if not skews:
        what = f"no endpoint states a date to compare this node's clock with, which says {said(now())}"
        yield Finding(Code.clock, State.warning, what, hint)
        return
    skew = statistics.median(skews)
    amount = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'}"
    what = f"this node's clock is {amount} the endpoints'"
    if abs(skew) > _SKEW_WRONG_SECONDS:
        yield Finding(Code.clock, State.wrong, what, hint, error="clock_skewed")
    elif abs(skew) > _SKEW_WARNING_SECONDS:
        yield Finding(Code.clock, State.warning, what, hint)
    else:
        yield ok(Code.clock, "this node's clock agrees with the endpoints', to the minute")


# --- names and proxies ---


def check_names(config: Config, endpoints: Sequence[Endpoint], seconds: float) -> Iterator[Finding]:
    """Whether the name of each endpoint that is reached without a proxy has an address."""
    proxies = proxies_of(config)
    direct = {each.host: each for each in endpoints if proxies.of(urlsplit(each.url)) is None}
    names = Names(seconds)
    found = at_once([partial(_addresses, names, each.host, each.port) for each in direct.values()], seconds)
    for (host, endpoint), each in zip(direct.items(), found, strict=True):
        if isinstance(each, CachdError):
            state = State.wrong if endpoint.is_named else State.warning
            hint = "check the name, /etc/resolv.conf and the name server; behind a proxy, set proxy"
            yield of_error(Code.dns, each, subject=host, state=state, hint=hint)
        else:
            yield ok(Code.dns, f"{host} has {count_text(each, 'address', 'addresses')}", subject=host)


def _addresses(names: Names, host: str, port: int) -> int:
    return len({address[4][0] for address in names.addresses(host, port, CancelToken())})


def check_proxies(config: Config, seconds: float) -> Iterator[Finding]:
    """Whether each proxy can be connected to, and whether a variable names one that is not used."""
    proxies = proxies_of(config)
    if proxies.unused:
        what = f"{proxies.unused} is set, but the option proxy is not: no proxy is used"
        yield Finding(Code.proxy, State.warning, what, "set proxy: env to use it, or unset the variable")
    for proxy in dict.fromkeys(filter(None, (proxies.https, proxies.http))):
        yield _proxy(proxy, seconds)
    if not (proxies.https or proxies.http or proxies.unused):
        yield ok(Code.proxy, "no proxy is set")


def _proxy(proxy: Proxy, seconds: float) -> Finding:
    shown = str(proxy)
    try:
        places = Names(seconds).addresses(proxy.host, proxy.port, CancelToken())
        dial(places, seconds, CancelToken()).close()
    except (CachdError, OSError) as error:
        why = error.detail if isinstance(error, CachdError) else error.strerror or str(error)
        what, hint = (
            f"the proxy {shown} cannot be reached: {why}",
            "check the option proxy, and the proxy itself",
        )
        return Finding(Code.proxy, State.wrong, what, hint, subject=shown, error="proxy_unreachable")
    return ok(Code.proxy, f"the proxy {shown} can be connected to", subject=shown)


# --- certificates ---


def check_authorities(loaded: Loaded, *, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Whether the authorities that sources are checked by can be used, and have not expired.

    A bundle that a variable of another tool names is usually the system's: some of it has always expired.
    """
    for scheme, authorities in authorities_of(loaded.config).items():
        subject = "s3_ca_file" if scheme else "ca_file"
        try:
            ends = sorted(_ends(authorities.context()))
        except CachdError as error:
            hint = f"give a PEM file of certificate authorities to {subject}"
            yield of_error(Code.ca_file, error, subject=subject, hint=hint)
            continue
        setting = loaded.given.settings.get(subject)
        is_own = setting is not None and setting.giver is not Giver.ecosystem
        yield _lifetime(authorities, subject, ends, now(), is_own=is_own)


def _ends(context: ssl.SSLContext) -> Iterator[float]:
    """When (Unix time) each authority of a context expires."""
    for each in context.get_ca_certs():
        yield ssl.cert_time_to_seconds(str(each["notAfter"]))


def _lifetime(
    authorities: Authorities, subject: str, ends: Sequence[float], now: float, *, is_own: bool
) -> Finding:
    if authorities.file is None:
        if ends or _has_directory_of_authorities():
            return ok(Code.ca_file, f"the system's certificate authorities are used: {len(ends)} loaded")
        hint = "install them (apt-get install ca-certificates), or set ca_file"
        return Finding(Code.ca_file, State.warning, "this system has no certificate authorities", hint)
    shown, hint = f"{authorities.file} ({subject})", f"replace the expired authorities in {authorities.file}"
    expired = sum(end <= now for end in ends)
    if ends and expired == len(ends):
        return Finding(Code.ca_file, State.wrong, f"{shown}: all of it has expired", hint, subject=subject)
    if expired and is_own:
        what = f"{shown}: {expired} of {len(ends)} authorities have expired"
        return Finding(Code.ca_file, State.warning, what, hint, subject=subject)
    if ends and is_own and ends[0] - now < _SOON_SECONDS:
        what = f"{shown}: an authority expires at {said(ends[0])}"
        return Finding(Code.ca_file, State.warning, what, hint, subject=subject)
    until = f", the first expires at {said(ends[0])}" if ends and is_own else ""
    return ok(Code.ca_file, f"{shown}: {len(ends)} authorities{until}", subject=subject)


def _has_directory_of_authorities() -> bool:
    """Whether OpenSSL has a directory of authorities, which it loads only as it needs them."""
    directory = ssl.get_default_verify_paths().capath
    return bool(directory and Path(directory).is_dir() and any(Path(directory).iterdir()))


def check_certificate(config: Config, *, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Whether the API's own certificate can be used, and for how long."""
    if config.tls_cert_file is None:
        return
    key = config.tls_key_file or config.tls_cert_file
    ends = expiry(TlsFiles(config.tls_cert_file, key, config.tls_client_ca_file))
    what = f"{config.tls_cert_file} expires at {said(ends)}"
    hint = "renew it, and write the new one over it: the daemon reloads it"
    if ends <= now():
        yield Finding(Code.certificate, State.wrong, f"{config.tls_cert_file} expired at {said(ends)}", hint)
    elif ends - now() < _SOON_FOR_API_SECONDS:
        yield Finding(Code.certificate, State.warning, what, hint)
    else:
        yield ok(Code.certificate, what)
