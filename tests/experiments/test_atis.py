import collections
import json

import jax
import numpy as np
import optax
import pytest

import mtl_jax
from experiments.networks.text import PADDING, RecurrentEncoder, mean_over_text
from experiments.problems import build_problem
from experiments.problems.atis import FILES

CITIES = ["boston", "denver", "dallas", "san francisco", "st. louis", "oakland"]
VERBS = {
    "flight": "show flights",
    "airfare": "how much is it",
    "flight#airfare": "flights and fares",
}
PARTS = {"show": "VERB", "flights": "NOUN", "fares": "NOUN", "from": "ADP", "to": "ADP"}


def sentence(intent, start, goal, tagged=True):
    words, slots = VERBS[intent].split(), ["O"] * len(VERBS[intent].split())
    for word, kind, city in (("from", "fromloc", start), ("to", "toloc", goal)):
        parts = city.split()
        words += [word, *parts]
        slots += ["O", f"B-{kind}.city_name", *[f"I-{kind}.city_name"] * (len(parts) - 1)]
    found = {"tokens": words, "slots": slots, "intent": f"atis_{intent}", "ud_id": "1"}
    return found | ({"upos": [PARTS.get(word, "PROPN") for word in words]} if tagged else {})


def sentences():
    pairs = [(a, b) for a in CITIES for b in CITIES if a != b]
    train = [
        sentence(intent, *pair, tagged=number % 3 > 0)
        for number, pair in enumerate(pairs)
        for intent in VERBS
    ]
    train.append(sentence("flight", "tampa", "boston"))  # words that occur only once
    dev = [sentence("airfare", *pair, tagged=number > 3) for number, pair in enumerate(pairs[:7])]
    test = [
        sentence("flight", "denver", "boston"),
        {"tokens": ["coach", "to", "tampa"], "slots": ["B-class_type", "O", "B-toloc.city_name"]}
        | {"intent": "atis_abbreviation", "upos": ["INTJ", "ADP", "PROPN"]},
        sentence("flight#airfare", "san francisco", "st. louis", tagged=False),
    ]
    test[-1]["tokens"] += ["please"] * 3  # the longest of all sentences is none of training
    test[-1]["slots"] += ["O"] * 3
    return {"train": train, "validation": dev, "test": test}


