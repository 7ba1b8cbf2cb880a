"""Checks the options: what is wrong with them, and what the daemon would refuse at its start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from cachd import findings
from cachd.api.tls import TlsFiles, expiry
from cachd.config import Config, Examined, Loaded
from cachd.daemon.listen import check_listen
from cachd.daemon.sources import build_sources
from cachd.doctor.codes import Code
from cachd.doctor.finding import Finding, State, ok
from cachd.errors import CachdError
from cachd.model import SCHEMES, Ref, count_text
from cachd.settings.given import unknown_variables
from cachd.sources.schemes import Sources

_HINT = "correct it: `cachd options` lists every option"


def check_options(examined: Examined) -> Iterator[Finding]:
    """A finding for each wrong option and each unknown variable; else one that all is right."""
    wrong = wrong_options(examined)
    for each in wrong:
        yield Finding(Code.configuration, State.wrong, str(each), _HINT, subject=each.key)
    if examined.more:
        yield Finding(
            Code.configuration, State.wrong, f"and {count_text(examined.more, 'more fault')}", _HINT
        )
    for sentence in unknown_variables(Config.model_fields):
        yield Finding(Code.configuration, State.warning, sentence, "unset it, or correct its name")
    if not (wrong or examined.more):
        config = examined.loaded.config
        where = f"in {config.config} and the environment" if config.config else "in the environment"
        models = count_text(len(config.models), "model")
        yield ok(Code.configuration, f"the options {where} are right: {models}")


def wrong_options(examined: Examined) -> list[findings.Finding]:
    """Everything wrong with options, sorted by place: also what only the start of the daemon would refuse."""
    loaded = examined.loaded
    found = list(examined.findings)
    for key, check in _AT_START.items():
        try:
            check(loaded.config)
        except CachdError as error:
            found.append(_finding(loaded, (key,), error))
    return sorted({*found, *_refused_models(loaded)})


def _refused_models(loaded: Loaded) -> Iterator[findings.Finding]:
    """A finding for each model that `sources`, `allow` or `refuse` do not let the daemon pull."""
    try:
        sources = build_sources(loaded.config)
    except CachdError:
        return
    for number, model in enumerate(loaded.config.models):
        try:
            check_may_pull(sources, model.spec.ref)
        except CachdError as error:
            yield _finding(loaded, ("models", number, "ref"), error)


def check_may_pull(sources: Sources, ref: Ref) -> None:
    """Check without a network whether a ref may be pulled. Raises Forbidden."""
    sources.table.check(ref.base)
    if SCHEMES[ref.scheme].grammar.is_address:
        sources.address_policy.check_url(urlsplit(ref.base))


def _check_certificate(config: Config) -> None:
    if config.tls_cert_file:
        key = config.tls_key_file or config.tls_cert_file
        expiry(TlsFiles(config.tls_cert_file, key, config.tls_client_ca_file))


def _build_sources(config: Config) -> None:
    build_sources(config)


# What the start checks beside the values of options, by the option that an error concerns.
_AT_START: dict[str, Callable[[Config], None]] = {
    "listen": check_listen,
    "tls_cert_file": _check_certificate,
    "proxy": _build_sources,
}


def _finding(loaded: Loaded, loc: tuple[str | int, ...], error: CachdError) -> findings.Finding:
    return findings.Finding(loaded.given.place(loc), findings.key_of(loc), str(error))
