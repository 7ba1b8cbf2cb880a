"""An origin of models that are made from a seed and take no disk, for simulations of many pulls."""

from __future__ import annotations

import hashlib
import mmap
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.ground.origin import Content, File, Origin, Patched

MIB = 1 << 20
MODELS = 40


@dataclass
class Model:
    """One of the origin's models: files as (path, content, sha256)."""

    name: str
    ref: str
    files: Sequence[tuple[str, Content, str]]
    mapped: list[mmap.mmap] = field(default_factory=list)
    leases: dict[str, float] = field(default_factory=dict)  # id -> until when it surely holds
    pinned: bool = False

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(content.size for _, content, _ in self.files)

    def is_protected(self) -> bool:
        """Whether cachd must not evict it: mapped, pinned or leased."""
        now = time.time()
        return bool(self.mapped) or self.pinned or any(until > now for until in self.leases.values())


@dataclass(frozen=True, slots=True)
class Slice:
    """`size` bytes of `held` from `first` on, never copied as a whole."""

    held: bytes
    first: int
    size: int

    def read(self, start: int, stop: int) -> bytes:
        """A copy of these bytes alone."""
        return self.held[self.first + start : self.first + min(stop, self.size)]


class Shelf(Origin):
    """An origin of models whose bytes are a common noise with a head of their own: made without a disk."""

    def __init__(self, chance: random.Random, most: int) -> None:
        super().__init__()
        self._chance = chance
        self._noise = b"".join(chance.randbytes(MIB) for _ in range(-(-most // MIB) + 1))

    def content(self, size: int) -> Content:
        """Bytes that no other content begins with."""
        common = Slice(self._noise, self._chance.randrange(MIB), size)
        return Patched(common, 0, self._chance.randbytes(64))

    def hold_model(self, name: str, files: dict[str, Content]) -> Model:
        """Serve these files, with their SHA256SUMS, as one model."""
        held = [(path, content, sha256_of(content)) for path, content in files.items()]
        for path, content, digest in held:
            self._files[f"/{name}/{path}"] = File(content, f'"{digest[:32]}"')
        sums = "".join(f"{digest}  {path}\n" for path, _, digest in held)
        self.add(f"/{name}/SHA256SUMS", sums.encode())
        return Model(name, f"{self.url}/{name}/", held)

    def stock(self, largest: int) -> list[Model]:
        """40 models of at most `largest` bytes. Every fourth shares its larger file with another."""
        made: list[Model] = []
        for number in range(MODELS):
            size = int(largest * 2 ** self._chance.uniform(-3, 0))
            files = {"config.json": self.content(4096 + number), "a.bin": self.content(size // 3)}
            if number % 4 == 3:
                files["b.bin"] = next(c for path, c, _ in made[-1].files if path == "b.bin")
            else:
                files["b.bin"] = self.content(size - size // 3)
            made.append(self.hold_model(f"m{number:02d}", files))
        self._chance.shuffle(made)
        return made


def sha256_of(content: Content) -> str:
    """The digest in hex, computed block by block."""
    digest = hashlib.sha256()
    for at in range(0, content.size, 8 * MIB):
        digest.update(content.read(at, min(at + 8 * MIB, content.size)))
    return digest.hexdigest()
