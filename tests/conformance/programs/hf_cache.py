"""Lists the Hub view with huggingface_hub and its command. With a Hub, it also compares checksums."""

import os
import subprocess
import sys

import huggingface_hub

model = os.environ["MODEL"]
found = huggingface_hub.scan_cache_dir()
odd = [each for each in found.warnings if "CACHEDIR.TAG" not in str(each)]  # older versions do not know it
assert not odd, odd
(repo,) = (each for each in found.repos if each.repo_id == model)
(revision,) = repo.revisions
names = {file.file_name for file in revision.files}
assert "config.json" in names, names
assert revision.size_on_disk == sum(file.size_on_disk for file in revision.files) > 0
assert "main" in revision.refs


def run(*words):
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 0, f"{words[1:]}: {ended.stdout[-300:]} {ended.stderr[-300:]}"
    return ended.stdout


programs = os.path.dirname(sys.executable)
hf = os.path.join(programs, "hf")
if tuple(map(int, huggingface_hub.__version__.split(".")[:2])) >= (1, 0):
    assert model in run(hf, "cache", "ls")
    if os.environ["NETWORK"] == "online":
        run(hf, "cache", "verify", model)
elif os.path.exists(hf):
    assert model in run(hf, "cache", "scan")
else:
    assert model in run(os.path.join(programs, "huggingface-cli"), "scan-cache")
