"""A campaign of pulls that end in every way there is, and then a search for secrets (D4, D8, D10).

Each place where a secret can be has a canary of its own. Afterwards no log, answer, metric, file, command's
output or traceback holds one, plain or in disguise: percent-encoded, in base64, as JSON or Python write it.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from cachd.config import load
from cachd.daemon.sources import build_sources
from cachd.errors import CachdError
from cachd.policy.address_policy import AddressPolicy
from cachd.policy.proxy import Proxies
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Http
from cachd.sources.secrets import Secret
from cachd.sources.trust import Authorities
from tests.conftest import PATIENCE_SECONDS, Engine, spec_of
from tests.ground.bucket import Bucket, Refused
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node, short_name
from tests.ground.origin import (
    Fault,
    Flip,
    Gzip,
    LoginPage,
    Origin,
    Redirect,
    Reset,
    RestlessETag,
    Short,
    Stall,
    Status,
    TooLong,
    WrongRange,
)
from tests.ground.proxy import Listener, named

MIB = 1 << 20
Nodes = Callable[..., Node]


@dataclass(frozen=True)
class Canaries:
    """A secret a place, none part of another; with characters that are written differently here and there."""

    hub_token: str = "hf_Canary1+Hub/Token=41'x"
    api_token: str = 'Canary2+Api/Token=42"x\\y'
    s3_secret: str = "Canary3+S3/Secret=43'abcdef"
    s3_session: str = "Canary4+S3/Session=44'abcdef"
    signature: str = "Canary5+Link/Signature=45&x"
    password: str = "Canary6-Url-Password-46"
    environment: str = "Canary7+Environ/ment=47'x"
    typed: str = "Canary8+Wrong/Token=48'x"
    proxy: str = "Canary9+Proxy/Password=49'x"

    def all(self) -> dict[str, str]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


SECRET = Canaries()


def disguises(secret: str) -> set[str]:
    """The secret in every form in which something may write it."""

    def written(text: str) -> set[str]:
        return {text, repr(text)[1:-1], json.dumps(text)[1:-1], html.escape(text)}

    plain = {twice for once in written(secret) for twice in written(once)}
    quoted = {quote(secret, safe=safe) for safe in ("", "/", "/=+'")} | {quote_plus(secret)}
    coded = {secret.encode().hex()}
    for ahead in range(3):  # what stands before it shifts its letters
        text = base64.b64encode(b"x" * ahead + secret.encode()).decode()
        coded.add(text[4 if ahead else 0 : -4])
    return plain | quoted | coded


def found(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Where a canary is, and which."""
    canaries = {name: disguises(secret) for name, secret in SECRET.all().items()}
    return [
        (where, name)
        for where, text in texts.items()
        for name, forms in canaries.items()
        if any(form in text for form in forms)
    ]


@pytest.mark.parametrize("name", SECRET.all())
def test_a_canary_is_found_in_every_disguise(name: str) -> None:
    secret = SECRET.all()[name]
    written = [
        secret,
        str({"key": secret}),
        json.dumps([json.dumps([secret])]),
        f"https://host/?x={quote(secret)}",
        f"x={quote_plus(secret)}",
        base64.b64encode(f"user:{secret}".encode()).decode(),
        base64.b64encode(f"users:{secret}!".encode()).decode(),
        base64.b64encode(secret.encode() + b"xyz").decode(),
    ]
    assert [text for text in written if not found({"there": text})] == []
    assert found({"there": "Canary of another kind"}) == []


