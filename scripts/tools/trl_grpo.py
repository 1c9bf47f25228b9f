"""TRL around the pinned release: its trainer of group relative policy optimisation, checked, run
and reported, with the chats of DATA as prompts and plain functions as rewards.

torchtune's wheel has such a recipe without the modules that it calls.
"""

from __future__ import annotations

import argparse
import functools
import glob
import importlib
import inspect
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.job.rank import Left, Rank
from scripts.run import preflight
from scripts.run.errors import InputError, nearest
from scripts.run.files import read_json
from scripts.run.modeldir import parameter_count
from scripts.tools import trl_checkpoints
from scripts.tools.config_check import unknown
from scripts.tools.data_check import tokenizer_differs
from scripts.tools.decoder import attention, tell_unproven
from scripts.tools.lm_eval import read_yaml

FINAL = "epoch_0"  # below checkpoints: what is handed over, under the name that torchtune gives it


def is_config(config: Path) -> bool:
    """Tell whether a stage's config is TRL's: it names reward functions."""
    return "reward_funcs" in read_yaml(config)


def train(rank: Rank) -> None:
    """Do one rank's work: configuration, checks, training. Raises InputError, and Left when asked
    to stop."""
    source, data = rank.path("FROM"), rank.path("DATA")
    rank.phase("tries the rewards")
    try_rewards(rank, data)
    rank.phase("imports TRL")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(
        rank.directory / "metrics" / f"attempt-{rank.attempt_number}"
    )
    script, settings, model = load_config(rank)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOTrainer

    rewards = [Reward(name, rank.directory) for name in script.reward_funcs]
    rows = prompts(data)
    check(rank, settings, rows)
    for reward in rewards:
        reward.check(rows[0])
    tell_unproven(rank, source)
    rank.phase("loads the model")
    how = {"dtype": model.dtype or "float32", **attention(read_json(source / "config.json"))}
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(source, **how),
        processing_class=AutoTokenizer.from_pretrained(source, padding_side="left"),
        reward_funcs=rewards,
        args=settings,
        train_dataset=rows,
    )
    watcher = trl_checkpoints.watcher(rank, trainer)
    trainer.add_callback(watcher)
    trainer.train(resume_from_checkpoint=trl_checkpoints.newest(rank))
    if watcher.left:
        raise Left
    if rank.first:
        rank.phase("saves")
        whole = trainer.accelerator.unwrap_model(trainer.model)
        whole.save_pretrained(rank.directory / "checkpoints" / FINAL)
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def try_rewards(rank: Rank, data: Path) -> None:
    """Call the user's own rewards with the first chat of DATA, before TRL and torch are imported
    for half a minute. Raises InputError."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--reward_funcs", "--reward-funcs", nargs="+")
    try:
        names = parser.parse_known_args(rank.arguments)[0].reward_funcs
    except argparse.ArgumentError:
        return  # TRL says what is wrong
    names = names or read_yaml(rank.config)["reward_funcs"]
    for file in sorted((data / "sft").glob("*.jsonl"))[:1]:
        with open(file, encoding="utf-8") as lines:
            first = [row(json.loads(line)) for line in itertools.islice(lines, 1)]
        for name in names if isinstance(names, list) else []:
            if first and not name.startswith("trl."):
                Reward(name, rank.directory).check(first[0])


def load_config(rank: Rank) -> tuple[Any, Any, Any]:
    """Parse the frozen YAML, what the run decides and the user's arguments, with TRL's own parser.

    Returns its GRPOScriptArguments, GRPOConfig and ModelConfig. Raises InputError.
    """
    import torch
    from trl.scripts.grpo import make_parser

    if found := wrong_keys(rank.config, rank.arguments):
        raise InputError(found)
    here = ["--config", str(rank.config), "--output_dir", str(rank.directory / "checkpoints")]
    if not torch.cuda.is_available():
        here += ["--bf16", "False", "--use_cpu", "True"]
    try:
        script, settings, model, _ = make_parser().parse_args_and_config([*here, *rank.arguments])
    except (SystemExit, ValueError, TypeError) as error:
        said = "" if isinstance(error, SystemExit) else f" {error};"
        raise InputError(
            f"TRL refuses ARGS or what the model sets ({rank.directory / 'args.json'}):{said} "
            f"its words: {rank.log}"
        ) from None
    words = {word.partition("=")[0].replace("-", "_") for word in rank.arguments}
    if "__reward_funcs" in words and "__reward_weights" not in words:
        settings.reward_weights = None  # the recipe's weigh its own functions; these count alike
    weights, named = settings.reward_weights, script.reward_funcs
    if weights and len(weights) != len(named):
        raise InputError(f"reward_weights: {len(weights)} of them, for {len(named)} reward_funcs")
    # What its own script reads, and this stage does not: it would be ignored.
    ignored = {
        "use_peft": model.use_peft,
        **{name: on for name, on in vars(model).items() if name.startswith("load_in_")},
        "model_name_or_path": model.model_name_or_path,
        "dataset_name": script.dataset_name,
        "reward_model_name_or_path": script.reward_model_name_or_path,
        "eval_strategy": settings.eval_strategy != "no",
        "push_to_hub": settings.push_to_hub,
    }
    found = [
        f"{name}: this stage does not read it; leave it out" for name in ignored if ignored[name]
    ]
    if found:
        raise InputError(found)
    return script, settings, model


def wrong_keys(config: Path, arguments: Sequence[str]) -> list[str]:
    """Return the keys of a config, and the options among a user's words, that TRL does not have."""
    from trl.scripts.grpo import make_parser

    known = {k for kind in make_parser().dataclass_types for k in kind.__dataclass_fields__}
    words = [word[2:].partition("=")[0] for word in arguments if word.startswith("--")]
    keys = {str(config): read_yaml(config), "ARGS": [word.replace("-", "_") for word in words]}
    return [f"{w}: {unknown(k, known)}" for w, ks in keys.items() for k in ks if k not in known]


