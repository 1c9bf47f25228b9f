"""Check the network between the nodes of an allocation: its speed, its transport, its slow nodes.

A cluster runs it: python -m scripts.nccl_check runs/<run>/nccl-check
"""

from scripts.job.main import run
from scripts.job.parent import Parent
from scripts.run import files
from scripts.run.errors import InputError
from scripts.tools import fabric, fabric_verdict


def main(stage: Parent) -> dict:
    """Say what the ranks have measured. Raises InputError if the site asked for a network that was
    not used."""
    (stage.directory / fabric.REPORT).unlink(missing_ok=True)  # an earlier attempt's
    stage.ranks()
    report = files.read_json(stage.directory / fabric.REPORT)
    for line in fabric_verdict.lines(report):
        stage.shown.say(line)
    if report["problems"]:
        raise InputError(report["problems"])
    return {"inputs": {}, "outputs": {}, "summary": report}


if __name__ == "__main__":
    run(main, fabric.check)
