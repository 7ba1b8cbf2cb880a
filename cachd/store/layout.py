"""Knows every path below the cache's root.

models/<name> -> .trees/<id>      the plain view: a relative link, swapped by rename
models/<name>@<revision>          an address: a link to the same snapshot for as long as it exists
models/.trees/<id>/...            hard links to blobs, files 0444, directories 0555
models/.holds/<id>                empty, 0444; a pod that keeps it open holds the snapshot
hub/models--org--name/...         the Hub view: refs/, snapshots/<commit>/..., trees/<commit>.json
hub/models--org--name/blobs/      empty, and .no_exist/<commit>/...: hub_places.py
hub/.locks/models--org--name/     empty; older clients make it if it is missing
ready/<name>.json                 written last, removed first: the model is ready while it exists
status/<name>.json                the state of a model, for pods that have only the mount
.cachd/                           private, 0700
    format                        the version of this layout
    lock                          locked by the one daemon, and names it
    last_good.json                the configuration that was last used, for a start with a wrong file
    blobs/sha256/<hex>            verified, read-only; for all sources that have proven to have it
    blobs/origin/<hex>            verified, read-only; for one source, which states no sha256
    ingest/<algorithm>-<hex>-<size>/     data, about.json, received, journal
    manifests/<id>.json
    pending/<name>.json           a pull to resume after a restart
    pending/<name>.began          how many daemon processes in a row began it and died
    pending/<name>.failed         a pull that failed or was cancelled, to show after a restart
    pins/<name>                   somebody pinned the name through the API
    config_pins/<name>            the configuration pins the name
    previous/<name>.json          the snapshots that the name led to before
    rollbacks/<name>.json         a rollback that has begun; a restart completes it
    quarantined/<name>.json       a snapshot that was ready until damage was found, and waits for its repair
    damaged/<algorithm>-<hex>     blobs with wrong bytes; a repair reuses their good parts
    copies/<id>/                  which files of a snapshot the views show as copies; links to their blobs
    scrub_log.json                when each blob was last verified
    proven                        which source has proven to have which blob
    leases/<id>.json              who has leased which name, and until when
    usage.json                    uses and priorities of names, download rates of sources
    streamed/<algorithm>-<hex>-<size>    readers got bytes of it before it was verified: ingest/offer.py
    staging/                      views being built, small blobs being written
    trash/                        trees and blobs being deleted
    nodes/                        on a shared volume: who may write now (nodes.py)
    nodes/<number>.work/          ingest/, staging/ and trash/ of the process with that fencing number
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cachd.model import Digest

PUBLIC = ("models", "models/.trees", "models/.holds", "hub", "hub/.locks", "ready", "status")
PRIVATE_DIRECTORY = ".cachd"
PRIVATE = (
    PRIVATE_DIRECTORY,
    ".cachd/blobs",
    ".cachd/ingest",
    ".cachd/manifests",
    ".cachd/pending",
    ".cachd/pins",
    ".cachd/config_pins",
    ".cachd/previous",
    ".cachd/rollbacks",
    ".cachd/quarantined",
    ".cachd/damaged",
    ".cachd/copies",
    ".cachd/leases",
    ".cachd/streamed",
    ".cachd/staging",
    ".cachd/trash",
    ".cachd/nodes",
)

# What the first versions called these entries of .cachd. opening.py renames them.
EARLIER_NAMES = (
    "wishes -> pending",
    "suspended -> quarantined",
    "uses.json -> usage.json",
    "verified.json -> scrub_log.json",
)


@dataclass(frozen=True, slots=True)
class _WorkLayout:
    """The paths at which only the process that writes to a root works. Files are renamed from there."""

    root: Path
    work: str = PRIVATE_DIRECTORY

    @property
    def is_shared(self) -> bool:
        """Whether other nodes may write to the root after this process."""
        return self.work != PRIVATE_DIRECTORY

    @property
    def ingests(self) -> Path:
        """The directory of partial downloads."""
        return self.root / self.work / "ingest"

    @property
    def staging(self) -> Path:
        """The directory of what is being built; emptied at each start."""
        return self.root / self.work / "staging"

    @property
    def trash(self) -> Path:
        """The directory of what is being deleted; emptied at each start."""
        return self.root / self.work / "trash"

    def ingest(self, digest: Digest, size: int) -> Path:
        """The directory of the partial download of a blob, which a source says to have this size.

        Another source may state another size for the same digest. One of the two lies, and may do no harm to
        what the other one sends.
        """
        return Path(self.ingest_at(digest, size))

    def ingests_of(self, digest: Digest) -> list[Path]:
        """The directories of all partial downloads of a blob."""
        return list(self.ingests.glob(f"{digest.algorithm}-{digest.hex}-*"))

    def ingest_at(self, digest: Digest, size: int) -> str:
        """`ingest` as text."""
        return f"{self.root}/{self.work}/ingest/{digest.algorithm}-{digest.hex}-{size}"

    def staged_blob_at(self, digest: Digest) -> str:
        """The path at which a small blob is written before it gets its name, as text."""
        return f"{self.root}/{self.work}/staging/{digest.algorithm}-{digest.hex}"


@dataclass(frozen=True, slots=True)
class Layout(_WorkLayout):
    """The paths of one root.

    `work`: the directory of ingest/, staging/ and trash/, relative to the root. A process that writes to a
    shared volume has one of its own.
    """

    @property
    def format(self) -> Path:
        """The version of this layout."""
        return self.root / ".cachd/format"

    @property
    def lock(self) -> Path:
        """The file that the daemon locks."""
        return self.root / ".cachd/lock"

    @property
    def last_good(self) -> Path:
        """The configuration that was last used."""
        return self.root / ".cachd/last_good.json"

    @property
    def blobs(self) -> Path:
        """The directory of all blobs, one directory for each digest algorithm below it."""
        return self.root / ".cachd/blobs"

    @property
    def damaged_blobs(self) -> Path:
        """The directory of blobs with wrong bytes."""
        return self.root / ".cachd/damaged"

    @property
    def manifests(self) -> Path:
        """The directory of recorded manifests."""
        return self.root / ".cachd/manifests"

    @property
    def nodes(self) -> Path:
        """The directory in which processes agree who may write to a shared volume."""
        return self.root / ".cachd/nodes"

    @property
    def pending(self) -> Path:
        """The directory of pulls to resume."""
        return self.root / ".cachd/pending"

    @property
    def previous(self) -> Path:
        """The directory of histories."""
        return self.root / ".cachd/previous"

    @property
    def rollbacks(self) -> Path:
        """The directory of rollbacks that have begun."""
        return self.root / ".cachd/rollbacks"

    @property
    def quarantined(self) -> Path:
        """The directory of quarantines."""
        return self.root / ".cachd/quarantined"

    @property
    def scrub_log(self) -> Path:
        """When each blob was last verified."""
        return self.root / ".cachd/scrub_log.json"

    @property
    def proven(self) -> Path:
        """Which source has proven to have which blob."""
        return self.root / ".cachd/proven"

    @property
    def leases(self) -> Path:
        """The directory of leases."""
        return self.root / ".cachd/leases"

    @property
    def usage_log(self) -> Path:
        """Uses and priorities of names, rates of sources."""
        return self.root / ".cachd/usage.json"

    @property
    def models(self) -> Path:
        """The plain view."""
        return self.root / "models"

    @property
    def hub(self) -> Path:
        """The Hub view."""
        return self.root / "hub"

    @property
    def ready(self) -> Path:
        """The directory of ready files."""
        return self.root / "ready"

    @property
    def status(self) -> Path:
        """The directory of status files."""
        return self.root / "status"

    def blob(self, digest: Digest) -> Path:
        """The file of a blob."""
        return Path(self.blob_at(digest))

    # Paths as text cost a tenth of Path objects. A model may have thousands of files.

    def blob_at(self, digest: Digest) -> str:
        """`blob` as text."""
        return f"{self.root}/.cachd/blobs/{digest.algorithm}/{digest.hex}"

    @property
    def all_streamed(self) -> Path:
        """The directory of what `streamed` remembers."""
        return self.root / ".cachd/streamed"

    def streamed(self, digest: Digest, size: int) -> Path:
        """Remembers which attempt at a blob readers got bytes of before it was verified."""
        return self.root / f".cachd/streamed/{digest.algorithm}-{digest.hex}-{size}"

    def damaged(self, digest: Digest) -> Path:
        """Where the damaged copy of a blob waits for its repair."""
        return self.damaged_blobs / f"{digest.algorithm}-{digest.hex}"

    @property
    def copies(self) -> Path:
        """The directory of what is known about the copies in the views."""
        return self.root / ".cachd/copies"

    def copies_of(self, manifest: str) -> Path:
        """The directory of what is known about the copies of one snapshot."""
        return self.root / f".cachd/copies/{manifest}"

    def commit(self, folder: str, commit: str) -> Path:
        """The directory of a commit in a folder of the Hub view."""
        return self.root / f"hub/{folder}/snapshots/{commit}"

    def manifest(self, manifest: str) -> Path:
        """The recorded manifest with this id."""
        return self.root / f".cachd/manifests/{manifest}.json"

    def pending_file(self, name: str) -> Path:
        """The record of a pull to resume under this name."""
        return self.pending / f"{name}.json"

    def failed(self, name: str) -> Path:
        """How the newest pull of a name ended, if it failed or was cancelled."""
        return self.pending / f"{name}.failed"

    def began(self, name: str) -> Path:
        """The count of daemon processes that died during the pull of this name."""
        return self.pending / f"{name}.began"

    def pin_at(self, name: str) -> str:
        """The path of the file that exists while the API's pin of the name does."""
        return f"{self.root}/.cachd/pins/{name}"

    @property
    def config_pins(self) -> Path:
        """The directory of the pins of the configuration."""
        return self.root / ".cachd/config_pins"

    def config_pin_at(self, name: str) -> str:
        """The path of the file that exists while the configuration pins the name."""
        return f"{self.root}/.cachd/config_pins/{name}"

    def previous_file(self, name: str) -> Path:
        """The history of a name."""
        return self.previous / f"{name}.json"

    def rollback_file(self, name: str) -> Path:
        """The record of a rollback of this name that has begun."""
        return self.rollbacks / f"{name}.json"

    def quarantine_file(self, name: str) -> Path:
        """Why a name is quarantined."""
        return self.quarantined / f"{name}.json"

    def lease(self, lease: str) -> Path:
        """The lease with this id."""
        return self.leases / f"{lease}.json"

    def tree(self, manifest: str) -> Path:
        """The plain tree of the manifest with this id."""
        return self.root / f"models/.trees/{manifest}"

    @property
    def trees(self) -> Path:
        """The directory of plain trees."""
        return self.root / "models/.trees"

    @property
    def holds(self) -> Path:
        """The directory of hold files."""
        return self.root / "models/.holds"

    def hold(self, manifest: str) -> Path:
        """The hold file of the manifest with this id."""
        return Path(self.hold_at(manifest))

    def hold_at(self, manifest: str) -> str:
        """`hold` as text."""
        return f"{self.root}/models/.holds/{manifest}"

    def address(self, address: str) -> Path:
        """The link of an address."""
        return self.root / f"models/{address}"

    def model(self, name: str) -> Path:
        """The link of a name."""
        return self.root / f"models/{name}"

    def ready_file(self, name: str) -> Path:
        """The file that exists while the name is ready."""
        return self.root / f"ready/{name}.json"

    def status_file(self, name: str) -> Path:
        """The state of a name, for pods."""
        return self.status / f"{name}.json"
