"""What of a user's rows is trained on, held out and dropped; that it goes on after a kill."""

import json
import os
import random

import pytest

from scripts.corpus import passes, pool, recipe, table, writer
from scripts.corpus import prepare as preparing
from scripts.corpus.chat import Chat
from scripts.corpus.holdout import words
from scripts.run.errors import InputError
from tests.support.models import make_model
from tests.support.runs import digest_tree
from tests.support.sets import (
    SYSTEM,
    answer,
    asked,
    chats,
    pairs,
    preparation,
    prepare,
    read_set,
    write_rows,
)


def prepared(tmp_path, rows, **settings):
    """Make sets of rows; return the manifest and the folder."""
    source = write_rows(tmp_path / "rows.jsonl", rows)
    return prepare(tmp_path / "stage", source, **settings)


def kept(manifest, name):
    """Count the rows of a set, trained on and held out."""
    return manifest["rows"][name], manifest["rows"][f"heldout_{name}"]


# --- situations of people: each row is used whole, for what it is


def test_one_system_prompt_in_every_chat(tmp_path):
    rows = [{"messages": [SYSTEM, *row["messages"]]} for row in chats()]
    manifest, out = prepared(tmp_path, rows)
    assert kept(manifest, "sft") == (220, 20)
    for row in read_set(out, "sft") + read_set(out, "heldout_sft.jsonl"):
        assert row["messages"][0] == {**SYSTEM, "weight": 1}
    assert manifest["dropped"] == {}


def test_one_instruction_in_every_row(tmp_path):
    instruction = "Read this sentence of the village's chronicle with care and say its mood."
    rows = [
        {
            "instruction": instruction,
            "input": answer(n)["content"],
            "output": ("good", "bad")[n % 2],
        }
        for n in range(240)
    ]
    manifest, _ = prepared(tmp_path, rows)
    assert kept(manifest, "sft") == (220, 20)
    assert manifest["rows"]["heldout_choice"] == 0, "labels are no multiple choice"


def test_one_prompt_for_all(tmp_path):
    """No hash of it can tell rows apart: whole rows are held out."""
    rows = [{"prompt": "Write a line.", "completion": answer(n)["content"]} for n in range(240)]
    assert kept(prepared(tmp_path, rows)[0], "sft") == (220, 20)


def test_a_stock_phrase_in_chats_of_many_turns(tmp_path):
    stock = "Thank you for asking, I am a careful assistant and will now answer as well as I can. "
    rows = []
    for n in range(240):
        said = {"role": "assistant", "content": stock + answer(n)["content"]}
        rows.append({"messages": [asked(n), said, asked(n + 1000), answer(n + 1000)]})
    manifest, out = prepared(tmp_path, rows)
    assert kept(manifest, "sft") == (220, 20)
    assert {len(row["messages"]) for row in read_set(out, "sft")} == {4}


@pytest.mark.parametrize("shape", ["whole", "split", "system"])
def test_pairs(tmp_path, shape):
    rows = pairs()
    if shape != "split":
        before = [SYSTEM] if shape == "system" else []
        sides = ("chosen", "rejected")
        rows = [{s: before + row["prompt"] + row[s] for s in sides} for row in rows]
    manifest, out = prepared(tmp_path, rows)
    assert kept(manifest, "preference") == (220, 20)
    first = read_set(out, "preference")[0]
    assert [t["role"] for t in first["chosen"]][-2:] == ["user", "assistant"]
    assert first["chosen"][:-1] == first["rejected"][:-1]


def test_null_columns_and_mixed_rows(tmp_path):
    rows = [{**row, "text": None} for row in chats()] + [{"messages": None, "text": "A text."}]
    manifest, _ = prepared(tmp_path, rows)
    assert kept(manifest, "sft") == (220, 20)
    assert kept(manifest, "text") == (1, 0)


def test_weights_and_labels_are_respected(tmp_path):
    no, yes = ({"role": "assistant", "content": text} for text in ("WRONG one", "Right, it is"))
    masked = [{"messages": [asked(n), {**no, "weight": 0}, asked(n), yes]} for n in range(900, 906)]
    bad = [{"messages": [asked(n), no], "label": False} for n in range(800, 806)]
    manifest, out = prepared(tmp_path, chats() + masked + bad, duplicates="keep")
    assert sum(kept(manifest, "sft")) == 246
    assert manifest["dropped"] == {"a bad answer (label) without a good one to its prompt": 6}
    turns = [
        t for row in read_set(out, "sft") for t in row["messages"] if t["content"] == "WRONG one"
    ]
    assert turns, "the masked turns are read"
    assert {t["weight"] for t in turns} == {0}, "and never learned"


