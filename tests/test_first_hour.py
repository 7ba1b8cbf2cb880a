"""An operator's first hour at a real terminal: what stands on its screens, and in the pictures."""

from __future__ import annotations

import html
import itertools
import re
import shlex
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer

from cachd.cli import app
from docs.first_hour import SIZE, Screen, play
from docs.pictures import SCREENS, drawn
from tests.ground.needs import LIST_FILES, needs, require
from tests.test_readme import PAGES, PROJECT

COLUMNS = SIZE[0]
PICTURES = sorted(SCREENS.glob("*.svg"))
DIGEST = "sha256:32c905a8980a57b86d91bf797ee551704f2d5fcf4a5b31227828c08548c45818"


@pytest.fixture(scope="module")
def screens() -> dict[str, Screen]:
    require("tmux")
    return {screen.name: screen for screen in play()}


@needs("tmux")
def test_the_screens_are_those_of_the_pictures(screens: dict[str, Screen]) -> None:
    assert sorted(screens) == [picture.stem for picture in PICTURES], "run: make pictures"
    for name, screen in screens.items():
        assert all(command in screen.text for command in screen.commands), name


@needs("tmux")
def test_a_wrong_configuration_is_refused_line_by_line(screens: dict[str, Screen]) -> None:
    first, *rest = screens["check-config"].text.split("$ cachd")[1:]
    assert re.search(r"^/etc/cachd/config\.yaml:1: limit_bytes_per_second: .*\n  \S", first, re.MULTILINE)
    assert ":2: stream: no such key; did you mean streams?" in first
    assert "/etc/cachd/config.yaml: ok" in rest[0]


@needs("tmux")
def test_the_daemon_says_where_it_listens_and_nothing_empty(screens: dict[str, Screen]) -> None:
    text = screens["serve"].text
    assert re.search(r"listening +host=127\.0\.0\.1 port=8470 root=/var/lib/cachd version=", text)
    assert not re.search(r"=(?:None|\{\}|''|)(?: |$)", text, re.MULTILINE)


@needs("tmux")
def test_digests_can_be_copied_from_a_narrow_terminal(screens: dict[str, Screen]) -> None:
    for name in ("resolve", "show"):
        assert f"\n  {DIGEST}\n" in screens[name].text


@needs("tmux")
def test_ctrl_c_leaves_one_bar_and_says_how_to_go_on(screens: dict[str, Screen]) -> None:
    _, bar, *rest = screens["interrupt"].text.splitlines()
    assert re.fullmatch(r"qwen downloading [━╸╺]{20} 32\.5/59\.8 MB  30\.0 MB/s  0\.9s *", bar)
    assert rest == [
        "the pull goes on",
        "  watch it: cachd watch qwen",
        "  end it:   cachd cancel qwen",
        "$",
    ]


@needs("tmux")
def test_the_list_that_is_watched_stands_once_with_its_reason(screens: dict[str, Screen]) -> None:
    lines = screens["ls-w"].text.splitlines()
    assert re.fullmatch(r"NAME +STATE +SIZE +PROGRESS +REASON *", lines[1])
    assert re.fullmatch(r"qwen  downloading  59\.8 MB  54% +its source hardly sends *", lines[2])
    assert lines[3:] == ["$"]


@needs("tmux")
def test_a_bar_that_is_watched_ends_full_and_the_path_comes_last(screens: dict[str, Screen]) -> None:
    lines = screens["watch"].text.splitlines()
    assert re.fullmatch(r"qwen ready ━{20} 59\.8/59\.8 MB *", lines[1])
    assert lines[-4:] == [
        "qwen: 59.8 MB in 3 files, here already",
        "  3 of 3 files verified (git-sha1: 1, sha256: 2)",
        "/var/lib/cachd/models/qwen",
        "$",
    ]


@needs("tmux")
def test_a_failed_pull_has_a_reason_a_hint_and_a_code_and_the_list_keeps_it(
    screens: dict[str, Screen],
) -> None:
    text = screens["pull"].text
    assert re.search(r"^embeddings: 21\.0 MB in 2 files, in 0\.7s \(30\.0 MB/s\)$", text, re.MULTILINE)
    assert "error: hf://meta-llama/Llama-3.1-8B-Instruct is gated and no token is set\n  hint: accept" in text
    assert "\n  code: gated\n" in text
    assert re.search(r"^embeddings +ready .* a pin$", text, re.MULTILINE)
    assert re.search(r"^meta-llama--\S+ +failed .*\n  hf://meta-llama.* \(gated\)$", text, re.MULTILINE)