WAYS: dict[str, Fault] = {
    "well": Fault(),
    "400": Status(400),
    "401": Status(401),
    "403": Status(403),
    "404": Status(404),
    "changed": RestlessETag(),
    "416": Status(416),
    "429": Status(429, {"Retry-After": "soon"}),
    "500": Status(500, {}, SECRET.signature.encode()),
    "loop": Redirect(f"/loop?sig={quote(SECRET.signature)}"),
    "password": Redirect(f"https://user:{SECRET.password}@127.0.0.1/x"),
    "nobody": Redirect(f"http://127.0.0.1:1/x?sig={quote(SECRET.signature)}"),
    "nowhere": Redirect(f"http://no-such-host.invalid/x?sig={quote(SECRET.signature)}"),
    "private": Redirect(f"http://169.254.169.254/x?sig={quote(SECRET.signature)}"),
    "file": Redirect(f"file:///etc/passwd?sig={quote(SECRET.signature)}"),
    "no url": Redirect(f"http://[::1?sig={quote(SECRET.signature)}"),
    "odd": Redirect(f"/a b?sig={quote(SECRET.signature)}"),
    "short": Short(at=10),
    "reset": Reset(at=10),
    "stall": Stall(at=10),
    "long": TooLong(extra=5),
    "gzip": Gzip(),
    "login": LoginPage(),
    "range": WrongRange(),
    "damaged": Flip(5),
}


def signed_ways(origin: Origin, links: Origin) -> dict[str, str]:
    """Refs by the way they end; every file is served behind a redirect whose query is a secret."""
    refs = {}
    for way, fault in WAYS.items():
        path = f"/{quote(way, safe='')}"
        content = noise(5 * MIB if way == "range" else 1000)
        link = links.add(path.replace("%", ""), content, etag="one") + f"?sig={quote(SECRET.signature)}"
        refs[way] = origin.add(path.replace("%", ""), content, etag="one")
        if way == "damaged":
            refs[way] += f"#sha256={'0' * 64}"
        origin.fault(path.replace("%", ""), Redirect(link))
        links.fault(path.replace("%", ""), fault)
    return refs


@pytest.fixture
def campaign(
    hub: Hub, origin: Origin, node: Nodes, tmp_path: Path
) -> Iterator[tuple[Node, dict[str, str], Callable[[], dict[str, str]]]]:
    """A daemon with a secret in every place, its refs by how they end, and what can be read of all that."""
    hub.token = SECRET.hub_token
    for name, content in (("api-token", SECRET.api_token), ("hub-token", SECRET.hub_token)):
        (tmp_path / name).write_text(content + "\n")
    env = {
        "AWS_ACCESS_KEY_ID": "AKIDSCRIPTED",
        "AWS_SECRET_ACCESS_KEY": SECRET.s3_secret,
        "AWS_SESSION_TOKEN": SECRET.s3_session,
        "AWS_DEFAULT_REGION": "us-east-1",
        "HF_TOKEN": SECRET.environment,
        "HF_DEBUG": "1",
        "HF_HUB_VERBOSITY": "debug",
        "PYTHONASYNCIODEBUG": "1",
    }
    with Origin() as links, Bucket() as bucket:
        refs = signed_ways(origin, links)
        for way, fault in {"well": None, "gone": Status(403), "damaged": Flip(5)}.items():
            path = "it.bin"
            hub.add(f"org/{way}", {path: noise(2 * MIB, len(refs))}, private=True)
            if fault:
                hub.cdn.fault(hub.cdn_path(f"org/{way}", path), fault)
            refs[f"hub {way}"] = f"hf://org/{way}"
        refs["hub absent"] = "hf://org/absent"
        for way, refusal in {"well": None, "forbidden": Refused(403, "AccessDenied")}.items():
            path = bucket.put(f"{way}/it", noise(1000, len(way)))
            if refusal:
                bucket.fault(path, refusal)
            refs[f"bucket {way}"] = f"s3://models/{way}/"
        options = {
            "token_file": str(tmp_path / "api-token"),
            "hf_token_file": str(tmp_path / "hub-token"),
            "hf_endpoint": hub.url,
            "s3_endpoint_url": bucket.url,
            "retries": 0,
            "stall_seconds": 0.5,
        }
        running = node(env=env, **options)

        def everything() -> dict[str, str]:
            files = [path for path in running.root.rglob("*") if path.is_file()]
            texts = {str(path): path.read_bytes().decode("latin-1") for path in files}
            names = {str(path): str(path) for path in running.root.rglob("*")}
            return {
                "the log": running.output,
                "the options": running.config.read_text(),
                **texts,
                **{f"the name {name}": name for name in names},
            }

        yield running, refs, everything
        sent = [seen.query + str(seen.headers) for seen in (*hub.requests, *links.requests, *bucket.requests)]
        for name in ("hub_token", "signature", "s3_session"):
            secret = SECRET.all()[name]
            assert any(form in text for text in sent for form in disguises(secret)), f"{name} was never used"
        assert not hub.leaked