def judged(numbers):
    """Return a good and a bad answer to each question."""
    return [
        {"prompt": asked(n)["content"], "completion": text, "label": label}
        for n in numbers
        for text, label in ((answer(n)["content"], True), (answer(n + 500)["content"], False))
    ]


def test_judged_answers_become_pairs_where_both_exist(tmp_path):
    manifest, out = prepared(tmp_path, judged(range(60)))
    assert sum(kept(manifest, "preference")) == 60
    assert sum(kept(manifest, "sft")) == 60
    assert manifest["dropped"] == {}
    row = read_set(out, "preference")[0]
    n = next(n for n in range(60) if asked(n)["content"] == row["chosen"][0]["content"])
    assert row["chosen"][1]["content"] == answer(n)["content"]
    assert row["rejected"][1]["content"] == answer(n + 500)["content"]
    assert [row["paired"] for row in manifest["files"]] == [60, 0]
    assert "bad answers of pairs 60" in "".join(table.lines(manifest, "sets"))


def test_pairs_of_judged_answers_have_their_sources_weight_and_validation(tmp_path):
    given = write_rows(tmp_path / "held.jsonl", judged(range(100, 130)))
    manifest, out = prepared(tmp_path, judged(range(60)), weight=2, validation=str(given))
    assert kept(manifest, "preference") == (60, 30)
    assert kept(manifest, "sft") == (60, 30)
    assert len(read_set(out, "preference")) == 120, "each twice"
    assert manifest["dropped"] == {}
    bad = {answer(n + 500)["content"] for n in range(60)}
    assert not bad & {row["messages"][-1]["content"] for row in read_set(out, "sft")}


def test_half_an_emoji_is_counted_and_named(tmp_path):
    rows = [*chats(), {"text": "half \ud83d"}]
    manifest, out = prepared(tmp_path, rows)
    assert sum(kept(manifest, "sft")) == 240
    (dropped,) = read_set(out, "dropped.jsonl")
    assert dropped["where"].endswith("rows.jsonl: line 241")
    assert "surrogate" in dropped["reason"]


def test_multiple_choice_is_kept_as_such(tmp_path):
    rows = [
        {"question": asked(n)["content"], "choices": ["yes", "no", "maybe"], "answer": n % 3}
        for n in range(100)
    ]
    manifest, out = prepared(tmp_path, rows)
    assert manifest["rows"]["heldout_choice"] == 20
    for row in read_set(out, "heldout_choice.jsonl"):
        assert row["shuffled_question"] != row["question"]


# --- what is held out, and what is removed


def test_two_answers_to_one_question_stay_on_one_side(tmp_path):
    rows = [{"messages": [asked(n), answer(n + 300 * k)]} for n in range(200) for k in (0, 1)]
    _, out = prepared(tmp_path, rows, validation=0.1)
    questions = [
        {row["messages"][0]["content"] for row in read_set(out, name)}
        for name in ("sft", "heldout_sft.jsonl")
    ]
    assert not questions[0] & questions[1]


def test_what_is_held_out_does_not_depend_on_the_order(tmp_path):
    rows = chats(400)
    first = read_set(prepared(tmp_path / "1", rows)[1], "heldout_sft.jsonl")
    random.Random(0).shuffle(rows)
    second = read_set(prepared(tmp_path / "2", rows)[1], "heldout_sft.jsonl")
    assert sorted(map(json.dumps, first)) == sorted(map(json.dumps, second))


def test_a_held_out_answer_elsewhere_is_found(tmp_path):
    again = [
        {"messages": [{"role": "user", "content": f"Say it again, case {n}."}, answer(n)]}
        for n in range(240)
    ]
    manifest, out = prepared(tmp_path, chats() + again, max_dropped=0.2)
    assert 20 <= sum(manifest["dropped"].values()) <= 45
    held = {
        " ".join(words(r["messages"][-1]["content"])) for r in read_set(out, "heldout_sft.jsonl")
    }
    trained = {" ".join(words(row["messages"][-1]["content"])) for row in read_set(out, "sft")}
    assert not held & trained


def test_duplicates_are_dropped_counted_and_can_be_kept(tmp_path):
    twice = chats() + chats(10)
    manifest, _ = prepared(tmp_path / "drop", twice)
    assert manifest["dropped"] == {"a duplicate of another row": 10}
    manifest, _ = prepared(tmp_path / "keep", twice, duplicates="keep")
    assert manifest["dropped"] == {}
    assert sum(kept(manifest, "sft")) == 250