def prompts(data: Path) -> Sequence[dict[str, Any]]:
    """Read the chats of prepared sets as TRL's rows: "prompt", the turns before the last answer,
    and "answer", that answer's text."""
    from datasets import load_dataset

    # datasets takes [ ] * ? in a path for a pattern.
    files = [glob.escape(str(path)) for path in sorted((data / "sft").glob("*.jsonl"))]
    if not files:
        return []

    chats = load_dataset("json", data_files=files, split="train")
    return chats.map(row, remove_columns=chats.column_names)


def row(chat: dict[str, Any]) -> dict[str, Any]:
    """Return a chat as a row of TRL: what is asked, and the last answer."""
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in chat["messages"]]
    return {"prompt": turns[:-1], "answer": turns[-1]["content"]}


def check(rank: Rank, settings: Any, rows: Sequence[Any]) -> None:
    """Raise InputError with all that data and machine lack."""
    source, data = rank.path("FROM"), rank.path("DATA")
    config, made = read_json(source / "config.json"), read_json(data / "data.json")
    found = tokenizer_differs(made, source)
    if not rows:
        found.append(f"{data}: holds no conversations; their prompts are what is answered")
    longest = made["lengths"]["chat"].get("most", 0) + settings.max_completion_length
    if longest > config["max_position_embeddings"]:
        found.append(
            f"max_completion_length {settings.max_completion_length}: with the longest row of "
            f"{data} that is {longest} tokens, of {config['max_position_embeddings']} in the model"
        )
    copies = 4 + bool(settings.beta)  # weights, gradients, two moments; the parent
    weights = 4 * parameter_count(source)
    found += preflight.disk_problems(rank.directory, 10 * weights, "checkpoints and the model")
    if settings.use_cpu:
        found += preflight.memory_problems(copies * weights, "training here")
    if found:
        raise InputError(found)


class Reward:
    """A function that gives answers their rewards; what goes wrong in it names it and its line."""

    def __init__(self, name: str, folder: Path):
        """Find "<module>.<function>", the module in `folder` or installed. Raises InputError."""
        module, _, function = name.rpartition(".")
        if not module:
            raise InputError(
                f"reward_funcs: {name}: give module.function; TRL's: trl.rewards.{name}"
            )
        self.name = self.__name__ = name
        sys.path.insert(0, str(folder))
        try:
            found = importlib.import_module(module)
        except Exception as error:
            raise InputError(f"reward_funcs: {name}: {self._where(error)}") from None
        finally:
            sys.path.remove(str(folder))
        self.function: Callable[..., Any] = getattr(found, function, None)
        if not callable(self.function):
            own = [n for n, f in inspect.getmembers(found, inspect.isfunction)]
            raise InputError(f"reward_funcs: {name}: no such function; {nearest(function, own)}")
        functools.update_wrapper(self, self.function, updated=())
        self.__name__ = name

    def __call__(self, **given: Any) -> list[float | None]:
        count = len(given["completions"])
        try:
            told = self.function(**given)
            found = [None if value is None else float(value) for value in told]  # None: no word
        except Exception as error:
            raise InputError(f"reward_funcs: {self.name}: {self._where(error)}") from error
        if len(found) != count:
            raise InputError(
                f"reward_funcs: {self.name}: returned {len(found)} numbers for {count} answers"
            )
        return found

    def check(self, row: dict[str, Any]) -> None:
        """Call it once, with a row's own answer, before the model is loaded."""
        said = [[{"role": "assistant", "content": row["answer"]}]]
        given = {"prompts": [row["prompt"]], "completion_ids": [[0]], "answer": [row["answer"]]}
        # What TRL hands to those that ask for it.
        given |= {"trainer_state": None, "log_extra": print, "log_metric": print}
        self(completions=said, **given)

    @staticmethod
    def _where(error: Exception) -> str:
        """Say what went wrong, and in which line of which file."""
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(last.filename).name}, line {last.lineno})"
