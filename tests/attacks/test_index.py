"""The index of attacks: each row says who attacks how, what holds, and the tests that prove it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from docs.render import ATTACKERS
from tests.faults.test_index import PROJECT, named_in

INDEX: dict[str, dict[str, Any]] = tomllib.loads((Path(__file__).parent / "index.toml").read_text())


@pytest.mark.parametrize("row", INDEX)
def test_each_attack_names_its_attacker_what_holds_and_tests_that_are_there(row: str) -> None:
    said = INDEX[row]
    assert said["attacker"] in ATTACKERS
    assert said["attack"]
    assert said["holds"]
    assert said["tests"]
    for named in said["tests"]:
        file, _, test = named.partition("::")
        assert test in named_in(PROJECT / file), named


def test_every_test_of_an_attack_is_in_the_index() -> None:
    """But for those of what must go on to work."""
    named = {test for row in INDEX.values() for test in row["tests"]}
    unnamed = {
        f"tests/attacks/{file.name}::{test}"
        for file in Path(__file__).parent.glob("test_*.py")
        if file.name not in ("test_index.py", "test_attacks.py")
        for test in named_in(file)
    } - named
    assert unnamed == {
        "tests/attacks/test_connections.py::test_a_client_that_reads_a_long_answer_slowly_gets_all_of_it",
        "tests/attacks/test_connections.py::test_a_few_requests_sent_ahead_are_answered_in_order",
        "tests/attacks/test_connections.py::test_garbage_is_answered_with_a_problem_document",
        "tests/attacks/test_leases.py::test_a_lease_to_read_keeps_nobody_waiting",
        "tests/attacks/test_leases.py::test_no_call_but_open_and_truncate_waits_for_a_lease",
        "tests/attacks/test_listeners.py::test_a_key_without_a_certificate_is_no_option",
        "tests/attacks/test_listeners.py::test_a_listener_that_is_not_understood_is_refused_by_its_name",
        "tests/attacks/test_listeners.py::test_a_pair_that_does_not_work_ends_the_start",
        "tests/attacks/test_listeners.py::test_a_rotated_certificate_is_shown_and_a_broken_one_leaves_the_last_in_force",
        "tests/attacks/test_listeners.py::test_a_socket_of_a_group_that_nobody_knows_is_refused",
        "tests/attacks/test_listeners.py::test_an_address_that_is_none_is_told_so",
        "tests/attacks/test_listeners.py::test_listeners_are_written_as_one_text_or_as_a_list",
        "tests/attacks/test_listeners.py::test_one_daemon_answers_at_several_places",
        "tests/attacks/test_listeners.py::test_when_one_place_cannot_be_had_none_stays",
        "tests/attacks/test_probes.py::test_a_client_follows_every_page_there_is_and_asks_a_busy_daemon_again",
        "tests/attacks/test_share.py::test_a_path_with_a_link_in_it_opens_nothing",
        "tests/attacks/test_share.py::test_an_absent_file_and_one_that_may_not_be_read_raise_what_open_raises",
        "tests/attacks/test_identity.py::test_a_mirror_stands_in_the_folder_of_the_repository_that_its_hub_id_names",
        "tests/attacks/test_identity.py::test_a_hub_id_is_a_repository_and_of_another_source_than_the_hub",
        "tests/attacks/test_sources.py::test_a_digest_that_is_refused_no_more_may_be_pulled_again",
        "tests/attacks/test_sources.py::test_a_pods_own_token_gets_keys_without_a_switch",
        "tests/attacks/test_sources.py::test_an_allowed_origin_may_lead_to_its_own_cdn_though_no_other_source_is_allowed",
        "tests/attacks/test_sources.py::test_headers_are_read_again_as_they_rotate",
        "tests/attacks/test_sources.py::test_the_container_credentials_that_a_platform_gives_a_pod_need_no_switch",
        "tests/attacks/test_text.py::test_what_is_printable_stays_and_nothing_else_does",
    }