def test_validation_of_the_users_own(tmp_path):
    given = write_rows(tmp_path / "held.jsonl", chats(30)[20:])
    manifest, out = prepared(tmp_path, chats(), validation=str(given))
    assert kept(manifest, "sft") == (230, 10)
    assert sum(manifest["dropped"].values()) == 10, "training rows that VALIDATION has, too"
    assert len(read_set(out, "heldout_sft.jsonl")) == 10


def test_validation_may_not_be_a_source(tmp_path):
    source = write_rows(tmp_path / "chats/a.jsonl", chats())
    with pytest.raises(InputError, match=r"a.jsonl: is in DATA, too"):
        prepare(tmp_path / "stage", source.parent, validation=str(source))


def test_more_dropped_than_allowed_stops(tmp_path):
    with pytest.raises(InputError) as problem:
        prepared(tmp_path, chats() + chats())
    said = str(problem.value)
    assert "dropped 240 of 480 rows: a duplicate of another row" in said
    assert 'ARGS="max_dropped=0.51"' in said
    manifest, _ = prepared(tmp_path / "asked", chats() + chats(), max_dropped=0.51)
    assert sum(kept(manifest, "sft")) == 240


# --- lengths, in the model's own tokens


def long_chats(count):
    return [
        {"messages": [asked(n), {"role": "assistant", "content": "long " * 300}]}
        for n in range(count)
    ]


def test_a_long_row_is_dropped_cut_or_refused(tmp_path):
    rows = chats()
    rows[7] = {"messages": [*rows[7]["messages"], *long_chats(1)[0]["messages"]]}
    manifest, _ = prepared(tmp_path / "drop", rows)
    assert manifest["dropped"] == {"longer than 256 tokens": 1}
    manifest, out = prepared(tmp_path / "cut", rows, too_long="cut", validation=0.0)
    assert manifest["dropped"] == {}
    assert {len(row["messages"]) for row in read_set(out, "sft")} == {2}
    with pytest.raises(InputError, match="line 8: longer than 256 tokens"):
        prepared(tmp_path / "refuse", rows, too_long="refuse", validation=0.0)


def test_two_long_rows_among_twenty_held_out_are_chance(tmp_path):
    """A sample of twenty says little: all rows are counted before the stage is stopped."""
    rows = chats()
    held = read_set(prepared(tmp_path / "first", rows)[1], "heldout_sft.jsonl")
    for row in held[:3]:
        at = next(
            n
            for n, r in enumerate(rows)
            if r["messages"][0]["content"] == row["messages"][0]["content"]
        )
        rows[at] = {
            "messages": [rows[at]["messages"][0], {"role": "assistant", "content": "long " * 300}]
        }
    manifest, _ = prepared(tmp_path / "second", rows)
    assert manifest["dropped"] == {"held out, but longer than 256 tokens": 3}
    assert manifest["files"][0]["held"] == manifest["rows"]["heldout_sft"] == len(held) - 3


def test_a_recipe_may_name_its_validation(tmp_path):
    (tmp_path / "config.yaml").write_text(f"validation: {tmp_path}/held.jsonl\n")
    found = recipe.read(tmp_path / "config.yaml", [], {})
    assert found.validation == f"{tmp_path}/held.jsonl"


def test_only_long_rows_stop_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="longer than 256 tokens"):
        prepared(tmp_path, long_chats(240), duplicates="keep", max_dropped=0.5)
    assert not list((tmp_path / "stage/sets.partial/out/sft").iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 400}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    return make_model(tmp_path_factory.mktemp("tiny"), **sizes)


def test_a_models_own_tokenizer_and_template_are_used(tmp_path, model):
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    )
    manifest, out = prepared(tmp_path, chats(), model=model)
    assert not (out / "tokenizer").exists()
    shown = (out / "sample.txt").read_text()
    assert shown.startswith("USER: Which ")
    assert "ASSISTANT: ⟦The " in shown
    chat = Chat(model)
    sizes = []
    for row in read_set(out, "sft"):
        texts = [piece.text for piece in chat.pieces(row["messages"])]
        sizes.append(sum(map(len, chat.encode(texts))))
    assert manifest["lengths"]["chat"]["tokens"] == sum(sizes)
    assert manifest["lengths"]["chat"]["most"] == max(sizes)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "prefix"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes an answer"),
        ("{% for m in messages %}{{ m.content ", "chat template: "),
    ],
)
def test_a_template_that_does_not_show_the_answer_is_refused(tmp_path, model, template, why):
    (model / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=why):
        prepared(tmp_path, chats(), model=model)


