"""Reports whether an engine would load a model of this node without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cachd.errors import Unavailable
from cachd.kernel import durable
from cachd.model import Manifest, ModelSpec
from cachd.model.finding import Level
from cachd.preflight.contents import StoredContents
from cachd.preflight.examine import Preflight, examine
from cachd.report.define import report
from cachd.report.models import Models
from cachd.report.readiness import RETRY_SECONDS
from cachd.report.values import FindingReport, finding_report


@report
class PreflightReport:
    """What engines would find in a model, without a network.

    `level`: that of the worst finding. `loaders`: the engines and libraries that take its layout; whether
    they know its architecture depends on their version. `architectures` and `dtype`: as its configuration
    says. `tensors`, `weights_bytes` and `tensor_bytes`: how many tensors an engine loads, their bytes, and
    the bytes of each type; a GPU needs more memory than `weights_bytes`, which is null if it is not known.
    `base_model`: what an adapter needs.
    """

    name: str
    ref: str
    revision: str
    level: Level
    loaders: Sequence[str]
    architectures: Sequence[str]
    dtype: str | None
    tensors: int
    weights_bytes: int | None
    tensor_bytes: Mapping[str, int]
    base_model: str | None
    findings: Sequence[FindingReport]


def preflight_report(models: Models, name: str) -> PreflightReport:
    """Examine the files of a ready model. Blocks.

    Raises NotFound for an unknown name, Unavailable while the model is not ready, and DiskFailed.
    """
    snapshot = models.store.names.get(name)
    if snapshot is None:
        models.check_known(name)
        raise Unavailable(
            f"{name} is not ready ({models.state(name)}), so its files cannot be examined",
            code="not_ready",
            hint=f"cachd show {name} says why",
            retry_after=RETRY_SECONDS,
        )
    manifest = models.store.manifests.of(snapshot)
    with durable.disk_errors(models.store.layout.blobs):
        found = examine(StoredContents(manifest, models.store.content))
    return preflight_of(snapshot.spec, manifest, found)


def preflight_of(spec: ModelSpec, manifest: Manifest, found: Preflight) -> PreflightReport:
    """The report of what a preflight found in the files that a spec selects."""
    return PreflightReport(
        name=spec.name,
        ref=str(spec.ref),
        revision=manifest.revision,
        level=found.level,
        loaders=found.loaders,
        architectures=found.architectures,
        dtype=found.dtype,
        tensors=found.tensors,
        weights_bytes=found.weights_bytes,
        tensor_bytes=found.by_type,
        base_model=found.base_model,
        findings=[finding_report(each) for each in found.findings],
    )
