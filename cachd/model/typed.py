"""Reads what people type as a ref: a ref, perhaps with a file or directory of the model.

Addresses of the Hub follow the grammar of huggingface_hub (`parse_hf_uri`). KIND is datasets, kernels or
models:

    [hf://][KIND/]ORG/MODEL[@REVISION][/PATH]
    [hf://]ORG/MODEL[@REVISION]:QUANTISATION          as in llama.cpp and Ollama
    [https://]HOST/[KIND/]ORG/MODEL[@REVISION]
    [https://]HOST/[KIND/]ORG/MODEL/tree/REVISION[/DIRECTORY]
    [https://]HOST/[KIND/]ORG/MODEL/(blob|blame|raw|resolve)/REVISION[/FILE][?download=true][#...]

REVISION ends at the first '/', except in refs/pr/N and refs/convert/NAME. In all others, '/' is written %2F.
Refs of ms:// have the same form, without KIND and pages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn, Self
from urllib.parse import unquote

from cachd.errors import Invalid
from cachd.model.elsewhere import WINDOWS_PATH, refuse_elsewhere
from cachd.model.hub import HUB_HOSTS, KINDS, SPECIAL_REVISION, HubGrammar, hub_location
from cachd.model.name import has_invisible, is_clean, shown
from cachd.model.ref import Ref, check_characters
from cachd.model.scheme import SCHEMES
from cachd.model.weights import is_tag

_FILE_PAGES = ("blob", "blame", "raw", "resolve")
_OTHER_KINDS = ("spaces", "buckets", "dataset", "space", "kernel", "bucket", "model")
_TAGGED = re.compile(r"((?:models/)?[\w.-]+/[\w.-]+(?:@[^:]+)?):([\w.-]+)((?:@[^:]+)?)/?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Typed:
    """What a user typed as a ref.

    `path`: the file or the directory (`dir/`) of the model that it names, as a literal path and not as a
    pattern. `weights`: the form of the weights that it names. Only refs of hubs name either.
    """

    ref: Ref
    path: str | None = None
    weights: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a user's text. Raises Invalid with a hint: the right form, or what works instead."""
        text = text.strip()
        if not WINDOWS_PATH.match(text):
            check_characters(text)
        refuse_elsewhere(text)
        scheme, separator, rest = text.partition("://")
        scheme = scheme.lower()
        if not separator:
            scheme, rest = "https" if _is_hub(text) else "hf", text
            if scheme == "hf":
                _refuse_host(text)
        if scheme in SCHEMES and isinstance(SCHEMES[scheme].grammar, HubGrammar):
            rest, weights = _untagged(rest)
            path = rest.removesuffix("/")
            return cls(*_of_uri(scheme, text, path.split("/"), is_directory=path != rest), weights)
        if scheme in ("https", "http") and _is_hub(rest):
            host, slash, rest = rest.partition("/")
            rest, weights = _untagged(rest)
            return cls(*_of_page(text, f"{host}{slash}{rest}"), weights)
        return cls(Ref.parse(f"{scheme}://{rest}"))


def _is_hub(address: str) -> bool:
    return address.partition("/")[0].lower() in HUB_HOSTS


def _untagged(rest: str) -> tuple[str, str | None]:
    """A ref without the tag of a quantisation, and the weights that the tag stands for."""
    tagged = _TAGGED.fullmatch(rest)
    if not tagged or not is_tag(tagged[2]):
        return rest, None
    return tagged[1] + tagged[3], f"gguf:{tagged[2]}"


def _of_uri(scheme: str, text: str, parts: list[str], *, is_directory: bool) -> tuple[Ref, str | None]:
    """The ref and the path of `parts`: [KIND/]ORG/MODEL[@REVISION][/PATH], split at '/'."""
    owner, model, *inside = _owner_first(text, parts, scheme)
    model, at, revision = model.partition("@")
    branch = None
    if at:
        branch, inside = _revision_first([unquote(revision), *inside])
    ref = Ref(scheme, *hub_location(text, f"{owner}/{model}", branch))
    return ref, _path(text, inside, is_directory=is_directory)


