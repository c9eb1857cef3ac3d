import json

import numpy as np
import pytest

from experiments.verdicts import differences, main, verdict_table

TASKS = {
    "a": {"metric": "accuracy", "higher_is_better": True},
    "b": {"metric": "error", "higher_is_better": False},
}


def runs(a, b, failures=()):
    return [
        {
            "seed": seed,
            "failure": "no finite update" if seed in failures else None,
            "test": {"a": [0.1, x], "b": [9.0, y]},
        }
        for seed, (x, y) in enumerate(zip(a, b, strict=True))
    ]


def problem(**weightings):
    number = len(next(iter(weightings.values())))
    return {
        "settings": {"seeds": list(range(number))},
        "tasks": TASKS,
        "weightings": weightings,
    }


def test_differences_are_relative_to_the_other_and_a_gain_is_positive():
    found = problem(
        adaptive=runs([0.6, 0.5], [2.0, 2.0]), equal=runs([0.5, 0.5], [1.0, 4.0], failures=[1])
    )
    gain = ((0.6 - 0.5) / 0.5 - (2 - 1) / 1) / 2
    np.testing.assert_allclose(differences(found, "adaptive", "equal"), [gain, np.nan])


def test_verdicts_are_corrected_for_the_whole_table():
    """p is 0.042: below 0.05 for one comparison, and above it for two."""
    ours = runs([0.50, 0.51, 0.53], [1.0, 1.0, 1.0])
    near = runs([0.50 - 0.018, 0.51 - 0.03, 0.53 - 0.04], [1.0, 1.0, 1.0])
    same = runs([0.52, 0.50, 0.52], [1.0, 1.0, 1.0])
    alone = verdict_table({"p": problem(adaptive=ours, equal=near)}, "adaptive", ["equal"])
    assert alone.count("better") == 1
    both = verdict_table(
        {"p": problem(adaptive=ours, equal=near, dwa=same)}, "adaptive", ["equal", "dwa"]
    )
    assert "better" not in both
    assert both.count("undecided") == 2


def test_the_table_of_two_folders(tmp_path, capsys):
    for name, tuned in (("one", True), ("two", False)):
        found = problem(
            adaptive=runs([0.6, 0.61, 0.62, 0.6], [1.0] * 4),
            equal=runs([0.7, 0.712, 0.719, 0.702], [1.0] * 4),
        )
        found |= {"tuning": {}} if tuned else {}
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({name: found}))
    main([str(tmp_path / "one"), str(tmp_path / "two")])
    header, _, one, two = capsys.readouterr().out.splitlines()
    assert "adaptive against constant" in header
    cells = [cell.strip() for cell in one.strip("|").split("|")]
    assert cells[:3] == ["one", "yes", "4"]
    assert cells[3].endswith("] worse")
    assert cells[4:] == ["", "", ""]  # it ran against equal weights alone
    assert two.split("|")[2].strip() == "no"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name at least one folder"),
        (["nowhere"], "nowhere/results.json"),
        (["{tmp}", "--weighting", "famo"], "'famo' did not run on 'p'"),
    ],
)
def test_what_is_missing_is_said_plainly(arguments, message, tmp_path, capsys):
    found = {"p": problem(adaptive=runs([0.6], [1.0]))}
    (tmp_path / "results.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit) as error:
        main([argument.format(tmp=tmp_path) for argument in arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