def write(folder, splits):
    for part, name in FILES.items():
        lines = "".join(json.dumps(one) + "\n" for one in splits[part])
        (folder / name).write_text(lines, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return build_problem("atis", write(tmp_path_factory.mktemp("atis"), sentences()))


@pytest.fixture(scope="module")
def start(problem):
    return jax.jit(problem.init)(jax.random.key(0))


def names(task):
    """The classes as the problem has them: those of the training sentences go before others."""
    found = []
    for split in sentences().values():
        values = {
            name
            for one in split
            for name in ([one["intent"]] if task == "intent" else one.get(task, []))
        }
        found += sorted(values - set(found))
    return found


def test_the_fields_are_the_words_and_labels_of_the_files(problem):
    for part, split in sentences().items():
        data = getattr(problem, part)
        assert data["ids"].shape == (len(split), 12)
        for row, one in enumerate(split):
            number = len(one["tokens"])
            assert (data["ids"][row, :number] != PADDING).all()
            assert (data["ids"][row, number:] == PADDING).all()
            assert names("intent")[data["intent"][row]] == one["intent"]
            for task in ("slots", "upos"):
                labels = data[task][row]
                assert [names(task)[label] for label in labels if label >= 0] == one.get(task, [])
                assert (labels[len(one.get(task, [])) :] == -1).all()


def test_words_have_one_id_and_rare_ones_that_of_the_unknown(problem):
    counts = collections.Counter(word for one in sentences()["train"] for word in one["tokens"])
    words = collections.defaultdict(set)
    for part, split in sentences().items():
        for row, one in zip(getattr(problem, part)["ids"], split, strict=True):
            for id_, word in zip(row.tolist(), one["tokens"], strict=False):
                words[id_].add(word)
    assert words.pop(1) == {"tampa", "coach", "please"}
    assert sorted(words) == list(range(2, 2 + len(words)))
    assert {word for (word,) in words.values()} == {w for w, count in counts.items() if count > 1}


def test_what_no_training_sentence_has_counts_as_wrong(problem, start):
    outputs = jax.jit(problem.predict)(*start, problem.test)
    right = {}
    for task, unseen in {"intent": 1, "slots": 1, "upos": 1}.items():
        number = len(names(task)) - unseen
        assert outputs[task].shape == (*problem.test[task].shape, len(names(task)))
        assert (outputs[task][..., number:] == -np.inf).all()
        assert np.isfinite(outputs[task][..., :number]).all()
        label = problem.test[task]
        right[task] = np.eye(len(names(task)))[np.where((label < 0) | (label >= number), 0, label)]
    counted = problem.counted(problem.test, {"": np.full(3, True)})
    found = {}
    for name, task in problem.tasks.items():
        (metric,), label = task.metrics, problem.labels(problem.test)[name]
        statistics = metric.statistics(right[name], label, counted[name])
        found[name] = metric.over([(statistics, counted[name])])
    # Right wherever the network can be. Of six entities one is of a new type, and an entity of
    # class 0 is in its place; one word of the nine with a part of speech is an interjection.
    assert found == pytest.approx({"intent": 2 / 3, "slots": 5 / 6, "upos": 8 / 9})


def test_losses_against_their_definition(problem, start):
    params, state = start
    key = jax.random.key(1)
    batch = {field: values[:9] for field, values in problem.train.items()}
    losses, _ = jax.jit(problem.losses)(params, state, key, batch)
    z = np.asarray(jax.jit(problem.encoder)(params, state, key, batch)[0], np.float64)
    heads = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["heads"])

    def entropy(task, vector, label):
        logits = vector @ heads[task]["kernel"] + heads[task]["bias"]
        return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]

    values = collections.defaultdict(list)
    for row in range(9):
        number = int((batch["ids"][row] != PADDING).sum())
        mean = z[row, :number].mean(axis=0)
        values["intent"].append(entropy("intent", mean, batch["intent"][row]))
        for task in ("slots", "upos"):
            for place in range(number):
                if batch[task][row, place] != -1:
                    values[task].append(entropy(task, z[row, place], batch[task][row, place]))
    assert len(values["upos"]) < len(values["slots"])
    for task, loss in losses.items():
        np.testing.assert_allclose(loss, np.mean(values[task]), rtol=1e-5)


def test_a_task_without_labels_in_the_batch_has_loss_zero(problem, start):
    batch = {field: values[:9] for field, values in problem.train.items()}
    batch["upos"] = np.full_like(batch["upos"], -1)

    def upos(params):
        return problem.losses(params, {}, jax.random.key(1), batch)[0]["upos"]

    loss, gradient = jax.jit(jax.value_and_grad(upos))(start[0])
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    assert problem.present(batch) == {"intent": True, "slots": True, "upos": False}


def test_problem_trains(problem, start):
    params, state = start
    key = jax.random.key(2)
    batch = {field: values[:64] for field, values in problem.train.items()}
    z, _ = jax.jit(problem.encoder)(params, state, key, batch)
    mtl_jax.check_heads(problem.heads, params, z, batch, tasks=list(problem.tasks))
    optimizer = problem.optimizer(0.01, 20)

    def total(params, key):
        losses, _ = problem.losses(params, state, key, batch)
        return sum(losses.values()), losses

    def step(carry, key):
        params, opt_state = carry
        gradient, losses = jax.grad(total, has_aux=True)(params, key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), losses

    carry, keys = (params, optimizer.init(params)), jax.random.split(key, 20)
    _, history = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(carry)
    for task, values in history.items():
        assert np.isfinite(values).all()
        assert values[-1] < 0.8 * values[0], task


def test_dropout_is_of_the_training_alone(problem, start):
    params, state = start
    batch = {field: values[:9] for field, values in problem.train.items()}
    encode = jax.jit(problem.encoder)
    one, other = (np.asarray(encode(params, state, jax.random.key(i), batch)[0]) for i in (0, 1))
    assert (one != other).any()
    present = batch["ids"] != PADDING
    assert 0.1 < np.mean(one[present] == 0) < 0.3
    once, again = (jax.jit(problem.predict)(params, state, batch) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)