def test_a_template_that_refuses_a_row_drops_it(tmp_path, model):
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.role }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    rows = [*chats(), {"messages": [SYSTEM, *chats(1000)[-1]["messages"]]}]
    manifest, _ = prepared(tmp_path, rows, model=model)
    assert manifest["dropped"] == {"the chat template refuses it": 1}


# --- any size: parts, kills, other files


@pytest.fixture
def small_parts(monkeypatch):
    """Cut the input into many units, all in this process."""
    monkeypatch.setattr(preparing, "UNIT", (4000, 4000))


@pytest.mark.parametrize("name", ["look", "collect", "compare", "write"])
def test_a_kill_anywhere_changes_nothing(tmp_path, monkeypatch, small_parts, name):
    source = write_rows(
        tmp_path / "rows.jsonl", chats(300) + [{"text": f"Text {n}." * 9} for n in range(99)]
    )
    whole, out = prepare(tmp_path / "whole", source)
    assert len(list((tmp_path / "whole/sets.partial/look").glob("*.json"))) > 8
    phase, function = pool.PASSES[name]

    def dies(work, number):
        if number == 5:
            raise KeyboardInterrupt
        function(work, number)

    monkeypatch.setitem(pool.PASSES, name, (phase, dies))
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "killed", source)
    finished = {
        p: p.stat().st_mtime_ns for p in (tmp_path / f"killed/sets.partial/{name}").iterdir()
    }
    assert finished
    monkeypatch.setitem(pool.PASSES, name, (phase, function))
    again, other = prepare(tmp_path / "killed", source)
    assert again == whole
    assert digest_tree(other) == digest_tree(out)
    done = [path for path in finished if path.suffix == ".json"]
    assert all(path.stat().st_mtime_ns == finished[path] for path in done), "done work is kept"


def test_several_processes_make_the_same(tmp_path, monkeypatch, small_parts):
    source = write_rows(tmp_path / "rows.jsonl", chats(300))
    _, out = prepare(tmp_path / "one", source)
    monkeypatch.setattr(pool, "SMALL", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    _, other = prepare(tmp_path / "two", source)
    assert digest_tree(other) == digest_tree(out)


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "rows.jsonl", chats())

    def grow(work, number):
        writer.write(work, number)
        write_rows(source, chats(300))

    monkeypatch.setitem(pool.PASSES, "write", ("writes", grow))
    with pytest.raises(InputError, match=r"rows.jsonl: has changed while it was read"):
        prepare(tmp_path / "stage", source)
    monkeypatch.undo()
    with pytest.raises(InputError, match="has changed while it was read"):
        prepare(tmp_path / "stage", source)


