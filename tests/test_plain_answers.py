"""What the commands print says what is the case and what to do, and nothing that does not apply."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachd.errors import InUse, WaitTimeout
from cachd.pod.mount import Mount
from cachd.pod.wait import Patience
from cachd.terminal.events import event_row
from cachd.terminal.models import _facts_of_pull
from cachd.terminal.settings import show_sources
from cachd.terminal.space import show_evictions
from tests.conftest import Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin

NO_SPACE = {
    "code": "no_space",
    "detail": "said already",
    "held_by": ["a (5 bytes, pinned)", "b (6 bytes, leased)"],
    "need": 5_000_000,
    "bytes_done": 3,
}


def test_a_failure_is_shown_once_in_words_and_units() -> None:
    count = {"done": 4_200_000, "total": 5_000_000, "fetched": 0, "resumed": 0}
    pull = {"ref": "a", "state": "failed", "bytes": count, "ended_at": "now", "error": NO_SPACE}
    shown = _facts_of_pull({"final": False, "pull": {**pull, "retry_at": None}})
    assert shown["error held_by"] == "a (5 bytes, pinned); b (6 bytes, leased)"
    assert shown["error need"] == "5.0 MB"
    assert not {"error detail", "error bytes_done"} & shown.keys()


def test_a_plan_without_victims_has_no_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    protected = {"names": ["a"], "manifest": "m", "bytes": 5, "protected_by": "pinned as a"}
    show_evictions({"evictions": [], "protected": [protected], "enough": False})
    assert "FREES" not in capsys.readouterr().out
    show_evictions({"evictions": []})
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "nothing was evicted\n")


def test_the_sources_of_a_ref_show_no_prefix_that_does_not_cover_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    allow = {"column": "allow", "value": ["http://a/"], "prefix": None, "where": "file:1"}
    for ref, is_shown in (("https://b/x", False), ("http://a/x", True)):
        show_sources({"ref": ref, "verdict": "allowed", "error": None, "columns": [allow]})
        assert ("http://a/" in capsys.readouterr().out.split("allowed")[1]) == is_shown


def test_an_event_of_the_configuration_says_where_the_reason_is() -> None:
    event: dict[str, Any] = {"id": 1, "kind": "config_refused", "code": "bad_option"}
    assert event_row(event)[-1] == "bad_option; cachd doctor says why"


def test_a_refresh_of_a_pinned_model_names_the_revision_and_the_way_out(
    engine: Callable[..., Engine], origin: Origin
) -> None:
    on = engine()
    ref = origin.add("/model.bin", noise(100))
    revision = on.pull(ref, name="m").revision
    on.store.pins.add("m")
    with pytest.raises(InUse, match=f"pinned at revision {revision}") as refused:
        on.begin(spec_of(ref, name="m"), refresh=True)
    assert "cachd unpin m" in refused.value.hint


def test_a_pod_that_waits_hears_what_the_pull_waits_for_and_how_old_that_is(tmp_path: Path) -> None:
    (tmp_path / "status").mkdir()
    (tmp_path / "status/m.json").write_text(
        '{"name": "m", "state": "downloading", "updated_at": "1970-01-01T00:00:00+00:00",'
        ' "waits": {"reason": "origin", "until": null, "detail": "503"}}'
    )
    patience = Patience(
        Mount(tmp_path), "m", seconds=0.0, unknown_seconds=0.0, report=print, now=lambda: 50.0
    )
    with pytest.raises(WaitTimeout) as ended:
        patience.pause()
    assert "waits (origin: 503); nothing has changed for 50 s" in ended.value.detail