def test_the_same_data_at_every_call(problem, tmp_path):
    assert build_problem("atis", write(tmp_path, sentences())).digest() == problem.digest()


def test_what_is_wrong_with_the_files_is_said(tmp_path):
    for folder in (None, str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(FileNotFoundError, match=r"train.jsonl, dev.jsonl.*--data-dir") as error:
            build_problem("atis", folder)
        assert str(folder) in str(error.value)
    splits = sentences()
    for change, message in (
        ({"slots": ["O"]}, r"dev.jsonl, line 2: 8 tokens have 1 slots"),
        ({"upos": []}, r"dev.jsonl, line 2: 8 tokens have 0 upos"),
    ):
        wrong = splits["validation"][:]
        wrong[1] = wrong[1] | change
        with pytest.raises(ValueError, match=message):
            build_problem("atis", write(tmp_path, splits | {"validation": wrong}))
    with pytest.raises(ValueError, match=r"test.jsonl, line 1: tokens, slots and intent"):
        build_problem("atis", write(tmp_path, splits | {"test": [{"tokens": ["a"]}]}))
    write(tmp_path, splits)
    for line, message in (
        ("3", "line 4: tokens, slots and intent are wanted; got 3"),
        ("{", "line 4 is not JSON: Expecting property name"),
        ('{"tokens": [], "slots": [], "intent": "a"}', "line 4: there are no tokens"),
        ('{"tokens": ["a"], "slots": null, "intent": "a"}', "line 4: tokens, slots and intent"),
    ):
        lines = [json.dumps(one) for one in splits["test"]]
        (tmp_path / "test.jsonl").write_text("\n".join([*lines, line]))
        with pytest.raises(ValueError, match=message):
            build_problem("atis", str(tmp_path))


def test_data_without_parts_of_speech(problem, tmp_path):
    splits = {
        part: [{key: value for key, value in one.items() if key != "upos"} for one in sentences_of]
        for part, sentences_of in sentences().items()
    }
    splits["train"][0]["upos"] = None
    for name in FILES.values():
        write(tmp_path, splits)
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
    without = build_problem("atis", str(tmp_path))
    assert list(without.tasks) == ["intent", "slots"]
    params, model_state = without.init(jax.random.key(0))
    batch = {field: values[:8] for field, values in without.train.items()}
    assert set(without.predict(params, model_state, batch)) == {"intent", "slots"}
    assert set(without.present(batch)) == {"intent", "slots"}
    for field in ("ids", "intent", "slots"):
        np.testing.assert_array_equal(without.train[field], problem.train[field])


def test_recurrent_encoder_against_its_definition():
    ids = np.array([[3, 1, 4, 2], [2, 5, PADDING, PADDING]])
    encoder = RecurrentEncoder(6, embedding=3, width=2, dropout=0.5)
    variables = jax.jit(encoder.init)(jax.random.key(0), ids)
    z = np.asarray(jax.jit(encoder.apply)(variables, ids))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    table = params["Embed_0"]["embedding"]

    def states(cell, vectors):
        def dense(name, x):
            return x @ cell[name]["kernel"] + cell[name].get("bias", 0)

        h, found = np.zeros(2), []
        for x in vectors:
            r = 1 / (1 + np.exp(-dense("ir", x) - dense("hr", h)))
            u = 1 / (1 + np.exp(-dense("iz", x) - dense("hz", h)))
            h = (1 - u) * np.tanh(dense("in", x) + r * dense("hn", h)) + u * h
            found.append(h)
        return found

    for row, number in enumerate((4, 2)):
        vectors = table[ids[row, :number]]
        forward = states(params["GRUCell_0"], vectors)
        backward = states(params["GRUCell_1"], vectors[::-1])[::-1]
        expected = np.concatenate([forward, backward], axis=1)
        np.testing.assert_allclose(z[row, :number], expected, rtol=1e-5)
        assert (z[row, number:] == 0).all()
        mean = np.asarray(mean_over_text(z, ids))[row]
        np.testing.assert_allclose(mean, expected.mean(axis=0), rtol=1e-5)
    assert (np.asarray(mean_over_text(z, np.zeros_like(ids))) == 0).all()
