"""Bad input of every command ends in a line that says what is wrong, never in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from esper_fn import cli, report


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ESPER_BUS", raising=False)


USAGE = [
    (["grow", "--seed", str(2**70)], "too large; at most 4294967295"),
    (["grow", "--seed", str(2**32)], "too large; at most 4294967295"),
    (["grow", "--seed", "-1"], "-1 is too small"),
    (["grow", "--seed", "1.5"], "'1.5' is not a whole number"),
    (["grow", "--seed", "nan"], "'nan' is not a whole number"),
    (["grow", "--seed", ""], "'' is not a whole number"),
    (["grow", "--seed", "9" * 5000], "is not a whole number"),
    (["grow", "--seed", str(2**32 - 1), "--repeat", "2"], "the last seed would be"),
    (["grow", "--steps", str(10**30)], "too large"),
    (["grow", "--repeat", str(10**30)], "too large"),
    (["grow", "--save-every", "0"], "too small"),
    (["grow", "--policy", "None"], "'None'; allowed: grow, periodic, plateau, random, never"),
    (["grow", "runs/x"], "usage: esper grow"),
    (["watch", "runs/x"], "usage: esper watch"),
    (["watch", "runs/x"], "esper report DIR"),
    (["watch", "--seconds", "1e300"], "no number of seconds"),
    (["watch", "--seconds", "nan"], "no number of seconds"),
    (["watch", "--metrics-port", "70000"], "no port"),
    (["watch", "--metrics-port", "9" * 5000], "not a whole number"),
    (["stop", "now"], "--run NAME"),
    (["stop", "--wait", "-1"], "no number of seconds"),
    (["send", "pause", "now"], "--run NAME"),
    (["send", "cull", "--seed", str(2**70)], "send cull"),
    (["send", "cull", "--seed", "1.5"], "not a whole number"),
    (["send", "cull", "--seed", "1", "--id", ""], "send cull"),
    (["send", "cull", "--seed", "1", "--expires", "1e9"], "send cull"),
    (["dlq", "show"], "name the letters"),
    (["dlq", "burn"], "invalid choice"),
    (["bus-key", "--name", "a b"], "letters, digits and _"),
    (["report"], "usage: esper report"),
    (["report", "a", "b"], "usage: esper report"),
    (["checkpoint", "list", "a", "b"], "usage: esper checkpoint list"),
    (["checkpoint", "prune", "a", "--latest", "0"], "too small"),
    (["checkpoint", "prune", "a", "--best", "x:"], "[N:]METRIC"),
    (["checkpoint", "prune", "a"], "at least one of"),
    (["export", "a", "--seed", "-1"], "too small"),
    (["export", "a", "--format", "onnx"], "invalid choice"),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE, ids=range(len(USAGE)))
def test_a_wrong_call_names_what_is_wrong(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error) < 3_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no JSON list"),
        (b"5", "no JSON list"),
        (b"{}", "no JSON list"),
        (b"[5]", "must hold a list like"),
        (b'[{"kind": ["cull"]}]', "must hold a list like"),
        (b'[{"kind": "cull", "seed": "x"}]', "send batch"),
        (b'[{"kind": "batch", "commands": []}]', "send batch"),
        (b"[]", "send batch"),
        (b"\xff\xfe", "no JSON list"),
        (b"[" * 10_000, "no JSON list"),
        (b"[" + b"[]," * 2**20 + b"1]", "longer than"),
    ],
    ids=range(11),
)
def test_a_bad_batch_is_a_wrong_call(content, words, tmp_path, capsys):
    path = tmp_path / "batch.json"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        cli.main(["send", "batch", "--file", str(path)])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["send", "batch", "--file", "missing.json"],
        ["send", "batch", "--file", "."],
        ["report", "missing"],
        ["report", "file"],
        ["report", "."],
        ["checkpoint", "list", "missing"],
        ["checkpoint", "verify", "file"],
        ["checkpoint", "list", ".", "--key-file", "missing"],
        ["checkpoint", "list", ".", "--key-file", "file"],
        ["checkpoint", "list", ".", "--key-file", "/dev/zero"],
        ["export", "missing"],
        ["export", "file"],
        ["grow", "--out", "file"],
        ["grow", "--out", "file/below"],
        ["grow", "--data", "mnist1d", "--data-folder", "file"],
        ["watch", "--bus", "memory"],
        ["stop", "--bus", "unix:///nowhere/x.sock"],
        ["send", "pause", "--run", "a b"],
    ],
)
def test_what_fails_is_said_in_one_line(arguments, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"\x00\xff")
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("esper: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}])
def test_a_path_that_the_screen_cannot_show_is_escaped(environment, tmp_path):
    names = ["läuft-日本", os.fsdecode(b"odd-\xff\x9b2J")]
    for name in names:
        with report.create(tmp_path / name) as folder:
            folder.finish({"data": "d"})
        done = _esper(["report", str(tmp_path / name)], environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith(b"report.html")
        missing = _esper(["report", str(tmp_path / f"{name}-not")], environment)
        assert missing.returncode == 1
        assert missing.stderr.startswith(b"esper: ")
        assert b"Traceback" not in missing.stderr
        assert b"\x9b" not in done.stdout + missing.stderr
    # `print` of Python itself would end in an UnicodeEncodeError.
    assert _esper(["checkpoint", "list", names[0]], environment).returncode == 1


def _esper(arguments, environment):
    return subprocess.run(
        [sys.executable, "-m", "esper_fn.cli", *arguments],
        env={**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **environment},
        capture_output=True,
        check=False,
    )


def _write_run(path, **summary):
    with report.create(path) as folder:
        folder.append_event(
            {
                "arm": "grown", "step": 7, "seed": 3, "site": "hidden", "chunk": 1,
                "blueprint": "mlp", "from": "DORMANT", "to": "GERMINATED",
                "cause": "policy:periodic", "measured": {},
            }
        )  # fmt: skip
        folder.finish({"data": "digits", "host": "mlp", **summary})


def test_the_report_says_what_was_rolled_back_in_words(tmp_path):
    rollback = {
        "step": 40, "alarm": "NON_FINITE", "loss": None, "restored_step": 30, "steps_undone": 11,
        "quarantined": [
            {"seed": 3, "site": "hidden", "layer": 0, "chunk": 1, "blueprint": "mlp",
             "stage": "TRAINING"},
        ],
    }  # fmt: skip
    calm = {**rollback, "step": 50, "restored_step": None, "steps_undone": None, "quarantined": []}
    _write_run(tmp_path / "run", rollbacks={"grown": [rollback, calm], "random": []})
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "asked by" not in page
    assert "<th>cause</th>" in page
    assert "policy:periodic" in page
    for sign in ("&#x27;", "{", "[]", "restored_step"):
        assert sign not in page.partition("<h1>")[2], sign
    for words in ("rolled back", "hidden [1]", "non finite", "went back to step 30"):
        assert words in page.lower(), words


def test_nothing_in_a_summary_is_shown_as_python_writes_it(tmp_path):
    _write_run(
        tmp_path / "run",
        rollbacks={"grown": "nonsense", "random": [5, {"step": "x"}, {"quarantined": [None, 3]}]},
        sizes={"width": 8, "inner": {"a": [1, 2, None]}},
        flag=True,
        list=[{"x": 1}, "y"],
        empty={},
    )
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    adapter = (tmp_path / "run" / "report.html").read_text().partition("<h1>")[2]
    for sign in ("&#x27;", "[1,", "{&", "True"):
        assert sign not in adapter, sign
    assert "width 8" in adapter


def test_policy_none_is_the_policy_never(tmp_path, capsys):
    assert cli.main(["grow", "--policy", "none", "--out", "/proc/nowhere", "--steps", "40"]) == 1
    assert "/proc/nowhere" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["grow", "--help"])
    assert "random or never" in " ".join(capsys.readouterr().out.split())


def test_a_folder_that_is_no_run_of_grow_is_not_exported(tmp_path, capsys):
    from esper_fn import checkpoint

    for record in (None, {}, {"settings": 5}, {"settings": {"data": "digits"}}):
        path = tmp_path / json.dumps(record).replace("/", "") / "checkpoints" / "seed-0" / "grown"
        checkpoint.save(path, 1, {"x": 1}, record=record)
        assert cli.main(["export", str(path.parents[2])]) == 1
        assert "esper grow" in capsys.readouterr().err