def test_other_settings_begin_anew(tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", chats())
    first = preparation(tmp_path / "stage", source)
    first.prepared.begin()
    first.run("look")
    manifest, _ = prepare(tmp_path / "stage", source, validation=0.5)
    assert kept(manifest, "sft") == (120, 120)


def test_a_weight_is_how_often_a_row_stands(tmp_path):
    manifest, out = prepared(tmp_path, chats(), weight=2.5, validation=0.0)
    rows = [json.dumps(row) for row in read_set(out, "sft")]
    assert len(set(rows)) == 240
    assert 570 < len(rows) < 630
    assert {rows.count(row) for row in rows} == {2, 3}
    assert manifest["lengths"]["chat"]["rows"] == len(rows)
    manifest, out = prepared(tmp_path / "less", chats(), weight=0.5, validation=0.0)
    row = manifest["files"][0]
    assert 100 < row["left_out"] < 140
    assert row["kept"]["chat"] == 240 - row["left_out"]
    assert f"left out by its weight {row['left_out']}" in "".join(table.lines(manifest, "sets"))


def test_rows_that_are_not_understood_are_refused_or_dropped(tmp_path):
    rows = [*chats(), {"body": "x"}, {"body": "y"}]
    with pytest.raises(InputError) as problem:
        prepared(tmp_path / "1", rows)
    assert "line 241: columns body fit no shape" in problem.value.problems[0]
    assert "line 242" in problem.value.problems[1]
    assert "bad_rows=drop" in problem.value.problems[-1]
    manifest, _ = prepared(tmp_path / "2", rows, bad_rows="drop")
    assert manifest["dropped"] == {"not understood": 2}
    said = next(line for line in table.lines(manifest, "sets") if "first not understood" in line)
    assert "line 241: columns body fit no shape" in said


# --- the recipe


@pytest.mark.parametrize(
    ("text", "arguments", "facts", "why"),
    [
        ("too_lang: drop", [], {}, "too_lang: no such key; did you mean too_long?"),
        ("too_long: keep", [], {}, "too_long: keep: one of drop, cut, refuse"),
        ("validation: 3", [], {}, "validation: 3: a share from 0 to 1"),
        ("derive: true", [], {"VALIDATION": "0.1"}, "holds out its own; leave VALIDATION out"),
        ("", ["too_long"], {}, "ARGS: too_long: give key=value"),
        ("", ["seeds=3"], {}, "seeds: no such key"),
        ("", ["max_seq_len=x"], {}, "max_seq_len: x: a number of tokens"),
        ("sources: [{paht: a}]", [], {}, "paht: no such key; did you mean path?"),
        ("sources: [{path: a, wieght: 2}]", [], {}, "wieght: no such key; did you mean weight?"),
        ("sources: [[a]]", [], {}, "sources: ['a']: give a path"),
        ("columns: {promt: q}", [], {}, "promt is no name of ours; did you mean prompt?"),
        ("columns: q", [], {}, "columns: q: give {our name"),
        ("sources: [{path: a, weight: -1}]", [], {}, "weight: above 0"),
        ("a: [", [], {}, "not YAML"),
        ("- a", [], {}, "key: value lines"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path, text, arguments, facts, why):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError) as problem:
        recipe.read(tmp_path / "config.yaml", arguments, facts)
    assert why in str(problem.value)


def test_arguments_and_facts_win_over_the_recipe(tmp_path):
    (tmp_path / "config.yaml").write_text("too_long: cut\nvalidation: 0.1\nseed: 1\n")
    facts = {"VALIDATION": "0.2", "COLUMNS": "prompt=question, chosen=best"}
    found = recipe.read(tmp_path / "config.yaml", ["too_long=drop", "max_seq_len=null"], facts)
    assert (found.too_long, found.validation, found.seed) == ("drop", 0.2, 1)
    assert found.max_seq_len is None
    assert found.columns == {"prompt": "question", "chosen": "best"}


def test_units_are_told_by_their_bytes(tmp_path, small_parts):
    source = write_rows(tmp_path / "rows.jsonl", chats(300))
    made = preparation(tmp_path / "stage", source)
    sizes = [pool.size(made.prepared.work, n) for n in made.prepared.numbers]
    assert sum(sizes) == source.stat().st_size
    assert passes.Work is type(made.prepared.work)


def test_the_same_data_gives_the_same_bytes_in_any_run(tmp_path):
    text = "\n\n".join(
        f"Traveller {n} came by village {n * 7} in spring. It rained." for n in range(900)
    )
    (tmp_path / "book.txt").write_text(text)
    rows = [
        {"prompt": f"Which one is {n}?", "completion": text, "label": label}
        for n in range(60)
        for text, label in (("yes", True), ("long " * 300, False))
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    for name, settings in (("book.txt", {"derive": True}), ("rows.jsonl", {"max_dropped": 1.0})):
        made = [prepare(tmp_path / run, tmp_path / name, **settings) for run in ("a", "b")]
        assert made[0][0] == made[1][0]
        assert digest_tree(made[0][1]) == digest_tree(made[1][1])
        assert str(tmp_path / "a") not in (made[0][1] / "dropped.jsonl").read_text()


def test_a_recipe_may_derive_from_a_text(tmp_path):
    sentences = (
        f"Traveller {n} crossed the river near village {n * 7} in spring." for n in range(900)
    )
    text = "".join(s + ("\n\n" if n % 12 == 0 else " ") for n, s in enumerate(sentences))
    (tmp_path / "book.txt").write_text(text)
    manifest, out = prepare(tmp_path / "stage", tmp_path / "book.txt", derive=True)
    for name in ("text", "sft", "preference", "heldout_choice", "heldout_sft", "heldout_text"):
        assert manifest["rows"][name], f"{name} is empty"
    assert manifest["corpus"].startswith("sha256:")
    held = sum(manifest["rows"][f"heldout_{name}"] for name in ("text", "sft", "preference"))
    assert manifest["files"][0]["held"] == held > 0
    assert read_set(out, "sft")[0]["messages"][0]["content"].startswith("What comes after")
