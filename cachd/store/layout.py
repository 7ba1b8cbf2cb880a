"""Knows every path below the cache's root.

models/<name> -> .trees/<id>      the plain view: a relative link, swapped by rename
models/<name>@<revision>          an address: a link to the same snapshot for as long as it exists
models/.trees/<id>/...            hard links to blobs, files 0444, directories 0555
models/.holds/<id>                empty, 0444; a pod that keeps it open holds the snapshot
hub/models--org--name/...         the Hub view: refs/, snapshots/<commit>/..., trees/<commit>.json
ready/<name>.json                 written last, removed first: the model is ready while it exists
status/<name>.json                the state of a model, for pods that have only the mount
.cachd/                           private, 0700
    format                        the version of this layout
    lock                          locked by the one daemon, and names it
    blobs/sha256/<hex>            verified, read-only; for all sources that have proven to have it
    blobs/origin/<hex>            verified, read-only; for one source, which states no sha256
    ingest/<algorithm>-<hex>/     data, about.json, received, journal
    manifests/<id>.json
    pending/<name>.json           a pull to resume after a restart
    pending/<name>.began          how many daemon processes in a row began it and died
    pins/<name>
    previous/<name>.json          the snapshots that the name led to before
    rollbacks/<name>.json         a rollback that has begun; a restart completes it
    quarantined/<name>.json       a snapshot that was ready until damage was found, and waits for its repair
    damaged/<algorithm>-<hex>     blobs with wrong bytes; a repair reuses their good parts
    scrub_log.json                when each blob was last verified
    proven                        which source has proven to have which blob
    leases/<id>.json              who has leased which name, and until when
    usage.json                    uses and priorities of names, download rates of sources
    staging/                      views being built, small blobs being written
    trash/                        trees and blobs being deleted
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cachd.model import Digest

PUBLIC = ("models", "models/.trees", "models/.holds", "hub", "ready", "status")
PRIVATE = (
    ".cachd",
    ".cachd/blobs",
    ".cachd/ingest",
    ".cachd/manifests",
    ".cachd/pending",
    ".cachd/pins",
    ".cachd/previous",
    ".cachd/rollbacks",
    ".cachd/quarantined",
    ".cachd/damaged",
    ".cachd/leases",
    ".cachd/staging",
    ".cachd/trash",
)


@dataclass(frozen=True, slots=True)
class Layout:
    root: Path

    @property
    def format(self) -> Path:
        return self.root / ".cachd/format"

    @property
    def lock(self) -> Path:
        return self.root / ".cachd/lock"

    @property
    def blobs(self) -> Path:
        return self.root / ".cachd/blobs"

    @property
    def ingests(self) -> Path:
        return self.root / ".cachd/ingest"

    @property
    def damaged_blobs(self) -> Path:
        return self.root / ".cachd/damaged"

    @property
    def manifests(self) -> Path:
        return self.root / ".cachd/manifests"

    @property
    def staging(self) -> Path:
        return self.root / ".cachd/staging"

    @property
    def trash(self) -> Path:
        return self.root / ".cachd/trash"

    @property
    def pending(self) -> Path:
        return self.root / ".cachd/pending"

    @property
    def previous(self) -> Path:
        return self.root / ".cachd/previous"

    @property
    def rollbacks(self) -> Path:
        return self.root / ".cachd/rollbacks"

    @property
    def quarantined(self) -> Path:
        return self.root / ".cachd/quarantined"

    @property
    def scrub_log(self) -> Path:
        return self.root / ".cachd/scrub_log.json"

    @property
    def proven(self) -> Path:
        return self.root / ".cachd/proven"

    @property
    def leases(self) -> Path:
        return self.root / ".cachd/leases"

    @property
    def usage_log(self) -> Path:
        return self.root / ".cachd/usage.json"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def hub(self) -> Path:
        return self.root / "hub"

    @property
    def ready(self) -> Path:
        return self.root / "ready"

    @property
    def status(self) -> Path:
        return self.root / "status"

    def blob(self, digest: Digest) -> Path:
        return Path(self.blob_at(digest))

    # Paths as text cost a tenth of Path objects. A model may have thousands of files.

    def blob_at(self, digest: Digest) -> str:
        return f"{self.root}/.cachd/blobs/{digest.algorithm}/{digest.hex}"

    def staged_blob_at(self, digest: Digest) -> str:
        return f"{self.root}/.cachd/staging/{digest.algorithm}-{digest.hex}"

    def ingest_at(self, digest: Digest) -> str:
        return f"{self.root}/.cachd/ingest/{digest.algorithm}-{digest.hex}"

    def damaged(self, digest: Digest) -> Path:
        return self.damaged_blobs / f"{digest.algorithm}-{digest.hex}"

    def ingest(self, digest: Digest) -> Path:
        return Path(self.ingest_at(digest))

    def manifest(self, manifest: str) -> Path:
        return self.root / f".cachd/manifests/{manifest}.json"

    def pending_file(self, name: str) -> Path:
        return self.pending / f"{name}.json"

    def began(self, name: str) -> Path:
        return self.pending / f"{name}.began"

    def pin(self, name: str) -> Path:
        return self.root / ".cachd/pins" / name

    def previous_file(self, name: str) -> Path:
        return self.previous / f"{name}.json"

    def rollback_file(self, name: str) -> Path:
        return self.rollbacks / f"{name}.json"

    def quarantine_file(self, name: str) -> Path:
        return self.quarantined / f"{name}.json"

    def lease(self, lease: str) -> Path:
        return self.leases / f"{lease}.json"

    def tree(self, manifest: str) -> Path:
        return self.root / f"models/.trees/{manifest}"

    @property
    def trees(self) -> Path:
        return self.root / "models/.trees"

    @property
    def holds(self) -> Path:
        return self.root / "models/.holds"

    def hold(self, manifest: str) -> Path:
        return self.root / f"models/.holds/{manifest}"

    def address(self, address: str) -> Path:
        return self.root / f"models/{address}"

    def model(self, name: str) -> Path:
        return self.root / f"models/{name}"

    def ready_file(self, name: str) -> Path:
        return self.root / f"ready/{name}.json"

    def status_file(self, name: str) -> Path:
        return self.status / f"{name}.json"