@needs("tmux")
def test_a_pinned_model_is_not_deleted(screens: dict[str, Screen]) -> None:
    text = screens["rm"].text
    assert "qwen: pinned\n" in text
    assert "error: qwen is pinned\n  hint: unpin it (cachd unpin qwen), or " in text


@needs("tmux")
def test_events_and_the_doctor_name_what_failed(screens: dict[str, Screen]) -> None:
    events = screens["events"].text
    assert re.search(r"^2026-01-02 03:04:05  pull_failed  meta-llama--\S+  anonymous$", events, re.MULTILINE)
    doctor = screens["doctor"].text
    assert re.search(r"^wrong    model +meta-llama--Llama-3.1-8B-Instruct has failed:$", doctor, re.MULTILINE)
    assert "\n1 wrong, " in doctor


@needs("tmux")
def test_only_a_word_that_is_too_long_reaches_the_edge_of_a_terminal(screens: dict[str, Screen]) -> None:
    """A line that goes on in the next one fills the terminal; what then breaks is a path or a digest."""
    for name, screen in screens.items():
        if name in ("serve", "doctor"):  # a log, at a wider one; and lines of any length, see below
            continue
        lines = screen.text.splitlines()
        for line, following in itertools.pairwise(lines):
            if len(line) == COLUMNS and following[:1] not in (" ", "$"):
                end, begin = line.rsplit(" ", 1)[-1], following.split(" ", 1)[0]
                assert "/" in end + begin, (name, line)
                assert len(end + begin) > COLUMNS / 2, (name, line)


@needs("tmux")
def test_what_the_doctor_finds_stands_in_a_column_of_its_own(screens: dict[str, Screen]) -> None:
    _, *lines, last, _ = screens["doctor"].text.splitlines()
    assert re.fullmatch(r"1 wrong, \d+ warnings?, \d+ ok", last)
    for line in lines:
        assert re.match(r"(?:(?:ok|warning|wrong) +\w+| ) +", line.ljust(COLUMNS))
        assert (line[31:33], line[33:34].isspace()) == ("  ", False), line


# --- the pictures ---


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.stem)
def test_a_picture_is_small_and_of_no_machine(picture: Path) -> None:
    text = picture.read_text()
    ElementTree.fromstring(text)
    assert picture.stat().st_size < 40_000
    assert "@font-face" not in text
    assert not re.search(r"/tmp/|/home/|/root/|https?://(?!www\.w3\.org|127\.0\.0\.1:8)", words_of(text))


@needs("git")
def test_every_picture_is_on_a_page() -> None:
    listed = subprocess.run(LIST_FILES, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    pictures = {
        line for line in listed.splitlines() if line.endswith((".svg", ".png")) and "static" not in line
    }
    shown = set()
    for page, text in {**PAGES, "bench": (PROJECT / "bench/README.md").read_text()}.items():
        at = PROJECT if page == "README.md" else PROJECT / ("bench" if page == "bench" else "docs")
        found = re.findall(r'!\[[^\]]+\]\((\S+)\)|(?:src|srcset)="([^"]+)"', text)
        shown |= {str((at / (one or other)).resolve().relative_to(PROJECT)) for one, other in found}
    assert pictures - shown == set()
    assert shown - pictures == set()


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.stem)
def test_the_commands_of_a_picture_exist(picture: Path) -> None:
    typed = re.findall(r"^\$ cachd (.+)$", words_of(picture.read_text()), re.MULTILINE)
    assert typed
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in typed:
        command, *words = shlex.split(line)
        options = {option for each in commands[command].params for option in each.opts}
        assert {word for word in words if word.startswith("-")} <= options, line


def test_a_drawing_is_the_same_every_time() -> None:
    screen = Screen("it", ("cachd ls",), "\x1b[32m$\x1b[39m cachd ls\nNAME  STATE")
    assert drawn(screen) == drawn(screen)
    assert words_of(drawn(screen)).splitlines()[-2:] == ["$ cachd ls", "NAME  STATE"]


def words_of(svg: str) -> str:
    """The lines of a terminal in a picture."""
    lines: dict[float, str] = {}
    for words in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        if words.get("class", "").endswith("-title"):
            continue
        at = float(words.get("y", "0"))
        lines[at] = lines.get(at, "") + (words.text or "")
    return "\n".join(html.unescape(lines[at]).replace("\xa0", " ").rstrip() for at in sorted(lines))
