"""nanoclawctl's commands against a double of the router: results, exit codes, errors, JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanoclawd.errors import ConfigError, Failed, NotFound, Refused, Unavailable
from tests.unit.cli.conftest import COMMAND, Run, fake_program
from tests.unit.cli.double import AUDIT, SESSION, USAGE, RouterDouble


def test_version_is_printed(run: Run) -> None:
    done = run("version")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("nanoclawctl ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["agent"],
        ["agnet", "list"],
        ["agent", "lst"],
        ["agent", "add"],
        ["agent", "add", "x", "--no-such-option"],
        ["agent", "add", "x", "--idle-seconds", "many"],
        ["agent", "add", "x", "--mount", "nowhere"],
        ["agent", "list", "surplus"],
        ["completion", "tcsh"],
        ["agent", "remove", "berta"],
        ["chat", "berta"],
        ["send", "berta", ""],
        ["agent", "set", "berta"],
        ["agent", "set", "berta", "--mount", "/a:/mnt/a", "--no-mounts"],
        ["message", "list", "--state", "lost"],
        ["message", "list", "--limit", "0"],
        ["message", "show"],
        ["deadletter", "retry"],
        ["deadletter", "drop", "m1", "--all"],
        ["audit", "list", "--since", "yesterday"],
        ["audit", "list", "--since", "m"],
        ["audit", "list", "--kind", "decision"],
    ],
)
def test_wrong_usage_is_told_in_two_lines_with_exit_code_2(run: Run, arguments: list[str]) -> None:
    done = run(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["stauts"], "status"),
        (["agent", "ad"], "add"),
        (["agent", "add", "x", "--modle", "y"], "--model"),
        (["agent", "stop", "bertha"], "berta"),
        (["send", "bertha", "hello"], "berta"),
    ],
)
def test_errors_end_in_what_was_probably_meant(
    router: RouterDouble, run: Run, arguments: list[str], meant: str
) -> None:
    assert f"did you mean '{meant}'?" in run(*arguments).stderr


def test_daemon_away_is_exit_code_3(run: Run) -> None:
    done = run("status")

    assert (done.returncode, done.stdout) == (3, "")
    assert "hint: " in done.stderr


def test_unknown_agent_is_exit_code_4(router: RouterDouble, run: Run) -> None:
    assert run("agent", "show", "nobody").returncode == 4


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("berta.toml:7: no"), 1),
        (Failed("no"), 1),
        (Unavailable("no"), 3),
        (Refused("no", hint="do this"), 5),
    ],
)
def test_errors_of_the_router_keep_their_kind(
    router: RouterDouble, run: Run, error: Failed, code: int
) -> None:
    router.fail["StartAgent"] = error

    done = run("agent", "start", "berta", "--json")

    assert (done.returncode, done.stdout) == (code, "")
    assert json.loads(done.stderr) == {
        "error": {"code": error.code, "message": error.message, "hint": error.hint}
    }


def test_usage_errors_are_json_too(run: Run) -> None:
    done = run("agent", "lst", "--json")

    assert json.loads(done.stderr)["error"]["code"] == "usage"


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["reload"],
        ["agent", "list"],
        ["agent", "show", "berta"],
        ["agent", "add", "carla"],
        ["agent", "set", "berta", "--model", "m"],
        ["agent", "stop", "berta"],
        ["agent", "remove", "berta", "--yes"],
        ["session", "list"],
        ["message", "list"],
        ["message", "show", "m0123"],
        ["deadletter", "list"],
        ["deadletter", "retry", "--all"],
        ["deadletter", "drop", "m0123"],
        ["image", "build"],
        ["version"],
        ["send", "berta", "hello"],
        ["send", "berta", "hello", "--wait"],
    ],
)
def test_json_is_one_document_on_stdout(router: RouterDouble, run: Run, arguments: list[str]) -> None:
    done = run(*arguments, "--json")

    assert done.returncode == 0
    assert isinstance(json.loads(done.stdout), dict)


def test_status_shows_what_counts(router: RouterDouble, run: Run) -> None:
    shown = run("status").stdout

    for words in ("nanoclaw.service", "active (running)", "4.0M", "1 waiting", "s1", "anthropic"):
        assert words in shown
    assert "5 messages, 8 deliveries: see 'nanoclawctl deadletter list'" in shown


def test_status_says_why_a_session_does_not_get_on(router: RouterDouble, run: Run) -> None:
    router.status["sessions"] = [SESSION | {"state": "queued", "detail": "attempt 2 in 8 s: it broke"}]

    assert run("status").stdout.splitlines()[-1].endswith("attempt 2 in 8 s: it broke")


def test_status_says_first_that_all_agents_are_stopped(router: RouterDouble, run: Run) -> None:
    assert "STOPPED" not in run("status").stdout
    router.status["held"] = True

    shown = run("status").stdout.splitlines()

    assert shown[2].startswith("ALL AGENTS ARE STOPPED") and "nanoclawctl start --all" in shown[2]


def test_all_agents_are_stopped_and_started_only_when_it_is_said(router: RouterDouble, run: Run) -> None:
    for command, method in (("stop", "StopAll"), ("start", "StartAll")):
        assert run(command).returncode == 2
        assert router.calls == []
        assert run(command, "--all").returncode == 0
        assert router.calls.pop() == (method, {})


def test_status_cries_out_about_a_sandbox_that_is_not_active(router: RouterDouble, run: Run) -> None:
    router.status["sandbox"] = [{"name": "network", "active": False, "detail": "connected"}]

    assert "NOT ACTIVE: network: connected" in run("status").stdout


def test_add_hands_over_what_was_given_and_nothing_else(router: RouterDouble, run: Run, home: Path) -> None:
    (home / "be.md").write_text("Be kind.")

    done = run(
        *("agent", "add", "carla", "--model", "m", "--instructions", "be.md", "--idle-seconds", "0"),
        *("--mount", "src:/mnt/src", "--mount", "/srv:/mnt/srv:rw", "--cpu-quota", "150%"),
        *("--runtime", "runsc"),
    )

    assert done.returncode == 0
    (parameters,) = [parameters for name, parameters in router.calls if name == "AddAgent"]
    given = {name: value for name, value in parameters.items() if value is not None}
    assert given == {
        "name": "carla",
        "model": "m",
        "instructions": "Be kind.",
        "idleSeconds": 0,
        "cpuQuota": "150%",
        "runtime": "runsc",
        "mounts": [
            {"source": str(home / "src"), "target": "/mnt/src", "readOnly": True},
            {"source": "/srv", "target": "/mnt/srv", "readOnly": False},
        ],
    }


def test_set_can_take_all_mounts_away(router: RouterDouble, run: Run) -> None:
    run("agent", "set", "berta", "--no-mounts")

    (parameters,) = [parameters for name, parameters in router.calls if name == "SetAgent"]
    assert {name: value for name, value in parameters.items() if value is not None} == {
        "name": "berta",
        "mounts": [],
    }


@pytest.mark.parametrize("content", [b"\xff", b"x" * (257 << 10)], ids=["no UTF-8", "too long"])
def test_bad_instructions_are_told_before_the_router_is_asked(
    router: RouterDouble, run: Run, home: Path, content: bytes
) -> None:
    (home / "be.md").write_bytes(content)

    done = run("agent", "add", "carla", "--instructions", "be.md")

    assert done.returncode == 1
    assert "be.md: is " in done.stderr
    assert router.calls == []


def test_instructions_come_from_stdin(router: RouterDouble, run: Run) -> None:
    run("agent", "add", "carla", "--instructions", "-", stdin="Be brief.")

    assert router.calls[0][1]["instructions"] == "Be brief."


def test_purge_deletes_what_the_router_put_into_the_trash(
    router: RouterDouble, run: Run, home: Path, programs: Path
) -> None:
    trashed = home / ".local/state/nanoclaw/trash/berta-1"
    trashed.mkdir(parents=True)
    router.trash = str(trashed)
    log = fake_program(programs, "podman", 'shift; exec "$@"')

    done = run("agent", "remove", "berta", "--purge", "--yes")

    assert done.returncode == 0, done.stderr
    assert not trashed.exists()
    assert log.read_text() == f"unshare rm -rf -- {trashed}\n"


@pytest.mark.parametrize("place", ["elsewhere", ".local/state/nanoclaw/trash", "link", "../x"])
def test_purge_deletes_nothing_outside_the_trash(
    router: RouterDouble, run: Run, home: Path, programs: Path, place: str
) -> None:
    trash = home / ".local/state/nanoclaw/trash"
    trash.mkdir(parents=True)
    (home / "elsewhere").mkdir()
    (trash / "link").symlink_to(home / "elsewhere")
    router.trash = str({"link": trash / "link", "../x": f"{trash}/.."}.get(place, home / place))
    log = fake_program(programs, "podman", 'shift; exec "$@"')

    done = run("agent", "remove", "berta", "--purge", "--yes")

    assert done.returncode == 5
    assert not log.exists()
    assert (home / "elsewhere").exists()


def test_purge_that_fails_says_what_to_paste(
    router: RouterDouble, run: Run, home: Path, programs: Path
) -> None:
    trashed = home / ".local/state/nanoclaw/trash/berta 1"
    trashed.mkdir(parents=True)
    router.trash = str(trashed)
    fake_program(programs, "podman", "echo no subuid range >&2; exit 1")

    done = run("agent", "remove", "berta", "--purge", "--yes")

    assert done.returncode == 1
    assert "no subuid range" in done.stderr
    assert f"podman unshare rm -rf -- '{trashed}'" in done.stderr


def test_remove_without_purge_says_where_the_workspace_went(router: RouterDouble, run: Run) -> None:
    router.trash = "/somewhere/trash/berta-1"

    assert "/somewhere/trash/berta-1" in run("agent", "remove", "berta", "--yes").stderr


def test_text_of_others_cannot_drive_the_terminal(router: RouterDouble, run: Run) -> None:
    router.agents["berta"]["state"] = "broken"
    router.agents["berta"]["problem"] = "\x1b]0;owned\x07\x9b31m\u202e"

    shown = run("agent", "show", "berta").stdout + run("image", "build").stderr

    assert not set(shown) & set("\x1b\x07\x9b\u202e")
    assert "␛]0;owned␇" in shown


def test_image_build_prints_the_id_and_talks_on_stderr(
    router: RouterDouble, run: Run, programs: Path
) -> None:
    log = fake_program(programs, "podman", "echo not a result")

    done = run("image", "build", "--base-directory", "base")

    assert done.stdout == "sha256:0123\n"
    assert "STEP 1/2" in done.stderr
    assert os.path.isabs(router.calls[0][1]["baseDirectory"])
    assert (
        log.read_text()
        == "run --rm --pull=never --network=none --userns=keep-id --entrypoint /bin/true sha256:0123\n"
    )


def test_image_that_cannot_be_prepared_is_built_all_the_same(
    router: RouterDouble, run: Run, programs: Path
) -> None:
    fake_program(programs, "podman", "echo no subuid range >&2; exit 125")

    done = run("image", "build", "--json")

    assert (done.returncode, json.loads(done.stdout)) == (0, {"imageId": "sha256:0123"})
    assert "warning: that failed" in done.stderr
    assert "no subuid range" in done.stderr


def test_logs_become_journalctl_with_the_units_of_the_daemons(run: Run, programs: Path) -> None:
    log = fake_program(programs, "journalctl", "")

    run("logs", "-f", "-n", "7")

    assert log.read_text() == (
        "--user --unit=nanoclaw.service --unit=nanoclaw-gateway.service --unit=nanoclaw-channel@*.service "
        "--lines=7 --follow\n"
    )


def test_logs_as_json_are_the_journals_own(run: Run, programs: Path) -> None:
    log = fake_program(programs, "journalctl", "")

    run("logs", "berta", "--json")

    assert log.read_text().endswith("--lines=100 --output=json\n")


@pytest.mark.parametrize("command", [["logs"], ["agent", "logs"]])
def test_logs_of_an_agent_match_all_its_sessions(run: Run, programs: Path, command: list[str]) -> None:
    log = fake_program(programs, "journalctl", "")

    run(*command, "berta")

    assert log.read_text() == "--user --unit=nanoclaw-berta@*.service --lines=100\n"


def test_logs_of_an_agents_own_programs_are_those_of_its_uid(
    router: RouterDouble, run: Run, programs: Path
) -> None:
    logs = [fake_program(programs, name, "") for name in ("journalctl", "podman")]

    assert run("logs", "berta", "--inside", "-n", "7").returncode == 0

    # Whoever may read all of the journal needs nobody's uid.
    (called,) = (log.read_text() for log in logs if log.exists())
    uid = router.agents["berta"]["hostUid"]
    assert called.endswith(f"_UID={uid} --lines=7\n")


def test_logs_of_the_daemons_have_no_inside(run: Run) -> None:
    assert run("logs", "--inside").returncode == 2


def test_logs_take_no_pattern_for_a_name(run: Run, programs: Path) -> None:
    log = fake_program(programs, "journalctl", "")

    assert run("logs", "*").returncode == 5
    assert not log.exists()


def test_shell_opens_in_the_session_that_runs(router: RouterDouble, run: Run, programs: Path) -> None:
    log = fake_program(programs, "podman", "")

    assert run("agent", "shell", "berta").returncode == 0
    assert log.read_text() == "exec --interactive nanoclaw-berta-s1 bash\n"


def test_shell_without_a_running_session_says_what_to_do(router: RouterDouble, run: Run) -> None:
    router.sessions = []

    done = run("agent", "shell", "berta")

    assert done.returncode == 4
    assert "nanoclawctl chat berta" in done.stderr


def test_program_that_is_missing_is_no_traceback(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(home))

    done = run("logs")

    assert done.returncode == 1
    assert "cannot run journalctl" in done.stderr


def test_secret_comes_from_a_pipe_and_is_never_shown(run: Run, home: Path) -> None:
    assert run("secret", "set", "anthropic", stdin="sk-secret\n").returncode in (0, 1, 3)
    shown = run("secret", "list", "--json")

    assert "sk-secret" not in shown.stdout + shown.stderr
    assert isinstance(json.loads(shown.stdout)["secrets"], list)


def test_no_colours_unless_a_terminal_asks_for_them(router: RouterDouble, run: Run) -> None:
    assert "\x1b" not in run("status").stdout + run("agent", "show", "nobody").stderr


def test_reader_that_leaves_ends_it_quietly(router: RouterDouble, home: Path) -> None:
    for number in range(3000):
        router.agents[f"agent{number}"] = router.agents["berta"]

    process = subprocess.Popen(
        [*COMMAND, "agent", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=home
    )
    assert process.stdout and process.stderr
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()

    assert (process.wait(), errors) == (128 + signal.SIGPIPE, b"")


def test_ctrl_c_is_130_without_a_traceback(router: RouterDouble, home: Path) -> None:
    router.answer = lambda _: []
    process = subprocess.Popen(
        [*COMMAND, "send", "berta", "hello", "--wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=home,
        # Whoever runs the tests in the background of a script has SIGINT ignored, and so would all below.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    router.wait(lambda: router.messages)

    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=10)

    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in errors
    assert b"nanoclawctl chat berta" in errors


def test_command_imports_no_event_loop() -> None:
    """Start-up time is what a person feels at every command."""
    code = "import sys; from nanoclawd.cli.__main__ import main; main(['version']); print(*sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {"asyncio", "subprocess", "readline", "tomllib", "systemd"} & set(done.stdout.split())


def test_audit_lists_what_was_asked_for_in_columns(router: RouterDouble, run: Run) -> None:
    done = run("audit", "list", "berta", "--kind", "request", "--since", "2d", "--limit", "7")

    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0][:5] == ["ROW", "TIME", "EVENT", "AGENT", "TIMES"]
    assert (lines[1][0], lines[1][3], lines[1][6:8]) == ("6", "StopAgent", ["n", "1"])
    assert lines[2][3:6] == ["denied", "berta", "3"] and "no-rule" in lines[2]
    assert "\x1b" not in done.stdout
    ((_, wanted),) = router.calls
    assert abs(wanted.pop("since") + 2 * 86_400 - time.time()) < 60
    assert wanted == {"agent": "berta", "kind": "request", "limit": 7}


def test_audit_list_of_a_time_of_the_clock(router: RouterDouble, run: Run) -> None:
    rows = json.loads(run("audit", "list", "--since", "2026-11-22T08:00+00:00", "--json").stdout)["rows"]

    assert rows[0]["detail"] == {"n": 1}
    assert router.calls[0][1]["since"] == 1795334400.0


def test_audit_export_has_what_is_hashed(router: RouterDouble, run: Run) -> None:
    lines = run("audit", "export").stdout.splitlines()

    first, second = map(json.loads, lines)
    assert first == {**AUDIT[0], "at": 1001}
    assert second["detail"] == AUDIT[1]["detail"]
    assert router.calls[0][1]["limit"] is None


def test_audit_verify_names_the_row_that_is_broken(router: RouterDouble, run: Run) -> None:
    done = run("audit", "verify")
    assert (done.returncode, done.stdout[:22]) == (0, "2 rows, all in order. ")

    router.verdict |= {"broken": 3, "problem": "it was changed after it was written"}
    done = run("audit", "verify")
    assert done.returncode == 1
    assert done.stdout == "2 rows are in order. Row 3 is not: it was changed after it was written.\n"

    done = run("audit", "verify", "--json")
    assert (done.returncode, json.loads(done.stdout)["broken"]) == (1, 3)


def test_audit_row_that_somebody_wrote_anew_is_shown(router: RouterDouble, run: Run) -> None:
    router.trail[1]["detail"] = "no JSON"

    done = run("audit", "list")

    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3


def test_usage_says_what_is_left_and_what_is_no_fact(router: RouterDouble, run: Run) -> None:
    done = run("usage", "--since", "2d")

    lines = done.stdout.splitlines()
    names = "AGENT CALLS INPUT OUTPUT CACHE WRITE CACHE READ MONEY LEFT TODAY NOTE"
    assert " ".join(lines[0].split()) == names
    note = "2 estimated; 1 without a price, counted as the dearest"
    assert " ".join(lines[1].split()) == f"berta 12 100 50 20 900 $1.0203 $1.4797, 3930 tokens {note}"
    ((method, wanted),) = router.calls
    assert abs(wanted.pop("since") + 2 * 86_400 - time.time()) < 60
    assert (method, wanted) == ("ListUsage", {"by": "agent", "agent": None})


def test_usage_by_session_and_day(router: RouterDouble, run: Run) -> None:
    router.usage = {**USAGE, "session": "s1", "tokensLeft": None, "microdollarsLeft": None}
    assert run("usage", "--by", "session").stdout.split()[:2] == ["AGENT", "SESSION"]
    assert json.loads(run("usage", "--by", "day", "--json").stdout) == {"usage": [router.usage]}
    assert "before" in run("usage", "--by", "day").stdout  # what retention has summed up

    router.usage = None
    assert run("usage").stderr == "No model was asked.\n"


def test_budget_is_set_in_dollars_and_taken_away(router: RouterDouble, run: Run) -> None:
    done = run("budget", "set", "berta", "--money-per-day", "2.50", "--tokens-per-session", "none")

    assert "$2.50" in done.stdout
    budget = {"tokensPerDay": None, "tokensPerSession": -1, "moneyPerDay": 2_500_000}
    budget |= {"moneyPerSession": None, "requestsPerMinute": None}
    assert router.calls == [("SetBudget", {"name": "berta", "budget": budget})]


@pytest.mark.parametrize(
    "arguments",
    [(), ("--money-per-day", "two"), ("--money-per-day", "0.0000001"), ("--tokens-per-day", "-3")],
)
def test_budget_that_makes_no_sense(router: RouterDouble, run: Run, arguments: tuple[str, ...]) -> None:
    done = run("budget", "set", "berta", *arguments)

    assert done.returncode == 2 and done.stderr.startswith("error: ") and router.calls == []


def test_usage_of_an_agent_that_there_is_not(router: RouterDouble, run: Run) -> None:
    router.fail["ShowAgent"] = NotFound("no agent named 'bertha'", hint="look")

    assert run("usage", "--agent", "bertha").returncode == 4


def test_agent_show_has_the_budget_in_dollars(router: RouterDouble, run: Run) -> None:
    lines = run("agent", "show", "berta").stdout.splitlines()

    assert [line.split() for line in lines if "er day" in line] == [
        ["Tokens", "per", "day:", "5000"],
        ["Money", "per", "day:", "$2.50"],
    ]


def test_status_shows_whose_budget_is_used_up(router: RouterDouble, run: Run) -> None:
    stop = {
        "agent": "berta",
        "session": "",
        "limit": "money_per_day",
        "message": "$3 of $2 spent today",
    }
    router.status["budgetStops"] = [stop, {**stop, "session": "s1"}]

    lines = [line for line in run("status").stdout.splitlines() if line.startswith("Budget:")]

    assert [" ".join(line.split()) for line in lines] == [
        f"Budget: used up, {who}: $3 of $2 spent today, money_per_day is reached"
        for who in ("berta", "berta@s1")
    ]


def test_secret_that_is_set_is_noted_by_name(router: RouterDouble, run: Run) -> None:
    run("secret", "set", "anthropic", stdin="sk-secret\n")
    run("secret", "remove", "anthropic", "--yes")

    assert router.calls == [
        ("NoteSecret", {"secret": "anthropic", "event": event}) for event in ("secret_set", "secret_removed")
    ]


def test_secret_is_set_without_the_router(run: Run) -> None:
    done = run("secret", "set", "anthropic", stdin="sk-secret\n")

    assert done.returncode == 0
    assert "the audit trail has no row of this" in done.stderr