def test_no_secret_is_to_be_found_after_pulls_that_end_in_every_way(
    campaign: tuple[Node, dict[str, str], Callable[[], dict[str, str]]],
) -> None:
    running, refs, everything = campaign
    bearer = {"Authorization": f"Bearer {SECRET.api_token}"}
    said, ended = [], {}
    for number, ref in enumerate(refs.values()):
        asked = {"ref": ref, "name": f"m{number}"}
        said.append(running.ask("POST", "/v1/models", asked, headers=bearer))
        assert said[-1].status == 202, said[-1]
    for number, way in enumerate(refs):
        answer = running.ready(f"m{number}")
        ended[way] = answer.document.get("code", "ready")
        said += [answer, running.ask("GET", f"/v1/models/m{number}")]
    assert len(set(ended.values())) >= 15, ended
    assert [way for way, code in ended.items() if code == "ready"] == ["well", "hub well", "bucket well"]
    for wrong in (f"Bearer {SECRET.typed}", f"Basic {base64.b64encode(SECRET.typed.encode()).decode()}"):
        said.append(running.ask("DELETE", "/v1/models/m0", headers={"Authorization": wrong}))
    for ref in (f"https://user:{SECRET.password}@host/x", f"https://host/x?sig={quote(SECRET.signature)}"):
        said.append(running.ask("POST", "/v1/models", {"ref": ref}, headers=bearer))
        said.append(running.ask("POST", "/v1/models", {"ref": "hf://a/b", "name": ref}, headers=bearer))
    said.append(running.ask("GET", f"/v1/models?token={quote(SECRET.typed)}"))
    paths = ["/v1/models", "/v1/capacity", "/v1/limits", "/readyz?set=required", "/metrics", "/openapi.json"]
    paths += ["/v1/events?follow=false"]
    said += [running.ask("GET", path) for path in paths]
    commands = [
        ("ls", "-o", "json"),
        ("show", "m1"),
        ("show", "m3", "-o", "json"),
        ("doctor",),
        ("pull", f"https://user:{SECRET.password}@host/x"),
        ("pull", refs["500"], "--name", "m99", "--wait"),
    ]
    printed = [running.cli(*words, CACHD_TOKEN=SECRET.api_token) for words in commands]
    printed.append(running.cli("rm", "m0", CACHD_TOKEN=f"{SECRET.typed}\r\nX: y"))
    assert running.stop() == 0
    texts = everything() | {f"answer {n}": repr(answer) for n, answer in enumerate(said)}
    texts |= {f"command {n}": done.stdout + done.stderr for n, done in enumerate(printed)}
    assert found(texts) == []


