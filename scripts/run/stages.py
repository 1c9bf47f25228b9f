"""The stage table: what each stage reads, makes and needs. The launcher and the clusters ask this
table, never a stage's name, so a new stage is one row here, one script and one file a cluster."""

from __future__ import annotations

from typing import NamedTuple


class StageRow(NamedTuple):
    """Describe one stage to whoever submits, shows or stops it."""

    name: str
    reads: tuple[str, ...]  # "corpus" (DATA as the user has it), "sets" (prepared DATA), "model"
    makes: str  # "sets", "model", "verdict", "service" or "report"
    ranks: bool = False  # starts NODES × GPUS ranks; any other stage is one process
    spreads: bool = False  # that process may run on each of NODES, and share the work
    from_scratch: bool = False  # needs no FROM: the architecture of MODEL is enough
    recipe: str = ""  # the configs/<stage>/<recipe>.* that it takes unless RECIPE says which
    large: str = ""  # the one for a model that is too large for one GPU to train whole
    in_line: bool = True  # belongs to make pipeline
    trains_on: str = ""  # the kind of rows in its sets: text, chat or pair
    tool: str = ""  # whose words <stage>.<tool>.args of a model are, for a recipe of another tool
    without_rows: str = ""  # the recipe that reads none of them
    least_ranks: int = 1  # with fewer there is nothing to do

    @property
    def module(self) -> str:
        """Name its script, as in scripts.<module>; a name may have a -, a module may not."""
        return self.name.replace("-", "_")

    @property
    def has_config(self) -> bool:
        """Tell whether the stage has a config, and takes ARGS."""
        return bool(self.recipe) or "corpus" in self.reads

    @property
    def alone(self) -> bool:
        """Tell whether the stage needs nothing of a run, and waits for nothing in it: each call is
        a run of its own, unless RUN says which."""
        return not self.reads

    @property
    def serves(self) -> bool:
        """Tell whether the stage runs until it is stopped, and answers at an address."""
        return self.makes == "service"


TABLE = (
    StageRow("data", ("corpus", "model"), "sets", spreads=True, from_scratch=True),
    StageRow(
        "pretrain",
        ("sets", "model"),
        "model",
        ranks=True,
        from_scratch=True,
        recipe="full",
        trains_on="text",
    ),
    StageRow(
        "finetune",
        ("sets", "model"),
        "model",
        ranks=True,
        recipe="full",
        large="lora",
        trains_on="chat",
    ),
    StageRow("align", ("sets", "model"), "model", ranks=True, recipe="dpo", trains_on="pair"),
    StageRow(
        "quantize",
        ("sets", "model"),
        "model",
        recipe="int8",
        in_line=False,
        trains_on="chat",
        without_rows="fp8",
    ),
    StageRow("evaluate", ("sets", "model"), "verdict", recipe="heldout"),
    StageRow("deploy", ("model",), "service", recipe="serve"),
    StageRow("nccl-check", (), "report", ranks=True, in_line=False, least_ranks=2),
)


def row(name: str) -> StageRow:
    """Return a stage's row. Raises KeyError for a name that is no stage."""
    return {r.name: r for r in TABLE}[name]


def names() -> list[str]:
    """Name every stage in the order in which one may follow another."""
    return [r.name for r in TABLE]


def line() -> list[str]:
    """Name the stages of the line, in order."""
    return [r.name for r in TABLE if r.in_line]


def maker(product: str) -> StageRow:
    """Return the stage of the line that makes "sets", "verdict" or "service"."""
    return next(r for r in TABLE if r.makes == product and r.in_line)


def trained() -> list[str]:
    """Name the stages that train, in the order in which they hand a model on."""
    return [r.name for r in TABLE if r.makes == "model" and r.ranks]


def makers() -> list[str]:
    """Name the stages that make a model: those that train, and the one that makes it smaller."""
    return [r.name for r in TABLE if r.makes == "model"]


def quantizer() -> StageRow:
    """Return the stage that makes a model smaller, without training."""
    return next(r for r in TABLE if r.makes == "model" and not r.ranks)


def before(name: str) -> list[str]:
    """Name the stages that stand before this one, and that it may wait for."""
    return [] if row(name).alone else names()[: names().index(name)]
