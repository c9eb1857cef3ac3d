"""The forms of adaptive_alone beside each other."""

import pytest

from experiments.adaptive_alone_forms import FORMS, main
from mtl_jax.compare import load_results


def test_every_form_is_a_row(tmp_path, monkeypatch, capsys):
    assert {"end, proportional, 4", "curve, softmax, 0.5"} <= set(FORMS)
    assert len(FORMS) == 14
    # Two of them, and no picture: what is left is quick.
    some = {name: FORMS[name] for name in ("end, proportional, 4", "curve, softmax, 0.5")}
    monkeypatch.setattr("experiments.adaptive_alone_forms.FORMS", some)
    monkeypatch.setattr("mtl_jax.compare.report.figures", lambda analysis: {})
    words = ["--problem", "utterances", "--epochs", "2", "--seeds", "1", "--runs-dir"]
    main([*words, str(tmp_path), "--learning-rate", "0.02"])
    table = load_results(tmp_path / "forms_utterances")
    alone = {f"{task} alone" for task in ("language", "topic", "role")}
    assert set(table["weighting"]) == {"equal", *some, *alone}
    losses = table[table["metric"] == "loss"].groupby("weighting")["value"].sum()
    assert losses[list(some)].nunique() == 2
    for other, message in (  # what is finished is gone on with
        (["--learning-rate", "0.03"], "learning_rate is 0.03 and was 0.02"),
        (["--problem", "tox21", "--data-dir", str(tmp_path)], "There is none in"),
    ):
        with pytest.raises(SystemExit) as error:
            main([*words, str(tmp_path), *other])
        assert error.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
