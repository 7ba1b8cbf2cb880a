"""Jobs on models: their states, at most one at a time for each model, and what is remembered."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from structlog.testing import capture_logs

from cachd.errors import Cancelled, Unavailable
from cachd.upkeep.jobs import Job, Jobs, JobState
from cachd.upkeep.verifications import Verification
from cachd.upkeep.warms import Warming

PATIENCE_SECONDS = 20.0


def raising(error: Exception) -> JobState:
    raise error


def test_a_job_ends_in_the_state_that_its_work_returns() -> None:
    job = Job("m", 5)
    assert (job.state, job.ended.is_set()) == (JobState.running, False)
    job.run(lambda: JobState.warm)
    assert (job.state, job.error, job.ended.is_set()) == (JobState.warm, None, True)
    assert job.as_document() == {"state": "warm", "bytes": {"total": 5, "done": 0}, "error": None}


def test_a_job_whose_work_raises_has_failed_or_was_cancelled() -> None:
    failed, cancelled, broken = Job("m", 5), Job("m", 5), Job("m", 5)
    failed.run(lambda: raising(Unavailable("later", code="busy")))
    assert (failed.state, failed.ended.is_set()) == (JobState.failed, True)
    assert failed.as_document()["error"] == Unavailable("later", code="busy").as_document()
    cancelled.run(lambda: raising(Cancelled("the daemon stops")))
    assert (cancelled.state, isinstance(cancelled.error, Cancelled)) == (JobState.cancelled, True)
    with capture_logs() as logs:
        broken.run(lambda: raising(ZeroDivisionError()))
    assert (broken.state, broken.ended.is_set()) == (JobState.failed, True)
    assert broken.error is not None
    assert broken.error.detail == "m: ZeroDivisionError"
    assert [(each["event"], each["name"]) for each in logs] == [(Job.unexpected, "m")]


def test_a_verification_counts_up_to_its_total_and_sorts_what_is_damaged() -> None:
    times = iter([1000.0, 1060.0])
    job = Verification("m", 10, now=lambda: next(times))
    shown = job.as_document()
    assert (shown["began_at"], shown["ended_at"]) == ("1970-01-01T00:16:40+00:00", None)
    for count in (4, 6, 3):
        job.took(count)
    job.found("b", "odd")
    job.found("a", "short")
    job.run(lambda: JobState.damaged)
    shown = job.as_document()
    assert (shown["state"], shown["bytes"]) == ("damaged", {"total": 10, "done": 10})
    assert shown["damaged"] == [{"path": "a", "wrong": "short"}, {"path": "b", "wrong": "odd"}]
    assert shown["ended_at"] == "1970-01-01T00:17:40+00:00"


def test_a_warming_counts_what_it_read_from_the_disk() -> None:
    job = Warming("m", 10)
    job.took(4, 4)
    job.took(6, 1)
    assert job.as_document()["bytes"] == {"total": 10, "done": 10, "loaded": 5}


def test_a_job_joins_the_one_that_runs_for_its_name_and_none_that_has_ended() -> None:
    gate, done = threading.Event(), []

    def do(job: Job) -> None:
        assert gate.wait(PATIENCE_SECONDS)
        done.append(job)
        job.end(JobState.warm)

    with closing(Jobs[Job](ThreadPoolExecutor(2))) as jobs:
        assert jobs.last("m") is None
        first = jobs.start(Job("m", 1), do)
        assert jobs.start(Job("m", 1), do) is first
        other = jobs.start(Job("other", 1), do)
        gate.set()
        assert first.ended.wait(PATIENCE_SECONDS)
        assert other.ended.wait(PATIENCE_SECONDS)
        assert (jobs.last("m"), jobs.last("other")) == (first, other)
        second = jobs.start(Job("m", 1), do)
        assert second is not first
        assert second.ended.wait(PATIENCE_SECONDS)
        assert jobs.last("m") is second
    assert len(done) == 3


def test_the_oldest_ended_jobs_above_a_thousand_are_forgotten() -> None:
    with closing(Jobs[Job](ThreadPoolExecutor(1))) as jobs:
        running = jobs.start(Job("running", 1), lambda _: None)
        for number in range(1000):
            jobs.start(Job(f"m{number}", 1), lambda _: None).end(JobState.warm)
        assert jobs.last("m0") is None, "the oldest that has ended"
        assert jobs.last("running") is running
        assert [jobs.last(f"m{number}") is not None for number in (1, 999)] == [True, True]


def test_a_close_drops_the_queued_jobs_and_waits_for_the_running_one() -> None:
    begun, gate, done = threading.Event(), threading.Event(), []

    def do(job: Job) -> None:
        begun.set()
        assert gate.wait(PATIENCE_SECONDS)
        done.append(job.name)

    jobs = Jobs[Job](ThreadPoolExecutor(1))
    jobs.start(Job("running", 1), do)
    jobs.start(Job("queued", 1), do)
    assert begun.wait(PATIENCE_SECONDS)
    closing_thread = threading.Thread(target=jobs.close)
    closing_thread.start()
    gate.set()
    closing_thread.join(PATIENCE_SECONDS)
    assert done in (["running"], ["running", "queued"])