CONFIGURATIONS = {
    "a model with a password": {"models": [{"ref": f"https://user:{SECRET.password}@host/x"}]},
    "a model with a signature": {"models": [{"ref": f"https://host/x?sig={SECRET.signature}"}]},
    "an S3 endpoint": {"s3_endpoint_url": f"https://user:{SECRET.password}@host"},
    "a Hub": {"hf_endpoint": f"https://user:{SECRET.password}@host"},
    "a Hub with a query": {"hf_endpoint": f"https://host/?token={SECRET.hub_token}"},
    "a proxy": {"proxy": f"http://user:{SECRET.password}@host"},
    "a proxy of another kind": {"proxy": f"socks5://user:{SECRET.password}@host"},
    "half a proxy": {"proxy": f"user:{SECRET.password}@host/path"},
    "origins without a proxy": {"no_proxy": [f"https://user:{SECRET.password}@host"]},
    "a prefix": {"allow": [f"https://user:{SECRET.password}@host/"]},
    "half a prefix": {"allow": [f"user:{SECRET.password}@host"]},
    "a token in place of its file": {"hf_token": SECRET.hub_token},
    "a list of tokens": {"hf_token_file": [SECRET.hub_token]},
    "a prefix with a password of signs": {"allow": [f"https://user:{SECRET.password}/x@host/"]},
    "a token in place of a number": {"streams": SECRET.hub_token, "limit_bytes": SECRET.hub_token},
    "a token in place of a word": {"log_level": SECRET.hub_token, "evict": SECRET.hub_token},
    "an address": {"listen": f"user:{SECRET.password}@127.0.0.1:0"},
}


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_a_refused_configuration_repeats_no_secret(tmp_path: Path, options: Mapping[str, object]) -> None:
    (tmp_path / "it.yaml").write_text(json.dumps(options))
    with pytest.raises(CachdError) as refusal:
        build_sources(load(config=tmp_path / "it.yaml"))
    assert found({"said": f"{refusal.value} {refusal.value.as_document()}"}) == []


def test_a_configuration_that_is_no_yaml_is_told_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text(f"streams: 2\nhf_token: : {SECRET.password} [\n")
    with pytest.raises(CachdError) as refusal:
        load(config=tmp_path / "it.yaml")
    assert refusal.value.detail.startswith(f"{tmp_path}/it.yaml:2: ")
    assert found({"said": str(refusal.value)}) == []


@pytest.mark.parametrize("begun", ["*", "!", "!x!", "@", "'", "[", "{a: ", "&a *", "- "])
def test_yaml_that_a_password_breaks_repeats_nothing_of_it(tmp_path: Path, begun: str) -> None:
    (tmp_path / "it.yaml").write_text(f"streams: {begun}{SECRET.password}\n")
    with pytest.raises(CachdError) as refusal:
        load(config=tmp_path / "it.yaml")
    assert found({"said": f"{refusal.value} {refusal.value.as_document()}"}) == []


def echoing(answer: bytes) -> Callable[[bytes], bytes]:
    """A proxy's answer that repeats all it was told, wherever there is room for it."""

    def told(head: bytes) -> bytes:
        credentials = head.partition(b"Proxy-Authorization: Basic ")[2].partition(b"\r\n")[0]
        return answer.replace(b"ECHO", credentials + b" " + base64.b64decode(credentials))

    return told


ECHOES: dict[str, Callable[[bytes], bytes]] = {
    "407": echoing(b"HTTP/1.1 407 ECHO\r\nProxy-Authenticate: Basic realm=ECHO\r\n\r\nECHO"),
    "403": echoing(b"HTTP/1.1 403 ECHO\r\nX: ECHO\r\n\r\nECHO"),
    "503": echoing(b"HTTP/1.1 503 ECHO\r\nRetry-After: ECHO\r\n\r\nECHO"),
    "redirect": echoing(b"HTTP/1.1 302 ECHO\r\nLocation: http://host/?ECHO\r\n\r\nECHO"),
    "garbage": echoing(b"ECHO\r\n\r\n"),
    "odd header": echoing(b"HTTP/1.1 200 OK\r\n@ECHO\r\n\r\n"),
    "too much": echoing(b"HTTP/1.1 200 OK\r\n\r\nECHO"),
    "silence": lambda _: b"",
}


