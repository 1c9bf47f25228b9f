"""The front door behind make: reads the options, runs one verb, turns problems into exit codes.

    python3 -m scripts.launch <verb>     verbs: the stages, pipeline, status, logs, stop, clean, …

Every option comes by environment variable (see `make help`), so quotes and spaces survive make.
Standard library alone, Python 3.9: this runs on a login node with nothing installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace

from scripts.launcher import chat, compare, lineage, manage, models, options, report, start
from scripts.launcher.options import Options
from scripts.run import stages
from scripts.run.errors import DONE, WRONG_INPUT, InputError


def undeploy(asked: Options) -> int:
    """Stop the service of a run."""
    return manage.stop(replace(asked, stage=stages.maker("service").name))


def show_models(asked: Options) -> int:
    """Print the table of the models that have a name."""
    print("\n".join(models.table()))
    return DONE


COMPARE = "compare"
CHANGES: dict[str, Callable[[Options], int]] = {
    "stop": manage.stop,
    "cancel": manage.stop,
    "undeploy": undeploy,
    "rollback": manage.rollback,
    "clean": manage.clean,
}
SHOWS: dict[str, Callable[[Options], int]] = {
    "status": manage.status,
    "logs": report.logs,
    "lineage": lineage.lineage,
    "chat": chat.chat,
    "models": show_models,
}


def show_scores() -> int:
    """Print the scores of the runs that RUN names, with commas between. Raises InputError."""
    names = [name.strip() for name in os.environ.get("RUN", "").split(",") if name.strip()]
    if len(names) < 2:
        raise InputError(f"RUN={','.join(names)}: give two runs or more, as RUN=a,b")
    asked = [options.read(COMPARE, {**os.environ, "RUN": name}) for name in names]
    print(compare.table([one.run for one in asked]))
    return DONE


def run(verb: str) -> int:
    """Run one verb and return its exit code. Raises InputError."""
    verbs = [*options.verbs(), *SHOWS, *CHANGES, COMPARE]
    if verb not in verbs:
        raise InputError(f"{verb or 'no verb'}: unknown; known: {', '.join(verbs)}")
    if verb == COMPARE:
        return show_scores()
    asked = options.read(verb, os.environ)
    if verb in CHANGES and asked.dry_run:
        see = f"make status RUN={asked.run.name} shows what there is"
        raise InputError(f"DRY_RUN=1: {verb} has no dry run; {see}")
    if verb in (*SHOWS, *CHANGES):
        return {**SHOWS, **CHANGES}[verb](asked)
    return start.show(asked) if asked.dry_run else start.start(asked)


def main(arguments: list[str]) -> int:
    """Run the command line; print every problem with its mend. Returns an exit code."""
    try:
        return run(" ".join(arguments))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # its reader has seen enough: make … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except InputError as error:
        found = error.problems
    except OSError as error:  # no permission, a read-only or a full disk, a file in the way
        if error.filename is None:
            raise
        mend = "choose another place for runs with RUNS="
        found = [f"{error.filename}: {error.strerror}; {mend}"]
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
