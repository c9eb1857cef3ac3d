"""The table of what tuning chose, and of what it cost."""

from collections.abc import Sequence

from mtl_jax.compare.settings import PRUNED, Trial, Tuning
from mtl_jax.compare.tables import Table


def tuning_table(tuning: Tuning) -> Table:
    """What tuning chose for each weighting and each task alone, and the budget it spent."""
    headers = ["weighting", "learning rate", "parameters", "validation change, %"]
    headers += ["as shipped, %", "trials", "epochs", "seconds"]
    rows = []
    for name, trials in tuning.trials.items():
        chosen = tuning.chosen(name)
        parameters = (f"{key}={_parameter(value)}" for key, value in chosen.parameters.items())
        rows.append(
            [
                name,
                f"{chosen.learning_rate:.3g}",
                ", ".join(parameters),
                _score(chosen),
                _score(trials[0]),
                _number_of_trials(trials),
                str(sum(trial.epochs for trial in trials)),
                f"{sum(trial.seconds for trial in trials):.0f}",
            ]
        )
    return Table(headers, rows)


def _number_of_trials(trials: Sequence[Trial]) -> str:
    pruned = sum(trial.failure == PRUNED for trial in trials)
    failed = sum(trial.failure is not None for trial in trials) - pruned
    kinds = [
        f"{number} {word}" for number, word in ((failed, "failed"), (pruned, PRUNED)) if number
    ]
    return f"{len(trials)} ({', '.join(kinds)})" if kinds else str(len(trials))


def _score(trial: Trial) -> str:
    return "failed" if trial.score is None else f"{100 * trial.score:+.2f}"


def _parameter(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_parameter(entry)}" for key, entry in value.items()) + "}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
