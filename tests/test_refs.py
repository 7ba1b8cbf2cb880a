"""What people type for a ref becomes the ref it means, or is refused with what works instead."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest
from huggingface_hub import parse_hf_uri
from huggingface_hub.errors import HfUriError
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cachd import cli, config
from cachd.errors import Invalid
from cachd.model import File, Manifest, ModelSpec, Ref, Typed
from tests.ground.chance import examples
from tests.ground.models import digests, noise
from tests.ground.site import MIB, Ground
from tests.ground.values import COMMIT, SHA256, code_of, hostile, plain_revisions, words
from tests.refs import MEANS, REFUSED, Means, Refused
from tests.test_ref import hostile_refs

# --- what is accepted ---

MORE_MEANS = [
    *(Means(typed, "hf://org/model") for typed in ("hf://org/model", "HF://org/model", "hf://org/model/")),
    Means(" org/model\n", "hf://org/model"),
    Means("\u00a0hf://org/model\u00a0", "hf://org/model"),
    Means("models/org/model", "hf://org/model"),
    Means("hf://org/model@main/", "hf://org/model@main"),
    Means(f"org/model@{COMMIT}/a/b.gguf", f"hf://org/model@{COMMIT}", "a/b.gguf"),
    # revisions with slashes
    Means("hf://org/model@refs%2Fpr%2F1", "hf://org/model@refs/pr/1"),
    Means("hf://org/model@refs%2fpr%2f1/a.gguf", "hf://org/model@refs/pr/1", "a.gguf"),
    Means("hf://org/model@refs/pr/1/a.gguf", "hf://org/model@refs/pr/1", "a.gguf"),
    Means("hf://org/model@refs/convert/gguf.v1/a", "hf://org/model@refs/convert/gguf.v1", "a"),
    Means("hf://org/model@feature/new", "hf://org/model@feature", "new"),
    Means("hf://org/model@feature%2Fnew/a/", "hf://org/model@feature%2Fnew", "a/"),
    # paths
    Means("hf://org/model/file@1.gguf", "hf://org/model", "file@1.gguf"),
    Means("hf://org/model@v1/file@1.gguf", "hf://org/model@v1", "file@1.gguf"),
    Means("hf://org/model/a b/c%20d.gguf", "hf://org/model", "a b/c%20d.gguf"),
    Means("hf://org/model/é[1].gguf", "hf://org/model", "é[1].gguf"),
    # pages of the Hub
    *(
        Means(f"{prefix}/org/model", "hf://org/model")
        for prefix in (
            *("hf.co", "HuggingFace.CO", "www.huggingface.co", "http://huggingface.co", "http://hf.co"),
            *("https://huggingface.co/models", "HTTPS://huggingface.co/", "https://www.huggingface.co"),
        )
    ),
    Means("https://huggingface.co/org/model/", "hf://org/model"),
    Means("https://huggingface.co/org/model#usage", "hf://org/model"),
    Means("https://huggingface.co/org/model?download=true#a?b", "hf://org/model"),
    Means("https://huggingface.co/org/model@v1", "hf://org/model@v1"),
    Means("https://huggingface.co/org/model/tree", "hf://org/model"),
    Means("https://huggingface.co/org/model/tree/main/", "hf://org/model@main"),
    Means("https://huggingface.co/org/model/tree/main/a/b/", "hf://org/model@main", "a/b/"),
    Means("https://huggingface.co/org/model/tree/refs/pr/2", "hf://org/model@refs/pr/2"),
    Means("https://huggingface.co/org/model/tree/refs%2Fpr%2F2/a", "hf://org/model@refs/pr/2", "a/"),
    Means("https://huggingface.co/org/model/tree/a%2Fb/c", "hf://org/model@a%2Fb", "c/"),
    Means("https://huggingface.co/org/model/blob/refs/pr/2/a.gguf#L1", "hf://org/model@refs/pr/2", "a.gguf"),
    Means("https://huggingface.co/org/model/blame/main/a.json", "hf://org/model@main", "a.json"),
    Means("https://huggingface.co/org/model/raw/main/a.json", "hf://org/model@main", "a.json"),
    Means("https://huggingface.co/org/model/resolve/main", "hf://org/model@main"),
    Means("huggingface.co/org/model/resolve/main/a%20%5B1%5D.gguf", "hf://org/model@main", "a [1].gguf"),
    # what is no address of the Hub stays what it is
    *(
        Means(typed, typed)
        for typed in (
            "https://huggingface.co.example/org/model",
            "https://cdn-lfs.hf.co/a/b",
            "https://bucket.s3.amazonaws.com/llama/model.gguf",
            f"https://host/model.gguf#sha256={SHA256}",
            "s3://bucket/llama",
            "s3://bucket/llama/",
            "file:///path/",
        )
    ),
]


THEIRS_DIFFER = [  # they match the start of `refs/pr/1x`, and take any port of the host for the Hub
    Means("hf://org/model@refs/pr/1x/a", "hf://org/model@refs", "pr/1x/a"),
    Means("https://huggingface.co:8443/org/model", "https://huggingface.co:8443/org/model"),
]


@pytest.mark.parametrize("row", [*MEANS, *MORE_MEANS, *THEIRS_DIFFER], ids=lambda row: ascii(row.typed))
def test_what_people_type_means_a_ref(row: Means) -> None:
    assert Typed.parse(row.typed) == Typed(Ref.parse(row.ref), row.path, row.weights)
    assert str(Typed.parse(row.typed).ref) == row.ref


@pytest.mark.parametrize("row", [*MEANS, *MORE_MEANS], ids=lambda row: ascii(row.typed))
def test_the_hub_s_own_library_reads_the_same_in_an_address_of_the_hub(row: Means) -> None:
    """Where it reads the address at all: it needs a scheme or a host, and does not strip blanks."""
    typed = Typed.parse(row.typed)
    try:
        theirs = parse_hf_uri(row.typed)
    except HfUriError:
        return
    kind = "" if theirs.type == "model" else f"{theirs.type}s/"
    assert (f"{kind}{theirs.id}", theirs.revision) == (typed.ref.location, typed.ref.revision)
    assert (theirs.path_in_repo or None) == (typed.path and typed.path.removesuffix("/"))


def test_a_branch_with_a_slash_is_read_from_files_as_they_were_written_before() -> None:
    """What is on disk names no path, so all that follows '@' is the revision."""
    before = {"ref": "hf://org/model@feature/new", "name": "m", "include": [], "exclude": []}
    spec = ModelSpec.from_document(before)
    assert spec.ref.revision == "feature/new"
    assert spec.as_document()["ref"] == "hf://org/model@feature%2Fnew"
    assert ModelSpec.from_document(spec.as_document()) == spec == ModelSpec.asked(str(spec.ref), "m")


# --- a file or directory inside ---

FILES = ("a.gguf", "sub/a.gguf", "sub/b.gguf", "sub1.gguf", "b[1].gguf", "b1.gguf")


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("org/model/a.gguf", ["a.gguf"]),
        ("org/model/sub/", ["sub/a.gguf", "sub/b.gguf"]),
        ("https://huggingface.co/org/model/tree/main/sub", ["sub/a.gguf", "sub/b.gguf"]),
        ("org/model/b[1].gguf", ["b[1].gguf"]),
    ],
)
def test_a_path_selects_exactly_what_it_names(typed: str, kept: list[str]) -> None:
    spec = ModelSpec.asked(typed, "m")
    whole = Manifest("hf://org/model", COMMIT, tuple(File(path, 1, "hf://org/model") for path in FILES))
    assert [file.path for file in whole.select(spec.include, spec.exclude).files] == kept


def test_a_file_in_the_ref_and_the_same_file_as_include_are_equal_specs() -> None:
    assert ModelSpec.asked("org/model/a.gguf", "m") == ModelSpec.asked("hf://org/model", "m", ["a.gguf"])


def test_a_path_goes_with_exclude_and_not_with_include() -> None:
    assert ModelSpec.asked("org/model/sub/", "m", exclude=["*.bin"]).exclude == ("*.bin",)
    assert code_of(lambda: ModelSpec.asked("org/model/a.gguf", "m", ["*.json"])) == "bad_ref"


def test_a_file_that_is_a_directory_or_none_is_refused_with_how_to_write_a_directory() -> None:
    spec = ModelSpec.asked("org/model/sub", "m")
    whole = Manifest("hf://org/model", COMMIT, tuple(File(path, 1, "hf://org/model") for path in FILES))
    with pytest.raises(Invalid) as refusal:
        whole.select(spec.include, spec.exclude)
    assert "'dir/' all below it" in refusal.value.hint


# --- what is refused ---

GCS, SHARED, MEANT = "mount the bucket", "mount it on the node", "did you mean"
MORE_REFUSED = [
    *(Refused(typed, "write org/model", "bad_ref") for typed in ("", " ", "hf://", "hf://gpt2", "llama3:8b")),
    *(
        Refused(f"https://huggingface.co{path}", "write org/model", "bad_ref")
        for path in ("", "/", "/gpt2", "/gpt2/tree/main", "/gpt2/resolve/main/config.json", "/models/gpt2")
    ),
    *(
        Refused(f"{prefix}{kind}/org/it", "hf://org/model", "bad_ref")
        for prefix in ("hf://", "https://huggingface.co/", "hf.co/", "", "hf://models/")
        for kind in ("spaces", "buckets", "dataset", "model")
    ),
    *(Refused(f"hf://models/{kind}/org/it", "hf://org/model", "bad_ref") for kind in ("datasets", "kernels")),
    *(Refused(f"hf://{kind}/it", "write org/model", "bad_ref") for kind in ("datasets", "kernels")),
    Refused("org/model:latest", "did you mean hf://org/model@latest", "bad_ref"),
    Refused("org/model:Q4_K_M/a.gguf", "did you mean hf://org/model@Q4_K_M", "bad_ref"),
    Refused("hf://models/models/x", "write org/model", "bad_ref"),
    Refused("hf://huggingface.co/org/model", "write hf://org/model", "bad_ref"),
    Refused("hf://o/m:v1", "did you mean hf://o/m@v1, or hf://o/m with include '*v1*'", "bad_ref"),
    Refused("hf.co/o/m:v1.0", "hf://o/m with include '*v1.0*'", "bad_ref"),
    Refused("https://huggingface.co/o/m:v1/tree/main", "did you mean hf://o/m@v1", "bad_ref"),
    *(
        Refused(f"https://huggingface.co/org/model/{page}", "copy the address", "bad_ref")
        for page in (
            "discussions/1",
            "commits/main",
            "settings",
            "edit/main/README.md",
            "a.gguf",
            "Tree/main",
        )
    ),
    # schemes and places of other tools
    Refused("gs:bucket/x", GCS),
    Refused("GS://bucket/x", GCS),
    Refused("gcs://bucket/x", GCS),
    *(Refused(f"{scheme}://c@account/x", "the container") for scheme in ("abfs", "abfss", "wasbs", "adl")),
    Refused("docker://registry/llama", "from the Hub or S3"),
    *(Refused(f"{scheme}://host/x", "clone") for scheme in ("git", "ssh", "git+https", "git+ssh")),
    *(Refused(f"{scheme}://host/x", SHARED) for scheme in ("nfs", "smb", "hdfs")),
    *(Refused(f"{scheme}://host/x", "by https") for scheme in ("sftp", "rsync")),
    *(Refused(path, "file:///path") for path in ("../x", "~/x", "~user/x", ".", "..", "C:/x", "\\\\host\\x")),
    *(Refused(path, MEANT) for path in ("/", "//host/x", "s3:bucket/x", "s3n://b/x", "hf:org/model")),
    Refused("https:/host/x", "did you mean 'https://host/x'"),
    Refused("file:/mnt/x", "did you mean 'file:///mnt/x'"),
    Refused("huggingface://org/model", "did you mean 'hf://org/model'"),
    Refused("hf-hub:org/model", "did you mean 'hf://org/model'"),
    Refused("localhost:8000/x", "write https://", "bad_ref"),
    Refused("gopher://host/x", "hf://org/model"),
    Refused("://x", "hf://org/model"),
    # paths
    *(
        Refused(f"hf://org/model/{path}", "without '..'", "bad_ref")
        for path in ("..", "../x", "a/../b", "./a", "a//b", "/a", "a//")
    ),
    *(
        Refused(f"https://huggingface.co/org/model/{page}/main/{path}", "without '..'", "bad_ref")
        for page in ("tree", "resolve")
        for path in (
            "../x",
            "%2e%2e/x",
            "a/%2E%2E",
            "a%2fb",
            "a%2F..%2Fb",
            "a%5cb",
            "a%00b",
            "a%0Ab",
            "%E2%80%AE",
            "%20",
            "a%20",
        )
    ),
    *(
        Refused(f"hf://org/model/{path}", "a pattern with include", "bad_ref")
        for path in ("*.gguf", "a?download=true", "a#b")
    ),
    Refused("https://huggingface.co/org/model/blob/main/a%3Fb", "a pattern with include", "bad_ref"),
    # revisions
    *(
        Refused(typed, "a branch, a tag", "bad_revision")
        for typed in (
            *(
                "org/model@",
                "org/model@..",
                "org/model@%2e%2e/x",
                "org/model@a%2F..%2Fb",
                "org/model@a%252Fb",
            ),
            *("org/model@/a", "org/model@main?x=1", "org/model@a%00", "hf://org/model@refs/convert/.."),
            *(
                f"https://huggingface.co/org/model/tree/{rev}"
                for rev in ("..", "%2e%2e/x", "a%252Fb", "-x", "@")
            ),
        )
    ),
    # secrets
    Refused("https://user:pw@huggingface.co/org/model", "leave them out", "url_secrets"),
    Refused("https://huggingface.co/org/model?token=x", "leave out what follows '?'", "url_query"),
    Refused("https://huggingface.co/org/model?download=true&x=1", "leave out what follows", "url_query"),
    Refused("https://huggingface.co/org/model?download=false", "leave out what follows", "url_query"),
    Refused(f"https://hf.co/o/m/resolve/main/a#sha256={SHA256}", "by the Hub's digests", "bad_ref"),
    # characters
    *(
        Refused(typed, "plain characters", "bad_ref")
        for typed in (
            *("org/mo\u202edel", "org/mo\0del", "org/model\u200b", "\ufefforg/model", "org/mo\ndel"),
            *("hf://org\\model", f"org/{'m' * 3000}", "/" + "x" * 3000, "gs://" + "x" * 3000, "\ud800"),
        )
    ),
    Refused("org/mo del", "letters, digits", "bad_ref"),
    Refused("org/model.git", "letters, digits", "bad_ref"),
    Refused(f"org/{'m' * 97}", "letters, digits", "bad_ref"),
]


@pytest.mark.parametrize("row", [*REFUSED, *MORE_REFUSED], ids=lambda row: ascii(row.typed)[:60])
def test_what_means_no_ref_is_refused_with_what_works_instead(row: Refused) -> None:
    with pytest.raises(Invalid) as refusal:
        Typed.parse(row.typed)
    assert (refusal.value.code, row.hint in refusal.value.hint) == (row.code, True), refusal.value
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize(
    "text",
    [
        *("user:hunter2@huggingface.co/org/model", "https:/user:hunter2@host/x", "//user:hunter2@host/x"),
        *("https:user:hunter2@host/x", "gs://user:hunter2@bucket/x", "ssh://user:hunter2@host/x"),
        *("https://user:hunter2@hf.co/org/model", "s3a://key:hunter2@bucket/x", "hunter2@host:org/x"),
        *("org/model?token=hunter2", "org/model@main?token=hunter2", "org/model#hunter2", "hf:x?hunter2"),
        *("hf://org/model/a?token=hunter2", "https://hf.co/org/model?token=hunter2", "/a?token=hunter2"),
        *("https://hf.co/org/model/tree/main?token=hunter2", "https://hf.co/gpt2?token=hunter2"),
        *("huggingface.co/org/model/tree/a b#hunter2", "hunter2:x-oauth-basic@github.com/org/x"),
    ],
)
def test_a_refusal_of_what_was_typed_repeats_no_secret(text: str) -> None:
    with pytest.raises(Invalid) as refusal:
        Typed.parse(text)
    assert "hunter2" not in json.dumps(refusal.value.as_document())


# --- properties ---


def text_of(typed: Typed) -> str:
    """What a user would type for it."""
    return f"{typed.ref}/{typed.path}" if typed.path else str(typed.ref)


typed_texts = st.one_of(
    st.builds(lambda prefix, rest: prefix + rest, st.sampled_from(["", "org/model/", "org/model@"]), hostile),
    st.builds(
        lambda page, rest: f"https://huggingface.co/org/model/{page}{rest}",
        st.sampled_from(["", "tree/", "tree/main/", "blob/main/", "resolve/refs%2Fpr%2F1/"]),
        hostile | hostile.map(lambda text: quote(text.encode(errors="replace"), safe="/")),
    ),
    hostile_refs,
)


@examples(150)
@given(typed_texts)
@example("https://huggingface.co/org/model/tree/main/a%252e/%2523")
def test_what_is_typed_is_refused_or_as_strict_as_a_ref_and_means_itself(text: str) -> None:
    try:
        typed = Typed.parse(text)
    except Invalid as refusal:
        json.dumps(refusal.as_document()).encode()
        return
    assert Ref.parse(str(typed.ref)) == typed.ref
    assert Typed.parse(text_of(typed)) == typed
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") or c == "\\" for c in text_of(typed))
    if typed.path:
        assert typed.ref.scheme == "hf"
        assert not {"", ".", ".."} & set(typed.path.removesuffix("/").split("/"))


names = st.from_regex(r"[abXY_\[%]([a-c .@+é%:\]]{0,6}[a@é%\]])?", fullmatch=True)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


@given(words, words, plain_revisions, paths, st.sampled_from(["tree", "blob", "raw", "resolve"]))
def test_an_address_made_of_its_parts_means_them_to_us_and_to_the_hub_s_own_library(
    owner: str, model: str, revision: str, path: str, page: str
) -> None:
    branch = quote(revision, safe="")
    uri = f"hf://{owner}/{model}@{branch}/{path}"
    address = f"https://huggingface.co/{owner}/{model}/{page}/{branch}/{quote(path)}"
    ref = Ref("hf", f"{owner}/{model}", revision)
    assert Typed.parse(uri) == Typed(ref, path)
    assert Typed.parse(address) == Typed(ref, f"{path}/" if page == "tree" else path)
    for theirs in (parse_hf_uri(uri), parse_hf_uri(address)):
        assert (theirs.id, theirs.revision, theirs.path_in_repo) == (ref.location, revision, path)


# --- the same wherever a ref is asked for ---


def test_an_address_of_the_hub_is_pulled_by_its_digests_and_shown_as_the_ref_it_means(ground: Ground) -> None:
    commit = ground.hub.add("org/typed", {"a.gguf": noise(1000), "b.gguf": noise(1000, 2), "x/c.json": b"{}"})
    address = "https://huggingface.co/org/typed/resolve/main/a.gguf?download=true"
    assert ground.node.pull(address, name="typed").status == 202
    ready = ground.node.ready("typed").document
    assert (ready["ref"], ready["include"], ready["revision"]) == ("hf://org/typed@main", ["a.gguf"], commit)
    assert ready["verified"] is True
    assert ready["verified_by"] == {"sha256": 1}
    assert sorted(digests(ground.node.root / "models/typed")) == ["a.gguf"]
    for same in ("org/typed@main/a.gguf", "hf.co/org/typed/blob/main/a.gguf", "hf://org/typed@main/a.gguf"):
        assert ground.node.pull(same, name="typed").status == 200, "it is ready already"


def test_evict_takes_a_ref_without_a_scheme_and_tells_it_from_bytes(ground: Ground) -> None:
    ground.hub.add("01-ai/evictable", {"a.gguf": noise(3 * MIB, 7), "b.gguf": noise(9 * MIB, 8)})
    files = {
        "01-ai/evictable": 12 * MIB,
        "01-ai/evictable/a.gguf": 3 * MIB,
        "https://huggingface.co/01-ai/evictable/blob/main/b.gguf": 9 * MIB,
        "40MB": 40_000_000,
    }
    for room, size in files.items():
        ended = ground.node.cli("evict", room, "--dry-run", "-o", "json")
        assert ended.returncode == 0, ended.stderr
        assert size <= json.loads(ended.stdout)["need_bytes"] < size + MIB, "with what directories take"
    for wrong in ("gpt2", "./40GB"):
        assert ground.node.cli("evict", wrong, "--dry-run").returncode == 2


def test_the_configuration_takes_what_is_typed() -> None:
    typed = config.Model(ref="https://hf.co/org/model/tree/v1/sub", name="m")
    assert typed.spec == ModelSpec(Ref("hf", "org/model", "v1"), "m", ("sub/",))


def test_a_direct_pull_takes_what_is_typed(ground: Ground, tmp_path: Path) -> None:
    ground.hub.add("org/direct", {"a.gguf": noise(1000), "b.gguf": noise(1000, 2)})
    root = tmp_path / "direct"
    root.mkdir(mode=0o755)
    ended = ground.node.cli(
        *(
            "pull",
            "org/direct/a.gguf",
            "--name",
            "d",
            "--direct",
            "--root",
            str(root),
            "--allow",
            "127.0.0.0/8",
        ),
        CACHD_HF_ENDPOINT=ground.hub.url,
        CACHD_RESERVE_FREE="0",
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(digests(root / "models/d")) == ["a.gguf"]


def test_what_is_refused_says_so_in_one_line_of_the_command_line(ground: Ground) -> None:
    ended = ground.node.cli("pull", "gs://bucket/llama")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "mount the bucket" in ended.stderr


def test_the_help_and_the_api_show_the_forms(ground: Ground) -> None:
    shown = CliRunner().invoke(cli.app, ["pull", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    schemas = ground.node.ask("GET", "/openapi.json").document["components"]["schemas"]
    described = schemas["Asked"]["properties"]["ref"]["description"]
    for form in (
        "huggingface.co",
        "org/model/file",
        "s3://bucket/prefix/",
        "https://host/dir/",
        "file:///path",
    ):
        assert form in shown
        assert form in described
    assert "hf://org/model[@rev]" in shown, "brackets without a backslash would be markup there"
