"""What a pod sees below models/: names, addresses, hold files; and whether they tell the truth."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path


def names(root: Path) -> set[str]:
    """The names of models, ready or not."""
    return {n for n in os.listdir(root / "models") if "@" not in n} - {".trees", ".holds"}


def addresses(root: Path) -> dict[str, str]:
    """Every address that never moves, and the snapshot it leads to."""
    links = [n for n in os.listdir(root / "models") if "@" in n]
    return {n: os.readlink(root / "models" / n).removeprefix(".trees/") for n in links}


def holds(root: Path) -> set[str]:
    """The snapshots that can be held."""
    return set(os.listdir(root / "models/.holds"))


def wrong(root: Path) -> list[str]:
    """What a pod that finds a ready file could not do: hold the snapshot, or read it by its address."""
    found = []
    for ready in sorted((root / "ready").glob("[!.]*.json")):
        told = json.loads(ready.read_bytes())
        hold, address = root / "models/.holds" / told["manifest"], root / told["immutable_path"]
        if not hold.exists() or stat.S_IMODE(hold.stat().st_mode) != 0o444 or hold.stat().st_nlink != 1:
            found.append(f"{ready.name}: its snapshot cannot be held")
        if not address.is_symlink() or str(address.readlink()) != f".trees/{told['manifest']}":
            found.append(f"{ready.name}: {address.name} does not lead to its snapshot")
    return found


def left_over(root: Path) -> list[str]:
    """Hold files and addresses of snapshots that are not here; snapshots that cannot be held."""
    recorded = {path.stem for path in (root / ".cachd/manifests").glob("*.json")}
    found = [f"models/.holds/{manifest} and no snapshot, or none" for manifest in holds(root) ^ recorded]
    dangling = {address for address, manifest in addresses(root).items() if manifest not in recorded}
    return found + [f"models/{address} leads nowhere" for address in sorted(dangling)]
