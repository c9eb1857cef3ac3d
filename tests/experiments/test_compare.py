import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from experiments.compare import main
from mtl_jax.compare import Results
from tests.experiments.tfds_folders import write_stories

ROOT = pathlib.Path(__file__).parents[2]
EPOCHS = 6
PICTURES = ("changes", "conflict", "difficulty", "front", "losses", "metrics", "weights")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "cifar1"], r"no problem 'cifar1'.*Did you mean 'cifar100'.*Known: multim"),
        (
            ["--weightings", "dvwa"],
            r"no weighting 'dvwa'.*Did you mean 'dwa'.*Known: equal, cons",
        ),
        (["--problem", "utterances", "--seeds", "0"], r"At least one seed is needed"),
        (["--problem", "utterances", "utterances"], r"have the same name: utterances"),
        (["--problem", "utterances", "--reuse", "{tmp}/none"], r"none holds no results"),
        (
            ["--problem", "multimnist", "--weightings", "krum"],
            r"'krum' cannot run on 'multimnist': .* at least 3 tasks, but there are 2: left, right",
        ),
        (["--problem", "utterances", "--epochs", "0"], r"`epochs` must be at least 1, got 0"),
        (["--problem", "utterances", "--batch-size", "99999"], r"batch size, 99999, is larger"),
        (
            ["--problem", "utterances", "--checkpoint-seconds", "-1"],
            r"`checkpoint_seconds` must be at least 0, got -1",
        ),
        (["--problem", "ag_news", "--data-dir", "{tmp}"], r"ag_news_subset.*download_and_prepare"),
    ],
)
def test_a_wrong_configuration_is_said_plainly(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        main([argument.format(tmp=tmp_path) for argument in arguments])
    assert error.value.code == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in printed
    assert re.search(message, printed), printed


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for option, default in (
        ("--problem", "multimnist utterances helmholtz_small"),
        ("--weightings", "equal adaptive adaptive_softmax dwa uncertainty"),
        ("--seeds", "3"),
        ("--epochs", "None"),
        ("--conflict", "False"),
        ("--checkpoint-seconds", "10"),
        ("--resume", "False"),
        ("--data-dir", "None"),
    ):
        assert option in printed
        assert f"(default: {default})" in printed


def test_the_program_as_a_user_runs_interrupts_and_resumes_it(tmp_path):
    stories = write_stories(tmp_path / "tfds", copies=8)
    command = ["python", "-m", "experiments.compare", "--problem", "ag_news"]
    command += ["--weightings", "adaptive_alone", "upgrad", "--seeds", "2", "--epochs", str(EPOCHS)]
    command += ["--batch-size", "24", "--data-dir", str(stories), "--log", "tensorboard"]
    command += ["--name", "mine", "--runs-dir", str(tmp_path)]
    folder = tmp_path / "mine"

    def start(command):
        return subprocess.Popen(
            [sys.executable, *command[1:]],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"COLUMNS": "120"},
        )

    process = start(command)
    second = folder / "tensorboard" / "ag_news" / "adaptive_alone_seed0"
    while not second.exists() and process.poll() is None:  # its first epoch is not done
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors == f"Interrupted. To continue:\n\n    {shlex.join(command)} --resume\n\n"
    assert "equal" in printed
    partial = Results.read(folder)
    assert list(partial.of("ag_news")) == ["equal", "topic alone", "agency alone"]
    assert len(partial.unfinished("ag_news")) == 7
    assert "**Interrupted: 7 runs not finished.**" in (folder / "ag_news.md").read_text()
    page = (folder / "report.html").read_text()
    assert "Interrupted: 7 runs not finished." in page
    assert "data:image" not in page

    done = start(shlex.split(errors.splitlines()[2]))
    printed, errors = done.communicate()
    assert done.returncode == 0, errors
    assert errors == ""
    results = Results.read(folder)
    equal = [found.of("ag_news")["equal"][0] for found in (partial, results)]
    assert equal[0].epoch_seconds == equal[1].epoch_seconds  # it was not run again
    for word in ("adaptive_alone", "equal", "each task alone", "topic accuracy, %", "step time"):
        assert word in printed
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "records",
        "report.html",
        "results.json",
        "tensorboard",
        "timing.json",
        "ag_news.md",
        *(f"ag_news_{picture}.{end}" for picture in PICTURES for end in ("png", "pdf", "svg")),
    }
    assert list(results.of("ag_news")) == [
        *("equal", "adaptive_alone", "upgrad", "topic alone", "agency alone")
    ]
    assert results.unfinished("ag_news") == []
    behind, upgrad = (results.of("ag_news")[name] for name in ("adaptive_alone", "upgrad"))
    assert len(behind[1].metrics["test"]["topic"]["accuracy"]) == EPOCHS
    assert upgrad[0].measured_at == "representation"
    assert all(0 <= share <= 1 for share in upgrad[0].conflict["share"])
    report = (folder / "ag_news.md").read_text()
    assert f"    {shlex.join(command)}\n" in report
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == len(PICTURES)
    assert "Interrupted" not in report


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_both_signals_end_it_alike(number, status, tmp_path, capsys, monkeypatch):
    def compare(*args, **kwargs):
        os.kill(os.getpid(), number)

    monkeypatch.setattr("mtl_jax.compare.command_line.compare", compare)
    monkeypatch.setattr("os._exit", sys.exit)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    arguments = ["--problem", "utterances", "--name", "my own", "--resume"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == status
    words = "python -m experiments.compare --problem utterances --name 'my own' --resume"
    assert f"    {words}\n" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


@pytest.mark.parametrize(
    ("error", "status", "hint"),
    [(OSError("no space left"), 1, True), (FileExistsError("it is there"), 2, False)],
)
def test_what_cannot_be_written_is_said_plainly(error, status, hint, capsys, monkeypatch):
    def compare(*args, **kwargs):
        raise error

    monkeypatch.setattr("mtl_jax.compare.command_line.compare", compare)
    with pytest.raises(SystemExit) as ended:
        main(["--problem", "utterances"])
    assert ended.value.code == status
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {error}")
    assert ("--problem utterances --resume" in printed) == hint