@pytest.mark.parametrize("place", ["file", "environment"])
def test_no_secret_of_a_proxy_is_to_be_found_whatever_the_proxy_answers(
    place: str, node: Nodes, origin: Origin, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text(f"user:{SECRET.proxy}\n")
    with Listener() as listener:
        named(origin, "well.test")
        hosts = [f"{way.replace(' ', '-')}.test" for way in ECHOES]
        refusals = dict(zip(map(str.encode, hosts), ECHOES.values(), strict=True))
        in_url = f"user:{quote(SECRET.proxy, safe='')}@"
        variables = {"HTTP_PROXY": listener.url.replace("//", f"//{in_url}")}
        options = {"proxy": listener.url, "proxy_credentials_file": str(tmp_path / "credentials")}
        running = node(
            env=variables if place == "environment" else {},
            allow=[f"{origin.url}/".replace("well.test", host) for host in (*hosts, "well.test")],
            retries=0,
            pulls=len(ECHOES),
            **(options if place == "file" else {"proxy": "env"}),
        )
        ref = origin.add("/it", noise(1000))
        said: list[object] = []
        listener.refusal = lambda head: refusals[head.split()[1].partition(b":")[0]](head)
        for host in hosts:  # all at once: each waits before it asks again
            running.pull(ref.replace("well.test", host), name=host)
        refused = [running.ready(host) for host in hosts]
        assert 200 not in [answer.status for answer in refused]
        listener.refusal = None
        running.pull(ref, name="well")
        well = running.ready("well")
        assert well.status == 200
        said += [*refused, well]
        for name in (*hosts, "well"):
            said += [running.ask("GET", f"/v1/models/{name}"), running.cli("show", name)]
        said += [running.cli("options"), running.cli("doctor"), running.ask("GET", "/metrics")]
        assert running.stop() == 0
        assert [told for told in listener.heads if not found({"told": told})] == [], "it was never used"
        assert not found({"passed": listener.passed.decode("latin-1")})
        assert not found({"the origin": repr(origin.requests)})
    files = [path for path in running.root.rglob("*") if path.is_file()]
    texts = {str(path): path.read_bytes().decode("latin-1") for path in files}
    assert found({**texts, "the log": running.output, "answers": repr(said)}) == []


@pytest.mark.parametrize("way", ECHOES)
def test_no_error_of_a_proxy_holds_a_secret_in_itself_or_in_its_causes(way: str, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(f"user:{SECRET.proxy}\n")
    with Listener() as listener:
        listener.refusal = ECHOES[way]
        http = Http(
            AddressPolicy([]),
            authorities=Authorities(),
            proxies=Proxies.configured(listener.url, [], {}),
            proxy_credentials=Secret(tmp_path / "credentials"),
        )
        with pytest.raises(CachdError) as refusal:
            http.head("https://origin.test/x", CancelToken())
    assert found({way: " ".join(told_by(refusal.value))}) == []


def told_by(error: BaseException) -> list[str]:
    """All that an error tells, with its causes, as a traceback does."""
    told = [str(getattr(error, "facts", "")), str(getattr(error, "hint", ""))]
    cause: BaseException | None = error
    while cause is not None:
        told.append(f"{cause!r} {cause} {cause.args}")
        cause = cause.__cause__ or cause.__context__
    return told


def test_no_error_holds_a_secret_in_itself_or_in_its_causes(
    origin: Origin, engine: Callable[..., Engine]
) -> None:
    """A traceback tells an error with its causes; libraries' own are among them."""
    running = engine(retries=0, stall_seconds=0.5, pulls=len(WAYS))
    with Origin() as links:
        refs = signed_ways(origin, links)
        del refs["well"]
        begun = {way: running.begin(spec_of(ref, name=f"it-{short_name(ref)}")) for way, ref in refs.items()}
        for way, pull in begun.items():  # all at once: each waits before it asks again
            with pytest.raises(CachdError) as refusal:
                pull.done.result(PATIENCE_SECONDS)
            assert found({way: " ".join(told_by(refusal.value))}) == []
