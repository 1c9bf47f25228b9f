"""The seam between the tools, on random weights: one config.json, one tokenizer, one chat
template."""

import json
import shutil
import subprocess
import sys

import pytest

from scripts.run.errors import InputError
from scripts.tools.decoder import PROVEN
from tests.support.families import FAMILIES, OWN, write_family
from tests.support.logits import assert_same_logits, differences
from tests.support.models import make_model
from tests.support.runs import ROOT

CHAT = [
    {"role": "system", "content": "Be brief.  "},
    {"role": "user", "content": "What does\nos.path.join do? <b>&amp; {{ x }}"},
    {"role": "assistant", "content": " It joins path components. "},
    {"role": "user", "content": "Thanks, ünïcödé 漢字"},
    {"role": "assistant", "content": "Welcome."},
]


@pytest.fixture(scope="module")
def born_here(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("debug"))


OFTEN = {"llama", "llama tied and scaled", "qwen3 tied", "gemma2", "phi3 with a window"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in FAMILIES],
)
def test_every_tool_computes_the_same_logits(tmp_path, name):
    """transformers' own is what is evaluated, and vLLM serves."""
    directory = write_family(name, tmp_path / "model")
    found = differences(directory, list(range(7, 107)), OWN.get(name, ()))
    assert max(found.values()) <= 1e-5, found


@pytest.mark.slow
def test_vllm_serves_what_was_trained(tmp_path):
    """Of heads as wide as its kernels for a CPU want."""
    folders = {}
    for index, (name, (_, odd)) in enumerate(FAMILIES.items()):
        wide = {"head_dim": 32} if "head_dim" in odd else {}
        folders[str(write_family(name, tmp_path / str(index), hidden_size=128, **wide))] = name
    words = [sys.executable, "-m", "tests.support.vllm_logits", *folders]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {folders[f]: off for f, off in json.loads(done.stdout.splitlines()[-1]).items()}
    assert len(found) == len(FAMILIES)
    # vLLM's window of Cohere 2 is one token wider than transformers': as it was trained, it says.
    known = {"cohere2": 5e-3}
    assert {name: off for name, off in found.items() if off > known.get(name, 1e-5)} == {}


def test_proven_families_are_those_that_are_tried():
    assert {kind for kind, _ in FAMILIES.values()} == PROVEN


def test_the_debug_model_is_the_same_in_every_tool(born_here):
    assert_same_logits(born_here, list(range(7, 207)))


@pytest.mark.parametrize(
    ("name", "own", "words"),
    [
        ("llama tied", "llama3", "cannot tie"),
        ("llama with biases", "llama3", "attention_bias true"),
        ("llama scaled", "qwen3", "rope_type 'llama3'"),
        ("mistral with a window", "qwen3", "sliding_window 32"),
        ("gemma", "llama3", "model_type 'gemma'"),
        ("llama", "llama4", "model.name 'llama4': unknown; known: decoder"),
    ],
)
def test_torchtitans_own_models_refuse_what_they_are_not(tmp_path, name, own, words):
    from scripts.tools import patches

    patches.torchtitan_on_cpu()
    from scripts.tools.torchtitan_model import train_spec

    with pytest.raises(InputError, match=words):
        train_spec(own, "x", write_family(name, tmp_path / "model"))


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
