import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments.compare import main

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "cifar1"], r"no problem 'cifar1'.*Did you mean 'cifar100'.*Known: multim"),
        (["--weightings", "dvwa"], r"no weighting 'dvwa'.*Did you mean 'dwa'.*Known: equal, adap"),
        (["--seeds", "0"], r"--seeds must be at least 1, got 0"),
        (
            ["--problem", "multimnist", "--weightings", "krum"],
            r"'krum' cannot run on 'multimnist': .* at least 3 tasks, but there are 2: left, right",
        ),
        (["--problem", "utterances", "--epochs", "0"], r"`epochs` must be at least 1, got 0"),
        (["--problem", "utterances", "--batch-size", "99999"], r"batch size, 99999, is larger"),
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
        ("--problem", "multimnist utterances"),
        ("--weightings", "equal adaptive dwa uncertainty"),
        ("--seeds", "3"),
        ("--epochs", "None"),
        ("--conflict", "False"),
        ("--data-dir", "None"),
    ):
        assert option in printed
        assert f"(default: {default})" in printed


def test_the_program_as_a_user_runs_it(tmp_path):
    command = [sys.executable, "-m", "experiments.compare", "--problem", "utterances"]
    command += ["--weightings", "adaptive", "upgrad", "--seeds", "2", "--epochs", "2"]
    command += ["--name", "mine", "--runs-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("adaptive", "equal", "each task alone", "language accuracy, %", "step time"):
        assert word in done.stdout
    folder = tmp_path / "mine"
    assert {path.name for path in folder.iterdir()} == {
        "results.json",
        "timing.json",
        "utterances.md",
        "utterances_conflict.png",
        "utterances_metrics.png",
        "utterances_weights.png",
    }
    results = json.loads((folder / "results.json").read_text())["utterances"]
    assert list(results["weightings"]) == ["equal", "adaptive", "upgrad"]
    assert len(results["weightings"]["adaptive"][1]["test"]["topic"]) == 2
    conflict = results["weightings"]["upgrad"][0]["conflict"]
    assert conflict["measured_at"] == "representation"
    assert all(0 <= share <= 1 for share in conflict["share"])
    report = (folder / "utterances.md").read_text()
    assert "--problem utterances --weightings adaptive upgrad --seeds 2 --epochs 2" in report
