"""about.json of an ingest: which blob it is for, and which source its bytes came from.

    {"origin": …, "size": …, "blob": "sha256:…", "validator": …, "base": "https://…" or null}

`base` is the source that all bytes came from; null when they came from several. `origin` and `validator` are
only for people who look at the directory.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

from cachd import files
from cachd.kernel import durable
from cachd.model import File


class About:
    """The about.json of one ingest. `is_of_one_source`: all bytes came from the file's own source.

    Methods raise OSError.
    """

    def __init__(self, directory: Path, file: File) -> None:
        self._path, self._file = directory / "about.json", file
        self.is_of_one_source = True
        self._writing = threading.Lock()

    def resume(self) -> bool:
        """Take over what an earlier run wrote. Returns False if it was no ingest of this blob and size."""
        file = self._file
        try:
            earlier = durable.read_document(self._path)
            is_same = bool(earlier["blob"] == str(file.blob) and earlier["size"] == file.size)
            self.is_of_one_source = not is_same or earlier.get("base") == file.base
        except (FileNotFoundError, files.TooLong, ValueError, TypeError, KeyError, RecursionError):
            return False
        if is_same and not self.is_of_one_source:
            self.note()
        return is_same

    def begin(self) -> None:
        """Replace what an earlier run wrote."""
        durable.remove(self._path)
        self.note()

    def note(self) -> None:
        """Write the file so that it survives a crash of the daemon."""
        durable.write_note(self._path, self._encoded())

    def write(self) -> None:
        """Write the file so that it survives a crash of the node."""
        with self._writing:
            durable.write_file(self._path, self._encoded(), mode=0o600)

    def comes_from(self, file: File) -> None:
        """Note, durably, that the next bytes come from the source of `file`. Call it before they are written.

        With bytes of two sources, the ingest proves for neither that it has the file.
        """
        if file.base == self._file.base:
            return
        with self._writing:  # so that other threads wait, too, until the file says so
            if self.is_of_one_source:
                self.is_of_one_source = False
                durable.write_file(self._path, self._encoded(), mode=0o600)

    def _encoded(self) -> bytes:
        file = self._file
        about = {
            "origin": file.origin,
            "size": file.size,
            "blob": str(file.blob),
            "validator": file.validator,
            "base": file.base if self.is_of_one_source else None,
        }
        return json.dumps(about, indent=1).encode()
