"""torchtitan's trainer under every data-parallel layout, and the options that are refused."""

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys

import pytest

from scripts.run.errors import InputError
from scripts.tools import patches, torchtitan_options
from scripts.tools.config_check import refusals
from tests.support.runs import ROOT

# layout: ranks, replicate degree, shard degree, samples a rank and microbatch
LAYOUTS = {
    "one rank": (1, 1, 1, 4),
    "one rank, two microbatches": (1, 1, 1, 2),
    "FSDP": (2, 1, 2, 2),
    "DDP": (2, 2, 1, 2),
    "DDP, two microbatches": (2, 2, 1, 1),
    "HSDP": (4, 2, 2, 1),
}
SAMPLES, SEQ_LEN, VOCABULARY = 4, 32, 64


def one_step(
    name: str, ranks: int, replicate: int, shard: int, local_batch: int
) -> dict[str, float]:
    """Take torchtitan's own first step on SAMPLES fixed samples; returns its loss and grad_norm.

    Runs in each rank. Every layout gets the same weights and the same global batch.
    """
    import torch
    from torch.distributed.tensor import DTensor, distribute_tensor
    from torchtitan.config import JobConfig
    from torchtitan.train import Trainer

    config = JobConfig()
    config.model.name, config.model.flavor = name, "tiny"
    config.training.seq_len, config.training.local_batch_size = SEQ_LEN, local_batch
    config.training.global_batch_size = SAMPLES
    config.training.mixed_precision_param = "float32"
    config.training.max_norm = 1e9  # no clipping: the norm is the gradients'
    config.parallelism.data_parallel_replicate_degree = replicate
    config.parallelism.data_parallel_shard_degree = shard
    if name == "tiny":
        config.activation_checkpoint.mode = "none"
    config.comm.trace_buf_size = 0
    config.metrics.log_freq = 1
    trainer = Trainer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model_parts[0].parameters():
            whole = torch.randn(parameter.shape, generator=generator) * 0.1
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            parameter.copy_(whole)
        if name == "tied":
            ends = trainer.model_parts[0].hf
            assert ends.get_output_embeddings().weight is ends.get_input_embeddings().weight
    tokens = torch.randint(VOCABULARY, (SAMPLES, SEQ_LEN + 1), generator=generator)
    rank = int(os.environ["RANK"])
    mine = tokens[rank * SAMPLES // ranks : (rank + 1) * SAMPLES // ranks].split(local_batch)
    seen = {}

    def log(step, loss, largest, grad_norm, **_):
        seen.update(loss=loss, grad_norm=grad_norm)

    trainer.metrics_processor.log = log
    trainer.step = 1
    trainer.train_step(({"input": part[:, :-1]}, part[:, 1:]) for part in mine)
    return seen


def compare() -> None:
    """Run one_step in every layout, ranks forked after the imports; prints {layout: numbers}, those
    of torchtitan's Llama, and under "tied …" those of a tied model of transformers."""
    import tempfile
    from pathlib import Path

    patches.torchtitan(world=2)
    from torchtitan.models.llama3 import get_train_spec
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.protocols.train_spec import register_train_spec

    from scripts.tools.torchtitan_model import train_spec
    from tests.support.families import write_family

    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": VOCABULARY, "max_seq_len": 64}
    arguments = {"tiny": TransformerModelArgs(**sizes)}
    ours = {"build_tokenizer_fn": None, "build_dataloader_fn": None, "model_args": arguments}
    register_train_spec("tiny", dataclasses.replace(get_train_spec(), **ours))
    sizes = {"vocab_size": VOCABULARY, "tie_word_embeddings": True}
    folder = write_family("qwen2", Path(tempfile.mkdtemp()) / "model", **sizes)
    tied = dataclasses.replace(train_spec("decoder", "tiny", folder), **{**ours, "model_args": {}})
    tied.model_args = train_spec("decoder", "tiny", folder).model_args
    register_train_spec("tied", tied)
    found = {}
    cases = [(spec, name) for spec in ("tiny", "tied") for name in LAYOUTS]
    for spec, name in cases:
        layout = LAYOUTS[name]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(layout[0]), "LOCAL_WORLD_SIZE": str(layout[0])}
        reader, writer = os.pipe()
        children = []
        for rank in range(layout[0]):
            if (pid := os.fork()) == 0:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                numbers = one_step(spec, *layout)
                if rank == 0:
                    os.write(writer, json.dumps(numbers).encode())
                os._exit(0)
            children.append(pid)
        os.close(writer)
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * layout[0], name
        found[name if spec == "tiny" else f"tied {name}"] = json.loads(os.read(reader, 10_000))
    print(json.dumps(found))


