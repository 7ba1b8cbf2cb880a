"""The thread that withdraws refused models: when it looks again, and at what."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing

import pytest

from cachd.config import Config
from cachd.daemon.sources import build_table
from cachd.errors import Forbidden
from cachd.sources.table import Table
from cachd.transfer.progress import State
from cachd.upkeep.refusals import Refusals
from tests.conftest import PATIENCE_SECONDS, Engine
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.site import until

CONTENT, OTHER = noise(64), noise(64, 2)


class Refusing:
    """The withdrawals of an engine, and the contents that the table refuses."""

    def __init__(self, on: Engine) -> None:
        self.on, self.refused = on, list[bytes]()
        self.refusals = Refusals(on.store, on.pulls, self._table)

    def _table(self) -> Table:
        refused = tuple(f"sha256:{hashlib.sha256(content).hexdigest()}" for content in self.refused)
        return build_table(Config(root=self.on.store.layout.root, refuse=refused))

    def pull(self, origin: Origin, name: str, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest()
        self.on.pull(f"{origin.add(f'/{name}', content)}#sha256={digest}", name=name)

    def ready(self) -> set[str]:
        return {snapshot.name for snapshot in self.on.store.names.all()}


@pytest.fixture
def refusing(engine: Callable[..., Engine]) -> Refusing:
    return Refusing(engine(scrub_bytes_per_second=0, retries=0))


def test_all_models_are_looked_at_when_the_refused_digests_change(refusing: Refusing, origin: Origin) -> None:
    refusing.pull(origin, "m", CONTENT)
    refusing.pull(origin, "other", OTHER)
    with closing(refusing.refusals) as refusals:
        refusals.start()
        assert refusing.ready() == {"m", "other"}, "nothing is refused"
        refusing.refused = [CONTENT]
        refusals.check_soon()
        until(lambda: refusing.ready() == {"other"})
        pull = until(lambda: refusing.on.pulls.get("m"))
        assert (type(pull.error), pull.progress.state) == (Forbidden, State.failed)
        with pytest.raises(Forbidden):
            pull.done.result(PATIENCE_SECONDS)
        refusing.refused = [CONTENT, OTHER]
        refusals.check_soon()
        until(lambda: refusing.ready() == set())


def test_the_next_check_is_due_soon_while_somebody_holds_what_is_refused(
    refusing: Refusing, origin: Origin
) -> None:
    refusing.pull(origin, "m", CONTENT)
    assert refusing.refusals._check() is None
    refusing.refused = [CONTENT]
    assert refusing.refusals._check() is None
    assert refusing.ready() == {"m"}, "only a change of the refused digests has all models looked at"
    blob = refusing.on.store.layout.model("m") / "m"
    with blob.open("rb"):
        refusing.refusals._must_check_all.set()
        again = refusing.refusals._check()
        assert refusing.ready() == set()
        assert again == (2.0 if refusing.on.store.reports_open_files else None)
        assert refusing.refusals._check() == again
    assert refusing.refusals._check() is None
    assert [path for path in refusing.on.store.layout.blobs.rglob("*") if path.is_file()] == []
    refusing.refused = []
    assert refusing.refusals._check() is None
