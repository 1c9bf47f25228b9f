"""The seam between the tools, on random weights: one config.json, one tokenizer, one chat
template."""

import json
import shutil

import pytest

from scripts.run.errors import InputError
from scripts.tools import architecture
from tests.support.logits import assert_same_logits
from tests.support.models import make_model
from tests.support.runs import ROOT

CHAT = [
    {"role": "system", "content": "Be brief.  "},
    {"role": "user", "content": "What does\nos.path.join do? <b>&amp; {{ x }}"},
    {"role": "assistant", "content": " It joins path components. "},
    {"role": "user", "content": "Thanks, ünïcödé 漢字"},
    {"role": "assistant", "content": "Welcome."},
]

SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def born_here(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("debug"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"intermediate_size": 320, "num_key_value_heads": 1},
        {"intermediate_size": 1000, "rope_theta": 500000.0},
        {"max_position_embeddings": 16384, "rope_scaling": SCALED, "rope_theta": 500000.0},
    ],
    ids=["as it is", "narrow", "wide", "llama3 scaling"],
)
def test_torchtitan_torchtune_and_transformers_agree(tmp_path, changes):
    directory = make_model(tmp_path / "model", **changes)
    assert_same_logits(directory, list(range(7, 207)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen3"}, "qwen3"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"head_dim": 100}, "head_dim 100"),
    ],
)
def test_what_cannot_be_expressed_exactly_is_refused_by_name(tmp_path, changes, words):
    config = {**json.loads((ROOT / "configs/models/debug/config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        architecture.read_architecture(tmp_path / "config.json")


def test_torchtitan_cannot_tie(tmp_path):
    config = {
        **json.loads((ROOT / "configs/models/debug/config.json").read_text()),
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot tie"):
        architecture.torchtitan_model_args(tmp_path / "config.json")


@pytest.mark.parametrize("prompt", [False, True])
def test_the_template_renders_the_same_text_in_torchtune_and_transformers(born_here, prompt):
    from transformers import AutoTokenizer

    from scripts.tools.torchtune_tokenizer import ChatTokenizer

    theirs = AutoTokenizer.from_pretrained(born_here)  # what lm-eval and vLLM call
    chat = CHAT[:-1] if prompt else CHAT
    ours = ChatTokenizer(str(born_here)).render(chat, add_generation_prompt=prompt)
    assert ours == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)


def test_only_answers_are_learned_and_the_tokens_are_those_of_serving(born_here):
    from torchtune.data import Message
    from transformers import AutoTokenizer

    from scripts.tools.torchtune_tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer(str(born_here))
    messages = [
        Message(role=m["role"], content=m["content"], masked=m["role"] != "assistant") for m in CHAT
    ]
    ids, mask = tokenizer.tokenize_messages(messages)
    learned = tokenizer.decode([i for i, m in zip(ids, mask) if not m], skip_special_tokens=False)
    assert learned == " It joins path components. <|end_of_turn|>Welcome.<|end_of_turn|>"
    theirs = AutoTokenizer.from_pretrained(born_here)
    served = theirs.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)
    assert ids[: len(served)] == served
    assert ids.count(tokenizer.bos_id) == 1


def test_a_longer_conversation_is_refused_never_cut(born_here):
    from torchtune.data import Message

    from scripts.tools.torchtune_tokenizer import ChatTokenizer

    with pytest.raises(InputError, match="longer than 16"):
        ChatTokenizer(str(born_here), max_seq_len=16).tokenize_messages(
            [Message("user", "long " * 20, masked=True), Message("assistant", "x")]
        )


def test_a_template_that_rewrites_history_is_refused(born_here, tmp_path):
    from torchtune.data import Message

    from scripts.tools.torchtune_tokenizer import ChatTokenizer

    directory = shutil.copytree(born_here, tmp_path / "model")
    (directory / "chat_template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    messages = [Message("user", "a", masked=True), Message("assistant", "b")]
    with pytest.raises(InputError, match="prefix"):
        ChatTokenizer(str(directory)).tokenize_messages(messages)


def test_every_tokenizer_adds_one_bos_to_plain_text(born_here):
    from torchtitan.components.tokenizer import HuggingFaceTokenizer
    from transformers import AutoTokenizer

    from scripts.tools.torchtune_tokenizer import ChatTokenizer

    ours = ChatTokenizer(str(born_here)).encode("a text", add_bos=True, add_eos=True)
    assert HuggingFaceTokenizer(str(born_here)).encode("a text", add_bos=True, add_eos=True) == ours
    assert AutoTokenizer.from_pretrained(born_here).encode("a text") == ours[:-1]
