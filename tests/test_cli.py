# SPDX-License-Identifier: Apache-2.0
"""The command line: what goes to stdout, what to stderr, and how it ends."""

from __future__ import annotations

import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from golden import TINY, Build

from edgecascade.cli import main
from edgecascade.cli.show import show
from edgecascade.completion import Completion, Piece, Timings, Usage
from edgecascade.doctor import processor_name
from edgecascade.text.tools import ToolCall

Capture = pytest.CaptureFixture[str]
SAMPLING = ["--max-tokens", "12", "--seed", "4"]


@pytest.fixture
def bundle(build: Build) -> str:
    return str(build("tiny", "speed"))


def run(capsys: Capture, *args: str) -> tuple[int, str, str]:
    status = main(args)
    out, err = capsys.readouterr()
    return status, out, err


def process(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgecascade", *args]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=TINY.parent.parent, **options
    )


def test_build_makes_a_bundle_that_inspect_describes(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    status, stdout, _ = run(capsys, "build", str(TINY / "checkpoint"), "--out", str(out))
    assert status == 0
    assert f"{out}: 0.9 MB became" in stdout
    status, stdout, _ = run(capsys, "inspect", str(out), "--verify")
    assert status == 0
    for words in ("precision speed", "AGX Orin 64GB", "expert", "sessions of 32k"):
        assert words in stdout
    status, stdout, _ = run(capsys, "inspect", str(out), "--json")
    assert (status, json.loads(stdout)["precision"]) == (0, "speed")


def test_build_keeps_an_existing_bundle_unless_told(capsys: Capture, tmp_path: Path) -> None:
    command = ["build", str(TINY / "checkpoint"), "--out", str(tmp_path / "b"), "--no-verify"]
    assert run(capsys, *command)[0] == 0
    status, _, stderr = run(capsys, *command)
    assert (status, "error [build-failed]" in stderr) == (1, True)
    assert run(capsys, *command, "--overwrite", "--precision", "exact")[0] == 0


def test_generate_writes_the_answer_to_stdout_and_the_rest_to_stderr(
    capsys: Capture, bundle: str
) -> None:
    asked = ["generate", bundle, "--prompt", "Go.", "--thinking-budget", "3", *SAMPLING]
    status, stdout, stderr = run(capsys, *asked)
    assert status == 0
    whole = json.loads(run(capsys, *asked, "--json")[1])
    assert stdout == whole["text"] + "\n"
    assert stderr.startswith(whole["reasoning"] + "\n[")
    assert "12 tokens made" in stderr
    assert "length; seed 4]" in stderr
    assert whole["usage"]["completion_tokens"] == 12


def test_generate_takes_ids_stdin_and_a_system_message(
    capsys: Capture, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def completion(*args: str) -> Any:
        status, stdout, stderr = run(capsys, "generate", bundle, *args, "--json", *SAMPLING)
        assert (status, stderr) == (0, "")
        return json.loads(stdout)

    assert completion("--token-ids", "5,6,7")["usage"]["prompt_tokens"] == 3
    plain = completion("--prompt", "Go.", "--no-thinking")
    system = completion("--prompt", "Go.", "--no-thinking", "--system", "Robot.")
    raw = completion("--prompt", "Go.", "--raw")
    tokens = [c["usage"]["prompt_tokens"] for c in (raw, plain, system)]
    assert tokens == sorted(set(tokens))
    with io.TextIOWrapper(io.BytesIO(b"Go.")) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert completion("--prompt", "-", "--raw")["token_ids"] == raw["token_ids"]


def test_calls_are_shown_each_on_its_line(capsys: Capture) -> None:
    calls = (ToolCall("say", {"text": 'Grüß "dich"', "to": None}), ToolCall("stop", {}))
    lines = 'say(text="Grüß \\"dich\\"", to=null)\nstop()\n'
    end = Completion(
        text="", reasoning="", tool_calls=calls, tool_errors=("no tool 'fly'",), token_ids=(5,),
        finish_reason="tool_calls", logprobs=None, usage=Usage(1, 0, 5, 0),
        timings=Timings(0, 0, 0, 0, 0), seed=0, bundle_id="",
    )  # fmt: skip
    called = Piece(text="", reasoning="", token_ids=(3,), tool_calls=calls)
    over = Piece(text="", reasoning="", token_ids=(5,), finish_reason="stop", completion=end)
    talk = [Piece(text=text, reasoning="", token_ids=(1,)) for text in ("Moving", " now.")]
    assert show([*talk, called, *talk, over]) == end
    out, err = capsys.readouterr()
    assert out == f"Moving now.\n{lines}Moving now.\n"
    assert "a call that cannot be read: no tool 'fly'" in err
    show([called, over])
    assert capsys.readouterr().out == lines


def test_tools_are_read_from_a_file(capsys: Capture, bundle: str, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    asked = ["generate", bundle, "--prompt", "Go.", "--json", *SAMPLING]
    file.write_text('[{"name": "stop"}]')
    without, shown = (
        json.loads(run(capsys, *asked, *more)[1])["usage"]["prompt_tokens"]
        for more in ([], ["--tools", str(file)])
    )
    assert shown > without
    for wrong, words in (
        ("[3]", "tools[0] is int; it must be a dict"),
        ("{}", "tools is dict"),
        ("[" * 10**5, "give a JSON list of tools"),
        ("\ud800", "give a JSON list of tools"),
    ):
        file.write_bytes(wrong.encode("utf-8", "surrogatepass"))
        status, stdout, stderr = run(capsys, *asked, "--tools", str(file))
        assert (status, stdout) == (1, "")
        assert f"error [invalid-request]: --tools {file}: " in stderr
        assert words in stderr
    assert run(capsys, *asked, "--tools", str(tmp_path))[0] == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "BUNDLE", "--prompt", ""], "[invalid-request]: prompt is empty"),
        (["generate", "BUNDLE", "--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "BUNDLE", "--prompt", "a", "--top-p", "2"], "top_p is 2.0"),
        (["generate", "BUNDLE", "--prompt", "a\udcff"], "lone surrogate U+DCFF"),
        (["generate", "BUNDLE", "--token-ids", "1,x"], "--token-ids is '1,x'"),
        (["generate", "BUNDLE", "--token-ids", "9999"], "token 9999 at position 0"),
        (["generate", "BUNDLE", "--token-ids", ",".join(["5"] * 4097)], "[context-exceeded]"),
        (["generate", "BUNDLE", "--prompt", "a", *["--stop", "x"] * 17], "stop has 17 strings"),
        (["generate", "BUNDLE", "--prompt", "a", "--stop", "\udcff"], "stop holds '\\udcff'"),
        (["generate", "BUNDLE", "--prompt", "a", "--backend", "tpu"], "backend is 'tpu'"),
        (["generate", "no-such-bundle", "--prompt", "a"], "[bundle-damaged]: bundle no-such"),
        (["inspect", "no-such-bundle"], "[bundle-damaged]"),
        (["build", "no-such-checkpoint", "--out", "out"], "[checkpoint-damaged]"),
        (["bench", "BUNDLE", "--prompt-tokens", "5000"], "[context-exceeded]"),
        (["bench", "--synthetic", "no-such-model"], "no-such-model"),
        (["bench", "BUNDLE", "--layers", "3"], "--layers is of --synthetic"),
        (["bench", "BUNDLE", "--precision", "speed"], "--precision is of --synthetic"),
        (["generate", "BUNDLE", "--token-ids", "5", "--system", "Robot."], "leave out --system"),
        (["generate", "BUNDLE", "--prompt", "a", "--raw", "--system", "R."], "leave out --system"),
    ],
)
def test_errors_are_one_line_with_a_code(
    capsys: Capture,
    bundle: str,
    args: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = run(capsys, *[bundle if arg == "BUNDLE" else arg for arg in args])
    last = stderr.splitlines()[-1]
    assert (status, stdout) == (1, "")
    assert last.startswith("error [")
    assert words in last
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_parser_says_in_several_lines_is_one_line(
    capsys: Capture, bundle: str, tmp_path: Path
) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("device_id: robot-7\nmqtt: [\n")
    status, stdout, stderr = run(capsys, "serve", bundle, "--config", str(config))
    assert (status, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith(f"error [invalid-request]: config '{config}' is not YAML: ")
    assert f'in "{config}", line 3, column 1' in stderr


def test_the_debug_switch_shows_where_an_error_came_from(
    bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGECASCADE_DEBUG", "1")
    with pytest.raises(ValueError, match="prompt is empty"):
        main(["generate", bundle, "--prompt", ""])


@pytest.mark.parametrize(
    "args",
    [[], ["fly"], ["generate", "b"], ["bench"], ["bench", "b", "--decode-tokens", "1"]],
)
def test_wrong_usage_ends_with_status_2(capsys: Capture, args: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    assert "usage: edgecascade" in capsys.readouterr().err


def test_chat_answers_line_by_line_and_ends_with_its_input(bundle: str) -> None:
    chat = process("chat", bundle, *SAMPLING, "--no-thinking", stdin=subprocess.PIPE)
    stdout, stderr = chat.communicate("Go.\n\nStop – now.\n".encode(), timeout=60)
    assert chat.returncode == 0, stderr
    assert stderr.count(b"12 tokens made") == 2
    assert stdout.strip()


def test_a_wrong_turn_does_not_end_a_chat(bundle: str) -> None:
    chat = process("chat", bundle, *SAMPLING, stdin=subprocess.PIPE)
    _, stderr = chat.communicate(b"a\xff\nGo.\n", timeout=60)
    assert chat.returncode == 1
    assert b"error [invalid-request]: messages[0].content is not valid Unicode" in stderr
    assert stderr.count(b"12 tokens made") == 1


@pytest.mark.parametrize("command", [["inspect"], ["generate", "--prompt", "Go."]])
def test_a_full_disk_behind_stdout_is_one_line(bundle: str, command: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "edgecascade", command[0], bundle, *command[1:]],
            stdout=full, stderr=subprocess.PIPE, cwd=TINY.parent.parent, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last == b"error [os]: [Errno 28] No space left on device"
    assert b"Traceback" not in done.stderr


def test_a_synthetic_model_that_is_unknown_or_has_no_place_is_one_line(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    status, _, stderr = run(capsys, "bench", "--synthetic", "gpt")
    assert (status, stderr.count("\n")) == (1, 1)
    assert "synthetic model 'gpt' is unknown" in stderr
    command = ["bench", "--synthetic", "nemotron-3-nano-4b", "--layers", "1"]
    status, _, stderr = run(capsys, *command)
    assert (status, "error [build-failed]: cannot write" in stderr) == (1, True)


def test_a_closed_pipe_ends_the_command_quietly(bundle: str) -> None:
    ask = ("generate", bundle, "--prompt", "Go.", "--no-thinking", "--temperature", "3")
    with process(*ask) as talk:
        assert talk.stdout is not None
        assert talk.stderr is not None
        talk.stdout.read(1)
        talk.stdout.close()
        stderr = talk.stderr.read()
    # It may have finished before it noticed.
    assert talk.returncode in (0, 128 + signal.SIGPIPE)
    assert b"Traceback" not in stderr
    assert b"Exception" not in stderr


@pytest.mark.parametrize("closed", [0, 1, 2], ids=["stdin", "stdout", "stderr"])
def test_a_stream_that_is_closed_from_the_beginning_leads_nowhere(bundle: str, closed: int) -> None:
    prompt = "-" if closed == 0 else "Go."
    ask = [sys.executable, "-m", "edgecascade", "generate", bundle, "--prompt", prompt, *SAMPLING]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *ask],
        capture_output=True, text=True, cwd=TINY.parent.parent, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == (1 if closed == 0 else 0), done.stderr
    assert (done.stdout == "") == (closed < 2)
    if closed == 0:
        assert done.stderr.startswith("error [invalid-request]: prompt is empty")
    elif closed == 1:
        assert "12 tokens made" in done.stderr
        assert "Traceback" not in done.stderr


def test_ctrl_c_ends_the_command_quietly(bundle: str) -> None:
    # A shell that runs the tests in the background has them ignore SIGINT, and so their children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    chat = process("chat", bundle, stdin=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    assert chat.stderr is not None
    chat.stderr.readline()  # the bundle is loaded, it waits for input
    time.sleep(0.1)
    chat.send_signal(signal.SIGINT)
    _, stderr = chat.communicate(timeout=60)
    assert chat.returncode == 128 + signal.SIGINT
    assert b"Traceback" not in stderr


def test_arguments_that_are_not_utf8_are_an_error_not_a_crash(bundle: str) -> None:
    talk = process("generate", bundle, "--prompt", b"a\xff")
    _, stderr = talk.communicate(timeout=60)
    assert talk.returncode == 1
    assert stderr.startswith(b"error [invalid-request]: prompt is not valid Unicode")


def test_bench_measures_a_bundle(capsys: Capture, bundle: str) -> None:
    sizes = ["--prompt-tokens", "40", "--decode-tokens", "8", "--repeats", "1"]
    status, stdout, _ = run(capsys, "bench", bundle, *sizes, "--json")
    result = json.loads(stdout)
    assert status == 0
    for name in ("load_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes"):
        assert result[name] > 0
    share = result["decode_tokens_per_s"] * result["bytes_per_token"] / result["read_bytes_per_s"]
    assert result["share_of_roofline"] == pytest.approx(share)
    status, stdout, _ = run(capsys, "bench", bundle, *sizes, "--backend", "reference")
    assert status == 0
    assert "decode" in stdout
    assert "roofline" not in stdout


def test_bench_writes_a_synthetic_bundle_once(capsys: Capture, own_cache: None) -> None:
    command = ["bench", "--synthetic", "nemotron-3-nano-30b", "--layers", "1"]
    command += ["--prompt-tokens", "4", "--decode-tokens", "2", "--repeats", "1", "--json"]
    status, stdout, stderr = run(capsys, *command)
    assert (status, "writing" in stderr) == (0, True)
    again = run(capsys, *command)
    assert (again[0], again[2]) == (0, "")
    assert json.loads(again[1])["bundle_id"] == json.loads(stdout)["bundle_id"]


def test_doctor_says_what_it_found(capsys: Capture) -> None:
    status, stdout, _ = run(capsys, "doctor", "--json")
    found = json.loads(stdout)
    assert status == 0
    assert found["library"]["isa"] in found["library"]["isas"]
    assert found["library"]["read_bytes_per_s"] > 1e8
    status, stdout, _ = run(capsys, "doctor")
    assert status == 0
    for words in ("GB/s", "Python", "jetson", found["library"]["isa"]):
        assert words in stdout


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n", "AMD EPYC"),
        ("BogoMIPS\t: 62.50\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n", "Cortex-A78AE"),
        ("model name\t: ARMv8\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n", "Cortex-A78AE"),
        ("CPU implementer\t: 0x48\nCPU part\t: 0xd42\n", None),  # somebody else's 0xd42
        ("CPU implementer\t: 0x41\nCPU part\t: 0xfff\n", None),
        ("", None),
    ],
)
def test_the_processor_has_a_name_on_arm_too(tmp_path: Path, lines: str, name: str | None) -> None:
    (tmp_path / "cpuinfo").write_text(lines)
    unknown = platform.processor() or platform.machine()
    assert processor_name(tmp_path / "cpuinfo") == (name or unknown)


def test_doctor_names_a_library_that_is_missing() -> None:
    look = process("doctor", env={**os.environ, "EDGECASCADE_LIBRARY": "missing.so"})
    stdout, _ = look.communicate(timeout=60)
    assert look.returncode == 1
    assert b"missing.so is not built" in stdout


def test_version_is_printed(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code in (0, None)
    assert capsys.readouterr().out.startswith("edgecascade ")
