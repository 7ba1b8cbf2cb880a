"""What a pod is told while a model is not ready: not yet, or never; by the API and by the mount alone."""

from __future__ import annotations

import inspect
import json
import os
import re
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cachd import errors
from cachd.errors import CachdError
from cachd.report.outcomes import OUTCOMES
from tests.ground.codes import ENDS_NO_PULL, final_codes
from tests.ground.disks import remount
from tests.ground.models import noise
from tests.ground.needs import needs
from tests.ground.node import Node
from tests.ground.origin import Origin, RestlessETag, Status
from tests.ground.pod import run_in_pod
from tests.ground.program import CACHD, run
from tests.ground.site import MIB, PATIENCE_SECONDS, Ground, assert_problem, files_left, said, until
from tests.test_scrub import flip

PROJECT = Path(__file__).parent.parent
Nodes = Callable[..., Node]
Alone = Callable[..., Ground]


def told(node: Node, name: str) -> dict[str, Any]:
    """What the status file says; nothing when it is not there."""
    try:
        found: dict[str, Any] = json.loads((node.root / f"status/{name}.json").read_bytes())
    except FileNotFoundError:
        return {}
    return found


def once(node: Node, name: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What the status file says once that holds."""

    def found() -> dict[str, Any] | None:
        says = told(node, name)
        return says if says and holds(says) else None

    return until(found)


@contextmanager
def hanging(ground: Ground, repo: str, below: str = "") -> Iterator[None]:
    """A repository whose Hub does not answer."""
    ground.hub.add(repo, {"config.json": b"{}"})
    hold = ground.hub.hold(f"/api/models/{repo}{below}", after=0)
    try:
        yield
    finally:
        hold.release()


# --- the table ---

IN_THE_CLIENT = {errors.WaitTimeout, errors.Unreachable, errors.NotKnown}


def test_every_class_of_error_says_whether_waiting_is_in_vain() -> None:
    kinds = {k for _, k in inspect.getmembers(errors, inspect.isclass) if issubclass(k, CachdError)}
    assert set(OUTCOMES) == kinds - IN_THE_CLIENT


def test_the_codes_that_are_final_are_listed() -> None:
    table = (PROJECT / "docs/exit-codes.md").read_text().split("| Final | Codes |")[1].split("\n\n")[0]
    listed = {
        int(row[1]): set(re.findall(r"`(\w+)`", row[2])) for row in re.finditer(r"\| (\d+) \| (.*) \|", table)
    }
    found = final_codes()
    in_code = {code for codes in found.values() for code in codes}
    assert in_code >= ENDS_NO_PULL, "no module has such a code any more"
    told = {status: codes - ENDS_NO_PULL for status, codes in found.items()}
    assert listed == told, "run `make docs`, or add a code that ends no pull to ENDS_NO_PULL"


# --- asking never waits ---


def test_asking_never_waits_for_a_source(alone: Alone) -> None:
    ground = alone(pulls=1)
    ground.hub.add("org/ready", {"config.json": b"{}"})
    ground.node.pull("hf://org/ready")
    assert ground.node.ready("org--ready").status == 200
    with hanging(ground, "org/hung"), ThreadPoolExecutor(1) as other:

        def answered(ref: str, **asked: Any) -> int:
            """Far less than the sources' own patience."""
            return other.submit(ground.node.pull, ref, **asked).result(10).status

        assert answered("hf://org/hung") == 202
        until(lambda: ground.show("org--hung")["state"] in ("resolving", "waiting"))
        assert answered("hf://org/hung") == 202, "joined"
        assert answered("hf://org/ready", refresh=True) == 202, "refreshed, in the queue behind it"
        assert answered("hf://org/ready", refresh=True) == 202, "joined there"
        assert answered("hf://org/ready", name="again") == 202
        assert ground.node.ready("org--ready", wait=0).status == 200


# --- final or not ---


def test_a_failure_for_good_has_its_own_status(ground: Ground) -> None:
    files = {"config.json": b"{}", "model.safetensors": noise(1000)}
    ground.hub.add("org/known", files)
    ground.hub.add("org/gated", files, gated=True)
    index = json.dumps({"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}).encode()
    ground.hub.add("org/incomplete", {**files, "model.safetensors.index.json": index})
    refs = {
        f"{ground.origin.url}/nothing.bin": (404, "file_not_found"),
        "hf://org/known@absent": (404, "revision_not_found"),
        "hf://org/gated": (403, "gated"),
        "https://10.0.0.1/private.bin": (403, "private_address"),
        "hf://org/incomplete": (400, "incomplete_model"),
        f"{ground.add('wrong.bin', 1000)}#sha256={64 * '0'}": (502, "corrupt"),
    }
    for number, (ref, (status, code)) in enumerate(refs.items()):
        name = f"final-{number}"
        ground.node.pull(ref, name=name)
        answer = ground.node.ready(name)
        assert_problem(answer, status, code)
        assert (answer.document["final"], said(answer, "Retry-After")) == (True, "")
        assert answer.document["error"]["code"] == code
        assert ground.show(name)["final"] is True
        file = once(ground.node, name, lambda t: t["state"] == "failed")
        assert file["final"] is True
        assert (file["error"]["status"], file["error"]["code"]) == (status, code)
        assert file["error"]["detail"] == answer.document["error"]["detail"]
        assert file["error"]["error_class"] == answer.document["error_class"]


def test_a_source_that_changes_again_while_it_is_pulled_anew_has_failed_for_good(ground: Ground) -> None:
    ref = ground.add("restless.bin")
    ground.origin.fault("/restless.bin", RestlessETag())
    ground.node.pull(ref)
    answer = ground.node.ready("restless.bin")
    ground.origin.clear()
    assert_problem(answer, 502, "changed")
    assert answer.document["final"] is True


def test_a_model_that_can_never_fit_is_413_for_who_waits(alone: Alone) -> None:
    ground = alone(limit_bytes=MIB)
    ground.node.pull(ground.add("big.bin"))
    answer = ground.node.ready("big.bin")
    assert_problem(answer, 413, "too_big")
    assert answer.document["final"] is True


def test_a_failure_that_may_pass_is_503_with_retry_after(alone: Alone) -> None:
    ground = alone(limit_bytes="8MiB")
    ground.origin.fault("/away.bin", Status(500))
    ground.node.pull(ground.add("away.bin", MIB))
    away = ground.node.ready("away.bin")
    assert_problem(away, 503, "origin_failed")
    ground.node.pull(ground.add("here.bin"), pin=True)
    assert ground.node.ready("here.bin").status == 200
    ground.node.pull(ground.add("there.bin"))
    full = ground.node.ready("there.bin")
    assert_problem(full, 503, "no_space")
    for answer in (away, full):
        assert (answer.document["final"], answer.document["state"]) == (False, "failed")
        assert int(said(answer, "Retry-After")) >= 1
    for name, status in (("away.bin", 503), ("there.bin", 507)):
        file = once(ground.node, name, lambda t: t["state"] == "failed")
        assert (file["final"], file["error"]["status"]) == (False, status)


def test_what_nobody_asked_for_is_404_and_not_final(ground: Ground) -> None:
    for wait in (0, 60):
        answer = ground.node.ready("nobody", wait=wait)
        assert_problem(answer, 404, "no_such_model")
        assert answer.document["final"] is False


def test_a_model_that_is_ready_stays_so_when_its_successor_fails_for_good(ground: Ground) -> None:
    old = ground.have("holds.bin")
    ground.node.pull(f"{ground.origin.url}/nothing.bin", name="holds.bin", replace=True)
    ground.node.wait_for("pull ended", name="holds.bin", state="failed")
    assert ground.node.ready("holds.bin").document["ref"] == old
    assert ground.show("holds.bin")["final"] is False
    assert (told(ground.node, "holds.bin")["state"], told(ground.node, "holds.bin")["error"]) == (
        "ready",
        None,
    )


def test_a_long_wait_ends_when_the_failure_is_final(ground: Ground) -> None:
    with ThreadPoolExecutor(1) as other:
        with hanging(ground, "org/lost", "/revision/absent"):
            ground.node.pull("hf://org/lost@absent", name="lost")
            waiter = other.submit(ground.node.ready, "lost", wait=3600)
            until(lambda: ground.show("lost")["state"] != "queued")
        assert_problem(waiter.result(PATIENCE_SECONDS), 404, "revision_not_found")


def test_wait_ends_with_the_code_of_a_final_failure(ground: Ground) -> None:
    ground.node.pull(f"{ground.origin.url}/nothing.bin", name="vain")
    ended = ground.node.cli("wait", "vain")
    assert (ended.returncode, ended.stdout) == (3, "")
    assert "code: file_not_found" in ended.stderr


def test_wait_goes_on_while_a_failure_may_pass(alone: Alone) -> None:
    ground = alone()
    ref = ground.add("flaky.bin", MIB)
    ground.origin.fault("/flaky.bin", Status(500))
    ground.node.pull(ref)
    assert ground.node.ready("flaky.bin").document["code"] == "origin_failed"
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(ground.node.cli, "wait", "flaky.bin")
        asked = ground.node.metric("cachd_requests_total", op="show")
        until(lambda: ground.node.metric("cachd_requests_total", op="show") >= asked + 3)
        assert not waiting.done()
        ground.origin.clear()
        ground.node.pull(ref)
        ended = waiting.result(PATIENCE_SECONDS)
    assert (ended.returncode, ended.stderr) == (0, "")
    late = ground.node.cli("wait", "flaky.bin", "--timeout", "0")
    assert late.returncode == 0


def test_a_required_model_that_is_tried_again_is_not_final(origin: Origin, node: Nodes) -> None:
    ref = origin.add("/needed.bin", noise(1000))
    origin.fault("/needed.bin", Status(503))
    running = node(retries=0, models=[{"ref": ref, "name": "needed", "required": True}])
    running.wait_for("pull ended", name="needed", state="failed")
    answer = until(
        lambda: next((a for a in [running.ready("needed")] if a.document["state"] == "failed"), None)
    )
    assert (answer.status, answer.document["final"]) == (503, False)
    origin.clear()
    until(lambda: running.ready("needed").status == 200)


# --- status files ---


def test_a_status_file_is_there_when_the_pull_is_accepted_and_gone_when_the_model_is(ground: Ground) -> None:
    ref = ground.add("seen.bin")
    hold = ground.origin.hold("/seen.bin", after=3 * MIB)
    assert ground.node.pull(ref).status == 202
    first = told(ground.node, "seen.bin")
    assert (first["name"], first["ref"], first["final"], first["error"]) == ("seen.bin", ref, False, None)
    assert first["state"] in ("queued", "resolving", "downloading")
    moving = once(ground.node, "seen.bin", lambda t: t["bytes"]["done"] > 2 * MIB)
    assert (moving["state"], moving["bytes"]["total"]) == ("downloading", 6 * MIB)
    assert moving["revision"] == ground.show("seen.bin")["pull"]["revision"]
    hold.release()
    ready = ground.node.ready("seen.bin").document
    last = once(ground.node, "seen.bin", lambda t: t["state"] == "ready")
    assert (last["revision"], last["eta_seconds"], last["rate_bytes_per_second"]) == (
        ready["revision"],
        None,
        0,
    )
    assert (last["bytes"]["total"], last["bytes"]["done"]) == (6 * MIB, 6 * MIB)
    assert last["updated_at"] > first["updated_at"]
    assert ground.node.ask("DELETE", "/v1/models/seen.bin").status == 200
    assert told(ground.node, "seen.bin") == {}


def test_status_and_ready_files_say_which_files_and_weights_were_asked_for(ground: Ground) -> None:
    ground.hub.add("org/it", {"a.safetensors": noise(100), "b.bin": noise(100, 2), "c.txt": b"c"})
    asked: dict[str, Any] = {"include": ["*.safetensors", "*.bin"], "exclude": [], "weights": "safetensors"}
    ground.node.pull("hf://org/it", name="some", **asked)
    for name, more in (("all", {}), ("copy", {"hub_id": "org/copy"})):
        ground.node.pull(ground.add(f"{name}.bin", 100), name=name, **more)
    shown: dict[str, dict[str, Any]] = {}
    for name in ("some", "all", "copy"):
        ground.node.ready(name)
        status = once(ground.node, name, lambda t: t["state"] == "ready")
        ready = json.loads((ground.node.root / f"ready/{name}.json").read_bytes())
        shown[name] = {k: status.get(k) for k in (*asked, "hub_id")}
        assert shown[name] == {k: ready.get(k) for k in (*asked, "hub_id")}
    plain: dict[str, Any] = {"include": [], "exclude": [], "weights": None, "hub_id": None}
    assert shown == {"some": {**asked, "hub_id": None}, "all": plain, "copy": {**plain, "hub_id": "org/copy"}}
    failed = ground.node.pull("hf://org/it", name="none", weights="onnx")
    assert failed.status == 202
    assert once(ground.node, "none", lambda t: t["state"] == "failed")["weights"] == "onnx"


def test_a_status_file_can_be_read_by_every_pod_and_written_by_none(ground: Ground) -> None:
    ground.have("modes.bin")
    directory = ground.node.root / "status"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o755
    assert stat.S_IMODE((directory / "modes.bin.json").stat().st_mode) == 0o644


@needs("pods")
def test_a_pod_with_the_mount_alone_sees_that_waiting_is_in_vain(ground: Ground) -> None:
    ground.node.pull(f"{ground.origin.url}/nothing.bin", name="mounted")
    ground.node.ready("mounted")
    once(ground.node, "mounted", lambda t: t["state"] == "failed")
    script = "import os; print(open(os.environ['CACHE'] + '/status/mounted.json').read())"
    seen = json.loads(run_in_pod(ground.node.root, script).stdout)
    assert (seen["state"], seen["final"], seen["error"]["status"]) == ("failed", True, 404)


def test_an_evicted_model_is_told_as_such(alone: Alone) -> None:
    ground = alone(limit_bytes=8 * MIB)  # what is free on the disk changes, as others use it
    ref = ground.have("evicted.bin")
    available = ground.node.ask("GET", "/v1/capacity").document["available_bytes"]
    answer = ground.node.ask("POST", "/v1/evictions", {"bytes": available + MIB // 2})
    assert answer.status == 200, answer
    gone = once(ground.node, "evicted.bin", lambda t: t["state"] == "evicted")
    assert (gone["ref"], gone["final"], gone["error"]["code"]) == (ref, False, "evicted")
    ground.node.pull(ref)
    assert ground.node.ready("evicted.bin").status == 200
    once(ground.node, "evicted.bin", lambda t: t["state"] == "ready")


def test_a_damaged_model_is_told_as_such_until_it_is_repaired(alone: Alone) -> None:
    ground = alone(scrub_bytes_per_second=0)
    ground.have("hurt.bin")
    ground.origin.fault("/hurt.bin", Status(500))
    flip(next((ground.node.root / "models/.trees").glob("*/hurt.bin")), at=1000)
    ground.node.ask("POST", "/v1/models/hurt.bin/verify")
    ground.node.wait_for("pull ended", name="hurt.bin", state="failed")
    hurt = once(ground.node, "hurt.bin", lambda t: t["state"] == "damaged")
    assert hurt["final"] is False
    assert ground.node.ready("hurt.bin", wait=0).document["final"] is False
    ground.origin.clear()
    ground.origin.fault("/hurt.bin", Status(404))
    lost = once(ground.node, "hurt.bin", lambda t: t["final"])
    assert (lost["state"], lost["error"]["code"]) == ("damaged", "file_not_found")
    answer = until(
        lambda: next((a for a in [ground.node.ready("hurt.bin", wait=0)] if a.document["final"]), None)
    )
    assert (answer.status, answer.document["state"]) == (404, "damaged")
    ground.origin.clear()
    once(ground.node, "hurt.bin", lambda t: t["state"] == "ready")


def test_a_model_is_damaged_wherever_it_is_shown_until_its_repair_is_published(alone: Alone) -> None:
    ground = alone(scrub_bytes_per_second=0)
    ground.have("hurt.bin", 6 * MIB)
    hold = ground.origin.hold("/hurt.bin", after=0)
    flip(next((ground.node.root / "models/.trees").glob("*/hurt.bin")), at=1000)
    ground.node.ask("POST", "/v1/models/hurt.bin/verify")
    try:
        assert hold.reached.wait(PATIENCE_SECONDS)
        once(ground.node, "hurt.bin", lambda t: t["state"] == "damaged" and 0 < t["bytes"]["done"] < 6 * MIB)
        shown = ground.show("hurt.bin")
        assert (shown["state"], shown["pull"]["state"]) == ("damaged", "downloading")
        ready = ground.node.ready("hurt.bin", wait=0)
        assert (ready.document["code"], ready.document["state"]) == ("damaged", "damaged")
        assert "its repair is downloading" in ready.document["detail"]
        listed = ground.node.cli("ls").stdout
        assert "damaged, downloading" in listed
        assert shown["damage"]["reason"] in listed
        verified = ground.node.cli("verify", "hurt.bin")
        assert verified.returncode == 8, verified
        assert "cachd wait hurt.bin waits for the repair" in verified.stderr
        assert "hurt.bin is damaged" in ground.node.cli("doctor").stdout
    finally:
        hold.release()
    once(ground.node, "hurt.bin", lambda t: t["state"] == "ready")


def test_a_start_corrects_what_a_kill_left(alone: Alone) -> None:
    ground = alone()
    ground.have("ready.bin")
    directory = ground.node.root / "status"
    with ground.held("cut.bin"):
        ground.node.pull(f"{ground.origin.url}/nothing.bin", name="failed")
        ground.node.ready("failed")
        once(ground.node, "cut.bin", lambda t: t["state"] == "downloading")
        ground.node.kill()
        assert told(ground.node, "cut.bin")["state"] == "downloading"
        lie = {**told(ground.node, "cut.bin"), "name": "unknown.bin"}
        (directory / "unknown.bin.json").write_text(json.dumps(lie))
        (directory / "ready.bin.json").write_text("{torn")
        (directory / ".ready.bin.json.new").write_text("{cut off")
        hold = ground.hub.cdn.hold("/none", after=0)
        ground.node.start()
        hold.release()
        until(lambda: sorted(os.listdir(directory)) == ["cut.bin.json", "failed.json", "ready.bin.json"])
        until(lambda: '"ready"' in (directory / "ready.bin.json").read_text())
        assert told(ground.node, "ready.bin")["state"] == "ready"
        assert told(ground.node, "cut.bin")["state"] in ("queued", "resolving", "downloading")
    assert ground.node.ready("cut.bin").status == 200
    once(ground.node, "cut.bin", lambda t: t["state"] == "ready")


def test_a_pull_that_a_stop_interrupts_is_queued_for_the_next_start(alone: Alone) -> None:
    ground = alone()
    with ground.held("stopped.bin"):
        assert ground.node.stop() == 0
        left = told(ground.node, "stopped.bin")
        assert (left["state"], left["final"], left["error"]) == ("queued", False, None)
        assert left["bytes"]["total"] == 6 * MIB
        ground.node.start()
    assert ground.node.ready("stopped.bin").status == 200


def test_a_status_file_is_not_written_while_nothing_changes(alone: Alone) -> None:
    ground = alone()
    directory = ground.node.root / "status"
    for number in range(20):
        ground.node.pull(ground.add(f"idle-{number}.bin", 1000), name=f"idle-{number}")
    for number in range(20):
        ground.node.ready(f"idle-{number}")
        until(lambda number=number: told(ground.node, f"idle-{number}")["state"] == "ready")
    before = {path.name: path.stat().st_ino for path in directory.iterdir()}
    with ground.held("busy.bin"):
        seen: set[str] = set()
        until(lambda: seen.add(told(ground.node, "busy.bin")["updated_at"]) or len(seen) >= 3)
    assert ground.node.ready("busy.bin").status == 200
    assert {name: (directory / name).stat().st_ino for name in before} == before
    ground.node.stop()
    ground.node.start()
    once(ground.node, "busy.bin", lambda t: t["state"] == "ready")
    ground.have("after.bin")  # told after the files were corrected
    assert {name: (directory / name).stat().st_ino for name in before} == before


def test_no_reader_sees_half_a_status(ground: Ground) -> None:
    path, stop = ground.node.root / "status/whole.json", threading.Event()

    def read() -> int:
        count = 0
        while not stop.is_set():
            try:
                assert json.loads(path.read_bytes())["name"] == "whole"
                count += 1
            except FileNotFoundError:
                pass
        return count

    with ThreadPoolExecutor(1) as other:
        reading = other.submit(read)
        for number in range(30):
            ground.node.pull(ground.add(f"whole-{number}.bin", 1000), name="whole", replace=True)
        ground.node.ready("whole")
        stop.set()
        assert reading.result(PATIENCE_SECONDS) > 0


def test_what_cannot_be_told_keeps_no_pull_from_its_end(alone: Alone) -> None:
    ground = alone()
    directory = ground.node.root / "status"
    directory.rmdir()
    directory.write_text("no directory")
    ref = ground.add("untold.bin")
    assert ground.node.pull(ref).status == 202
    assert ground.node.ready("untold.bin").status == 200
    ground.node.wait_for("status not written", level="warning")
    assert ground.node.ask("GET", "/livez").status == 200
    directory.unlink()
    until(lambda: told(ground.node, "untold.bin").get("state") == "ready")
    assert ground.node.ask("DELETE", "/v1/models/untold.bin").status == 200
    assert files_left(ground.node.root) == []


@needs("mount")
def test_a_full_disk_for_status_breaks_no_pull(alone: Alone) -> None:
    ground = alone()
    directory = ground.node.root / "status"
    words = ["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=2,mode=0755", "tmpfs", str(directory)]
    subprocess.run(words, check=True)
    try:
        (directory / "filler").write_bytes(b"x")
        ground.have("full.bin")
        ground.node.wait_for("status not written", level="warning")
        (directory / "filler").unlink()
        remount(directory, "nr_inodes=100,size=1m")
        until(lambda: told(ground.node, "full.bin").get("state") == "ready")
    finally:
        subprocess.run(["umount", directory], check=True)


def test_a_direct_pull_tells_how_it_stands(origin: Origin, root: Path) -> None:
    command = [*CACHD, "pull", f"{origin.url}/nothing.bin", "--name", "direct"]
    env = {**os.environ, "CACHD_RESERVE_FREE": "0", "CACHD_ALLOW": "127.0.0.0/8", "CACHD_ROOT": str(root)}
    assert run([*command, "--direct"], env=env, timeout=PATIENCE_SECONDS).returncode == 3
    left = json.loads((root / "status/direct.json").read_bytes())
    assert (left["state"], left["final"], left["error"]["status"]) == ("failed", True, 404)
