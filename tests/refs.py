"""What people type for a ref: what it means, or what the refusal says. docs/refs.md shows this table."""

from __future__ import annotations

from dataclasses import dataclass

from cachd.errors import Invalid
from cachd.model import Typed


@dataclass(frozen=True, slots=True)
class Means:
    """`typed` is the ref `ref`, and of it only `path`, in the form `weights`."""

    typed: str
    ref: str
    path: str | None = None
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """`typed` is refused with `code`, and the hint holds `hint`."""

    typed: str
    hint: str
    code: str = "unknown_scheme"


MEANS = [
    Means("org/model", "hf://org/model"),
    Means("org/model@v1.0", "hf://org/model@v1.0"),
    Means("org/model@0123abc", "hf://org/model@0123abc"),
    Means("org/model/file.gguf", "hf://org/model", "file.gguf"),
    Means("org/model@refs/pr/1", "hf://org/model@refs/pr/1"),
    Means("org/model@feature%2Fnew", "hf://org/model@feature%2Fnew"),
    Means("hf://models/org/model", "hf://org/model"),
    Means("hf://org/model/sub/file.gguf", "hf://org/model", "sub/file.gguf"),
    Means("hf://org/model@v1.0/sub/", "hf://org/model@v1.0", "sub/"),
    Means("hf://org/model:Q4_K_M", "hf://org/model", weights="gguf:Q4_K_M"),
    Means("hf.co/org/model:Q4_K_M", "hf://org/model", weights="gguf:Q4_K_M"),
    Means("org/model@v1.0:IQ2_XXS", "hf://org/model@v1.0", weights="gguf:IQ2_XXS"),
    Means("hf://datasets/org/data", "hf://datasets/org/data"),
    Means("hf://datasets/org/data@v1/a.parquet", "hf://datasets/org/data@v1", "a.parquet"),
    Means("hf://kernels/org/kernel", "hf://kernels/org/kernel"),
    Means("https://huggingface.co/datasets/org/data/tree/main", "hf://datasets/org/data@main"),
    Means("ms://org/model@v1.0", "ms://org/model@v1.0"),
    Means("ms://org/model:Q4_K_M", "ms://org/model", weights="gguf:Q4_K_M"),
    Means("huggingface.co/org/model", "hf://org/model"),
    Means("https://hf.co/org/model", "hf://org/model"),
    Means("https://huggingface.co/org/model/tree/v1.0", "hf://org/model@v1.0"),
    Means("https://huggingface.co/org/model/tree/main/sub", "hf://org/model@main", "sub/"),
    Means("https://huggingface.co/org/model/blob/main/file.gguf", "hf://org/model@main", "file.gguf"),
    Means(
        "https://huggingface.co/org/model/resolve/main/file.gguf?download=true",
        "hf://org/model@main",
        "file.gguf",
    ),
]
REFUSED = [
    Refused("gpt2", "write org/model", "bad_ref"),
    Refused("org/model:v1.0", "did you mean hf://org/model@v1.0", "bad_ref"),
    Refused("hf://spaces/org/space", "hf://datasets/org/name", "bad_ref"),
    Refused("/models/llama", "did you mean 'file:///models/llama'"),
    Refused("./llama", "file:///path"),
    Refused("C:\\models\\llama", "file:///path"),
    Refused("s3:/bucket/llama/", "did you mean 's3://bucket/llama/'"),
    Refused("s3a://bucket/llama/", "did you mean 's3://bucket/llama/'"),
    Refused("arn:aws:s3:::bucket/llama/", "s3://bucket/prefix/"),
    Refused("gs://bucket/llama/", "mount the bucket"),
    Refused("az://container/llama/", "mount the container"),
    Refused("oci://registry/llama:1", "from the Hub or S3"),
    Refused("ollama://llama3:8b", "the GGUF file from the Hub"),
    Refused("modelscope://org/model", "did you mean 'ms://org/model'"),
    Refused("git@github.com:org/model.git", "clone"),
    Refused("ftp://host/file.gguf", "by https"),
    Refused("pvc://claim/llama", "mount it on the node"),
    Refused("host.example/file.gguf", "write https:// before it", "bad_ref"),
]


def table() -> str:
    """The rows of docs/refs.md, each with what the code makes of it."""
    typed = [*(row.typed for row in MEANS), *(row.typed for row in REFUSED)]
    rows = [f"| `{each}` | {_meaning(each)} |" for each in typed]
    return "\n".join(["| Typed | Meaning |", "|---|---|", *rows])


def _meaning(text: str) -> str:
    try:
        typed = Typed.parse(text)
    except Invalid as refusal:
        return f"refused: {refusal.hint}"
    only = typed.path or typed.weights
    return f"`{typed.ref}`" + (f", only `{only}`" if only else "")
