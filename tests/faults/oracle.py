"""The reader: another process, in a mount namespace of its own, that believes ready files and checks them.

It loops over every root below a directory that it sees read-only, until it is told to end. Whenever a ready
file is there, all files of its manifest are opened, read and hashed; they are mapped, too, and hashed again
long after, whatever became of the model. Only a ready file that went or changed meanwhile excuses anything.
It holds some snapshots, as a pod does: all their files stay for as long as the hold file is at its place.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

KNOWN = "known.json"  # below the directory: what each manifest holds, path to sha256

SCRIPT = f"""
import hashlib, json, mmap, os, select, sys
from pathlib import Path

place = Path(os.environ["CACHE"])
known = json.loads((place / {KNOWN!r}).read_bytes())
looked = mapped = stayed = 0
violations, held, holding = [], [], []

def sha256(content):
    return hashlib.sha256(content).hexdigest()

def told(path):
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None

def wrong_with(tree, expected):
    for path, digest in expected.items():
        try:
            with open(tree / path, "rb") as file:
                if sha256(file.read()) != digest:
                    return f"{{path}} has other bytes"
                file.seek(0, 2)
                if file.tell() and len(held) < 30:
                    held.append((mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), digest))
        except FileNotFoundError:
            return f"{{path}} is missing"
    return None

def check_mapped(count):
    global mapped
    for view, digest in held[:count]:
        mapped += 1
        if sha256(view) != digest:
            violations.append(f"a mapped file changed: {{digest}}")
        view.close()
    del held[:count]

def is_held(fd, path):
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False

def hold(path, tree, manifest):
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    if is_held(fd, path):
        holding.append((fd, path, tree, manifest))
    else:
        os.close(fd)

def check_holding():
    global stayed
    for fd, path, tree, manifest in holding:
        wrong = wrong_with(tree, known[manifest])
        if is_held(fd, path):
            stayed += 1
            if wrong:
                violations.append(f"held, and {{wrong}}")
    while len(holding) > 4:
        os.close(holding.pop(0)[0])

passes = 0
while not passes or not select.select([sys.stdin], [], [], 0.1)[0]:
    for ready in place.glob("*/ready/[!.]*.json"):
        before = told(ready)
        if before is None:
            continue
        manifest = json.loads(before)["manifest"]
        tree = Path(os.path.realpath(ready.parent.parent / "models" / ready.stem))
        wrong = f"the link names {{tree.name}}"
        if tree.name == manifest:
            wrong = wrong_with(tree, known[manifest])
        if before == told(ready):
            looked += 1
            if wrong:
                violations.append(f"{{ready.parent.parent.name}}/{{ready.name}}: {{wrong}}")
            else:
                hold(ready.parent.parent / "models/.holds" / manifest, tree, manifest)
    check_holding()
    if len(held) == 30:
        check_mapped(15)
    passes += 1
    if passes == 1:
        print("looking", flush=True)
check_holding()
check_mapped(30)
print(json.dumps({{"looked": looked, "mapped": mapped, "held": stayed, "violations": violations[:20]}}))
"""


def verdict(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Let the reader end: how often it looked at a ready model, at a mapped file, and what it saw wrong."""
    output, errors = process.communicate("enough\n", timeout=60)
    if process.returncode:
        return {"looked": 0, "mapped": 0, "held": 0, "violations": [f"the reader died: {errors[-2000:]}"]}
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def write_known(place: Path, known: dict[str, dict[str, str]]) -> None:
    (place / KNOWN).write_text(json.dumps(known))
