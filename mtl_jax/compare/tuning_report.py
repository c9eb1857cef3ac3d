"""What tuning chose and what it cost, as a table and as JSON."""

from typing import Any

import tabulate

from mtl_jax.compare.settings import PRUNED, Trial, Tuning


def tuning_table(tuning: Tuning) -> str:
    """A Markdown table: a row for each weighting and for each task alone."""
    headers = [
        "weighting",
        "learning rate",
        "parameters",
        "validation change, %",
        "as shipped, %",
        "trials",
        "epochs",
        "seconds",
    ]
    rows = []
    for name, trials in tuning.trials.items():
        chosen = tuning.chosen(name)
        rows.append(
            [
                name,
                f"{chosen.learning_rate:.3g}",
                ", ".join(f"{key}={_text(value)}" for key, value in chosen.parameters.items()),
                _percent(chosen),
                _percent(trials[0]),
                _number_of_trials(trials),
                str(sum(trial.epochs for trial in trials)),
                f"{sum(trial.seconds for trial in trials):.0f}",
            ]
        )
    return tabulate.tabulate(
        rows, headers, tablefmt="github", disable_numparse=True, stralign="right"
    )


def tuning_section(tuning: Tuning) -> list[str]:
    """The table with what it says, as lines of a Markdown document."""
    return [
        "## Chosen by tuning",
        "",
        "For each the setting with the best validation metrics after the last epoch, by their mean "
        "relative change from equal weights as shipped; a parameter that is not given has its "
        f"default. All trials have the seed {tuning.seed}, which none of the runs above has.",
        "",
        tuning_table(tuning),
        "",
    ]


def tuning_results(tuning: Tuning) -> dict[str, Any]:
    """All that the tuning found and that is the same when it is run again."""

    def of(trial: Trial) -> dict[str, Any]:
        return {
            "learning_rate": trial.learning_rate,
            "parameters": dict(trial.parameters),
            "validation_change": trial.score,
            "failure": trial.failure,
            "epochs": trial.epochs,
        }

    return {
        "seed": tuning.seed,
        "chosen": {name: of(tuning.chosen(name)) for name in tuning.trials},
        "trials": {name: [of(trial) for trial in row] for name, row in tuning.trials.items()},
    }


def _number_of_trials(trials: Any) -> str:
    pruned = sum(trial.failure == PRUNED for trial in trials)
    failed = sum(trial.failure is not None for trial in trials) - pruned
    kinds = [f"{number} {word}" for number, word in ((failed, "failed"), (pruned, PRUNED))]
    noted = [kind for kind in kinds if not kind.startswith("0 ")]
    return f"{len(trials)} ({', '.join(noted)})" if noted else str(len(trials))


def _percent(trial: Trial) -> str:
    return (trial.failure or "") if trial.score is None else f"{100 * trial.score:+.2f}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(entry)}" for key, entry in value.items()) + "}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