if __name__ == "__main__":
    compare()


@pytest.fixture(scope="module")
def first_steps():
    """{layout: loss and grad_norm} of the first step of torchtitan's trainer, on gloo."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["", "tied "])
def test_every_layout_has_the_gradients_of_one_rank(first_steps, model, layout):
    reference = first_steps[f"{model}one rank"]
    assert first_steps[f"{model}{layout}"] == pytest.approx(reference, rel=1e-4)


# --- options that are refused ---


def options(**changes):
    """A JobConfig that passes, with changes given as section__option=value."""
    from torchtitan.config import JobConfig

    config = JobConfig()
    config.checkpoint.enable, config.checkpoint.last_save_model_only = True, False
    for name, value in changes.items():
        *sections, option = name.split("__")
        owner = config
        for section in sections:
            owner = getattr(owner, section)
        setattr(owner, option, value)
    return config


OF_A_DECODER = [  # those that torchtitan's own models take
    (
        2,
        {
            "parallelism__tensor_parallel_degree": 2,
            "training__mixed_precision_param": "float32",
        },
        "tensor_parallel_degree must be 1",
    ),
    (1, {"model__converters": ["quantize.linear.float8"]}, "--model.name llama3 or qwen3"),
    (2, {"parallelism__context_parallel_degree": 2}, "context_parallel_degree must be 1"),
]
REFUSED = [  # ranks, changes, words of the refusal
    (2, {"parallelism__pipeline_parallel_degree": 2}, "#2972"),
    (2, {"parallelism__expert_parallel_degree": 2}, "dense"),
    (1, {"parallelism__expert_tensor_parallel_degree": 2}, "dense"),
    (1, {"parallelism__expert_parallel_comm_backend": "deepep"}, "dense"),
    (1, {"debug__moe_force_load_balance": True}, "dense"),
    (1, {"parallelism__enable_async_tensor_parallel": True}, "compile.enable"),
    (1, {"compile__enable": True}, "cannot be resumed"),
    (1, {"fault_tolerance__enable": True}, "torchft is not installed"),
    (1, {"memory_estimation__enable": True}, "ignores it"),
    (1, {"comm__mode": "fake_backend"}, "without exchanging anything"),
    (1, {"optimizer__early_step_in_backward": True}, "training.max_norm"),
    (1, {"checkpoint__enable": False}, "must be true, not false"),
    (1, {"checkpoint__load_only": True}, "step 0"),
    (1, {"checkpoint__last_save_model_only": True}, "could not be resumed"),
    (1, {"checkpoint__last_save_in_hf": True}, "writes the Hugging Face directory itself"),
    (1, {"checkpoint__create_seed_checkpoint": True}, "create_seed_checkpoint must be false"),
    (1, {"checkpoint__load_step": 3}, "the newest is taken"),
    (1, {"checkpoint__initial_load_in_hf_quantized": True}, "ignores it"),
    (1, {"checkpoint__keep_latest_k": 2}, "at least 3"),
    (1, {"activation_checkpoint__mode": "memory_budget"}, 'use "full"'),
    (1, {"metrics__enable_wandb": True}, "wandb is not installed"),
    (1, {"model__converters": ["quantize.grouped_mm.mx"]}, "dense"),
    (1, {"quantize__linear__float8__emulate": True}, "does nothing without --model.converters"),
    (2, {"parallelism__tensor_parallel_degree": 2}, "mixed_precision_param is ignored"),
    (3, {"parallelism__data_parallel_shard_degree": 2}, "is not GPUS × NODES = 3"),
    (3, {"parallelism__tensor_parallel_degree": 2}, "is not GPUS × NODES = 3"),
    (2, {"training__global_batch_size": 24}, "no multiple of"),
]
REFUSED_ON_A_CPU = [
    (2, {"parallelism__context_parallel_degree": 2}, "no kernel for a CPU"),
    (2, {"training__enable_cpu_offload": True}, "nothing to offload"),
    (1, {"checkpoint__async_mode": "async_with_pinned_mem"}, 'use "async"'),
    (1, {"model__converters": ["quantize.linear.float8"]}, "float8.emulate"),
    (1, {"model__converters": ["quantize.linear.mx"]}, "needs a GPU"),
    (1, {"profiling__enable_profiling": True}, "asks for a GPU"),
    (1, {"profiling__enable_memory_snapshot": True}, "a GPU's memory"),
]
CASES = [(*case, on_cpu) for case in REFUSED for on_cpu in (True, False)]
CASES += [(*case, True) for case in REFUSED_ON_A_CPU]


@pytest.mark.parametrize(("world", "changes", "words", "on_cpu"), CASES)
def test_an_option_that_does_harm_or_nothing_is_refused(world, changes, words, on_cpu):
    found = torchtitan_options.problems(options(**changes), world, on_cpu)
    assert len(found) == 1, found
    assert words in found[0]


@pytest.mark.parametrize(("world", "changes", "words"), OF_A_DECODER)
def test_what_transformers_models_have_no_form_of_is_refused(world, changes, words):
    config = options(**changes)
    assert torchtitan_options.problems(config, world, on_cpu=False) == []
    config.model.name = "decoder"
    found = torchtitan_options.problems(config, world, on_cpu=False)
    assert len(found) == 1, found
    assert words in found[0]


def test_every_refusal_has_a_case():
    tried = {name.replace("__", ".") for _, changes, *_ in CASES for name in changes}
    assert tried >= {*torchtitan_options.WORKS, *torchtitan_options.GPU_ALONE}


@pytest.mark.parametrize(("world", "changes", "words"), REFUSED_ON_A_CPU)
def test_what_a_cpu_lacks_is_left_to_a_gpu(world, changes, words):
    assert torchtitan_options.problems(options(**changes), world, on_cpu=False) == []


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {}),
        (2, {"parallelism__data_parallel_replicate_degree": 2}),
        (4, {"parallelism__data_parallel_replicate_degree": 2, "training__global_batch_size": 64}),
        (4, {"parallelism__tensor_parallel_degree": 2, "activation_checkpoint__mode": "full"}),
        (
            2,
            {
                "parallelism__tensor_parallel_degree": 2,
                "training__mixed_precision_param": "float32",
            },
        ),
        (1, {"training__dtype": "bfloat16", "checkpoint__async_mode": "async"}),
        (
            1,
            {
                "model__converters": ["quantize.linear.float8"],
                "quantize__linear__float8__emulate": True,
            },
        ),
    ],
)
def test_what_trains_and_resumes_is_accepted(world, changes):
    assert torchtitan_options.problems(options(**changes), world, on_cpu=True) == []


def test_all_problems_are_reported_at_once():
    found = torchtitan_options.problems(
        options(compile__enable=True, comm__mode="fake_backend", checkpoint__enable=False), 1, True
    )
    assert len(found) == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--training.step", "5"], "--training.step, 5; did you mean --training.steps\\?"),
        (["--training.steps", "x"], "Error parsing --training.steps: .*'x' \\(all"),
        (["training.steps=4"], "Unrecognized options: training.steps=4 "),
    ],
)
def test_what_torchtitan_refuses_is_named(words, told):
    with pytest.raises(InputError, match=f"torchtitan refuses ARGS .*{told}"):
        torchtitan_options.parse(["--metrics.log_freq", "2", *words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "--limitt", "3"], "unrecognized arguments: --limitt 3; did you mean --limit"),
        (["run", "--limit", "x"], "argument --limit: invalid int value: 'x'$"),
        (["run", "--nothing"], "unrecognized arguments: --nothing$"),
    ],
)
def test_what_argparse_refuses_is_named(words, told):
    parser = argparse.ArgumentParser()
    parser.add_subparsers().add_parser("run").add_argument("--limit", type=int)
    with pytest.raises(InputError, match=f"lm-eval refuses ARGS .*{told}"), refusals("lm-eval"):
        parser.parse_args(words)
    with pytest.raises(SystemExit):  # outside of it argparse is as it was
        parser.parse_args(words)
