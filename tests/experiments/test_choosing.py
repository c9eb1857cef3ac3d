"""The page on choosing a weighting is made from records."""

import json
import re

import numpy as np
import pytest
from made_runs import ACCURACY, made_results

from experiments.choosing import END, START, main

METHODS = {"equal": "losses", "adaptive": "losses", "upgrad": "representation", "db_mtl": "rows"}
PRICES = {"mlp-2": 1.1, "mlp-5": 2.36, "mlp-20": 3.0}


@pytest.fixture
def records(tmp_path):
    """What the comparisons and the benchmark leave."""
    noise = np.array([-0.01, 0.0, 0.01])

    def comparison(problem, folder, hardest, **others):
        tasks = dict.fromkeys((hardest, *others), ACCURACY)
        rows = {
            name: dict.fromkeys(tasks, 0.5 + 0.05 * number + noise)
            for number, name in enumerate(METHODS)
            if problem == "utterances" or name != "db_mtl"
        }
        alone = {task: [0.5, 0.5, 0.5] for task in tasks}
        made_results(rows, tasks, alone, name=problem).write(tmp_path / folder)

    comparison("multimnist", "multimnist", "left", right=1)
    comparison("utterances", "utterances", "topic", role=1)
    faster = {"equal": {"topic": [0.6] * 3, "role": [0.5] * 3}}
    tasks = {"topic": ACCURACY, "role": ACCURACY}
    made_results(faster, tasks, name="utterances").write(tmp_path / "faster")
    networks = [
        {
            "network": network,
            "measured": [
                {"method": name, "form": form, "step_seconds": 1.0, "ratio": [1, price, 9]}
                for name, form in METHODS.items()
            ],
        }
        for network, price in PRICES.items()
    ]
    ours = {"device": "cpu", "clock": "CPU time", "versions": {}, "networks": networks}
    (tmp_path / "speed.json").write_text(json.dumps({"ours": ours}))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "choosing.md").write_text(f"before\n{START}old{END}after\n")
    return tmp_path


def run(folder, *comparisons):
    found = [str(folder / name) for name in comparisons]
    options = {"--faster": "faster", "--speed": "speed.json", "--out": ""}
    main([*found, *(word for name, path in options.items() for word in (name, str(folder / path)))])


def test_the_page_is_made_from_records(records):
    run(records, "multimnist", "utterances")
    page = (records / "choosing.md").read_text().replace("\u00a0", " ")
    assert page.startswith(f"before\n{START}| method |")
    assert page.endswith(f"{END}after\n")
    # 0.55 against 0.5 is +10 %; the half-width of three seeds is t(2) 0.01 / sqrt(3).
    gains = "+10.00 ± 4.97 | +10.00 ± 4.97 | 55.00 ± 2.48 |"
    assert f"| `adaptive` | 1.10 | 2.36 | 3.00 | {gains}" in page
    assert "| `db_mtl` | 1.10 | 2.36 | 3.00 |  | +30.00 ± 4.97 | 65.00 ± 2.48 |" in page
    assert page.index("*reads the losses*") < page.index("`adaptive`") < page.index("`upgrad`")
    decision = (records / "pictures" / "decision.svg").read_text()
    text = " ".join(re.findall(r">([^<>]+)</t", decision))
    assert "task +10.0 points, the best method without it, db_mtl, +15.0" in text
    assert "db_mtl: +15.0, at 2.4 times that price for 5 tasks" in text
    assert "upgrad  2.36" in (records / "pictures" / "price.svg").read_text()


def test_what_is_missing_is_said(records, capsys):
    with pytest.raises(SystemExit) as error:
        run(records, "multimnist")
    assert error.value.code == 2
    assert "The folders have no runs on utterances." in capsys.readouterr().err