def _of_page(text: str, address: str) -> tuple[Ref, str | None]:
    """The ref and the path of `address`, the URL of a page on the Hub's site without its scheme."""
    address, _, fragment = address.partition("#")
    address, _, query = address.partition("?")
    if query not in ("", "download=true"):
        raise Invalid(
            f"{shown(text)} contains a query",
            code="url_query",
            hint="leave out what follows '?': it may be a secret, and refs are shown in listings and files",
        )
    if fragment.startswith("sha256="):
        _refuse(
            text, "contains a digest", "leave it out: cachd verifies files of the Hub by the Hub's digests"
        )
    parts = [unquote(part) for part in address.split("/")[1:] if part]
    owner, model, *rest = _owner_first(text, parts)
    if not rest:
        return _of_uri("hf", text, [*owner.split("/"), model], is_directory=False)
    page, *where = rest
    if model in ("tree", *_FILE_PAGES):
        _refuse_one_part(text)
    if page not in ("tree", *_FILE_PAGES):
        _refuse(
            text,
            "is a page of the Hub that shows no model",
            "copy the address of the model, or of one of its branches, directories or files",
        )
    revision, inside = _revision_first(where) if where else (None, [])
    ref = Ref("hf", *hub_location(text, f"{owner}/{model}", revision))
    return ref, _path(text, inside, is_directory=page == "tree")


def _owner_first(text: str, parts: list[str], scheme: str = "hf") -> list[str]:
    """`parts` without a leading `models/`: ORG or KIND/ORG, MODEL and the rest. Raises Invalid."""
    others: tuple[str, ...] = _OTHER_KINDS
    if parts[:1] == ["models"] and len(parts) > 1:
        parts, others = parts[1:], (*_OTHER_KINDS, *KINDS)
    if parts and parts[0] in others:
        _refuse(
            text,
            "is not a repository of a kind that cachd pulls",
            "write hf://org/model, hf://datasets/org/name or hf://kernels/org/name; copy other files to S3 or"
            " a shared volume and pull s3://bucket/prefix/ or file:///path",
        )
    if len(parts) > 2 and parts[0] in KINDS:
        return [f"{parts[0]}/{parts[1]}", *parts[2:]]
    if len(parts) < 2 or parts[0] in ("models", *KINDS):
        _refuse_one_part(text)
    if parts[0].lower() in HUB_HOSTS:
        _refuse(text, "has the Hub's host in place of the owner", "write hf://org/model")
    tagged = re.fullmatch(r"([\w.-]+/[\w.-]+):([\w.+-]+)", "/".join(parts[:2]), re.ASCII)
    if tagged:
        _refuse(
            text,
            "has a ':' after the name of the model",
            "did you mean {0}://{1}@{2}, or {0}://{1} with include '*{2}*'?".format(scheme, *tagged.groups()),
        )
    return parts


def _revision_first(parts: list[str]) -> tuple[str, list[str]]:
    """The revision at the start of `parts`, and the rest."""
    special = "/".join(parts[:3])
    if SPECIAL_REVISION.fullmatch(special):
        return special, parts[3:]
    return parts[0], parts[1:]


def _path(text: str, parts: list[str], *, is_directory: bool) -> str | None:
    """The path in the model that consists of `parts`; None if there are none. Raises Invalid."""
    if not parts:
        return None
    path = "/".join(parts)
    is_plain = path == path.strip() and not has_invisible(path)
    if not is_plain or not is_clean(parts) or any("/" in part for part in parts):
        _refuse(text, "does not name a file or directory of a model", "write it without '..', '//' or %2F")
    if set("*?#") & set(path):
        _refuse(text, "contains '*', '?' or '#'", "select files by a pattern with include, such as '*.gguf'")
    return f"{path}/" if is_directory else path


def _refuse_host(text: str) -> None:
    """Raises Invalid for `host.example/path`, which begins with a host and not with an owner."""
    first, slash, _ = text.partition("/")
    if slash and ("." in first or re.search(r":\d+$", first)):
        _refuse(text, "looks like the address of a web server", "write https:// before it")


def _refuse_one_part(text: str) -> NoReturn:
    _refuse(
        text,
        "does not name a Hub model",
        "write org/model; for example, gpt2 is now openai-community/gpt2",
    )


def _refuse(text: str, why: str, hint: str) -> NoReturn:
    raise Invalid(f"{shown(text)} {why}", code="bad_ref", hint=hint)
