"""``python -m experiments COMMAND``; ``--help`` after any part of it says more."""

import contextlib
import difflib
import functools
import io
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.text import Text
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from experiments import quickstart
from experiments.benchmarks import budget, convergence, head, open_set, step
from experiments.benchmarks.compiled import compile_
from experiments.faces.align import align
from experiments.faces.comparison import compare_faces
from experiments.faces.embed import embed
from experiments.faces.pairs import pairs
from experiments.faces.train import train_faces
from experiments.faces.verify import verify_faces
from experiments.paper.cells import CONFIGS, Named, run_name
from experiments.paper.measures import table
from experiments.report.figures import figures
from experiments.report.report import report
from experiments.report.scoreboard import scoreboard
from experiments.run import loop, train
from experiments.run.abreast import campaign
from experiments.run.queue import reproduce
from experiments.run.tune import tune
from experiments.store.processes import ALONE, Meeting, joined

# A user's mistake is one message. With this variable Python prints the traceback, too.
TRACEBACK = "EXPERIMENTS_TRACEBACK"
PROG = "python -m experiments"
LISTED = f"{PROG} list prints all"
# In a terminal of one column tyro needs minutes to write its help.
NARROWEST = 40
LARGEST = 2**31 - 1


def train_(
    config: Named,
    place: Annotated[loop.Place, tyro.conf.arg(name="")] = loop.HERE,
    meeting: Annotated[Meeting, tyro.conf.arg(name="")] = ALONE,
) -> int:
    """Trains one configuration, or continues it, and writes its result.

    On many hosts run the same command in every process, with --out on a file system that all of
    them see. On SLURM run one process a GPU:

        srun --ntasks-per-node=8 --gpus-per-node=8 \\
            python -m experiments train mnist-m4 --cluster

    On Cloud TPU give --cluster on every host. Anywhere else give this on host number I of N:

        python -m experiments train mnist-m4 \\
            --coordinator HOST0:9876 --processes N --process I

    If a process is lost, the others end too. The same command then continues from the last
    checkpoint, on any number of processes and devices.

    Args:
      config: the configuration. Flags change it, and the result records every change. A number
        of the paper is confirmed where a public source has it, and recalled where none has.
    """
    with joined(meeting), loop.interruptible() as stop:
        outcome = train.run(config, **place._asdict(), stop=stop)
        if outcome is None or outcome["status"] == "diverged":
            return loop.exit_code(outcome)
        label = "reduced run, " if outcome["reduced"] else ""
        elsewhere = "" if place.out == loop.RUNS else f" --out {shlex.quote(str(place.out))}"
        console = Console()
        title = f"{run_name(config)}, {label}last iterate"
        console.print(table(title, {split: outcome[split] for split in ("train", "test")}))
        console.print(
            f"{outcome['images_per_second']:.0f} images/s on {outcome['device']}, "
            f"{100 * outcome['outside_step']:.1f} % of the loop's time outside the step\n"
            f"{PROG} list{elsewhere} shows the result beside the paper's"
        )
        return 0


def evaluate(
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    data: Path | None = None,
    out: Path = loop.RUNS,
    devices: int | None = None,
) -> None:
    """Measures the last checkpoint of a run, finished or not.

    Args:
      run: name of the run, such as mnist-m4/seed0.
      data: folder of NAME.npz or of TFDS; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      out: folder of the results.
      devices: how many to compute on, the first ones; by default all.
    """
    step, measured = train.evaluate_run(out / run, data, devices)
    Console().print(table(f"{run} at step {step}", measured))


def postponed(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """Binds the arguments without the call, whose errors tyro would take for its own."""

    @functools.wraps(function)
    def bound(**arguments: Any) -> Callable[[], Any]:
        return functools.partial(function, **arguments)

    return bound


Benchmark = (
    Annotated[Any, tyro.conf.subcommand("all", constructor=postponed(budget.bench))]
    | Annotated[Any, tyro.conf.subcommand("head", constructor=postponed(head.bench))]
    | Annotated[Any, tyro.conf.subcommand("step", constructor=postponed(step.bench))]
    | Annotated[Any, tyro.conf.subcommand("convergence", constructor=postponed(convergence.bench))]
    | Annotated[Any, tyro.conf.subcommand("open-set", constructor=postponed(open_set.bench))]
)


def bench(benchmark: Benchmark) -> int:
    """Measures what a margin costs and which λ trains; writes a table and a JSON."""
    return int(benchmark() or 0)


COMMANDS: dict[str, Callable[..., Any]] = {
    "quickstart": quickstart.run,
    "list": scoreboard,
    "train": train_,
    "evaluate": evaluate,
    "reproduce": reproduce,
    "campaign": campaign,
    "tune": tune,
    "report": report,
    "figures": figures,
    "train-faces": train_faces,
    "compare-faces": compare_faces,
    "embed": embed,
    "verify": verify_faces,
    "align": align,
    "pairs": pairs,
    "bench": bench,
    "compile": compile_,
}


# These save checkpoints and continue from them.
CONTINUED = {"train", "reproduce", "campaign", "tune", "train-faces", "compare-faces"}
BENCHMARKS = ("all", "head", "step", "convergence", "open-set")
NAMES = {(): COMMANDS, ("bench",): BENCHMARKS, ("train",): CONFIGS, ("tune",): CONFIGS}
KINDS = {(): "command", ("bench",): "benchmark"}


def check_name(arguments: list[str]) -> None:
    """Raises ValueError, with the commands that may be meant, for a name that is unknown."""
    for before, names in NAMES.items():
        if tuple(arguments[: len(before)]) != before:
            continue
        name, *rest = arguments[len(before) :] or [""]
        command, kind = " ".join([PROG, *before]), KINDS.get(before, "configuration")
        if name.startswith("-") or name in names:
            continue
        if not name and before not in KINDS:
            raise ValueError(f"{before[0]}: name a configuration, such as mnist-m4; {LISTED}")
        if name:
            alike = difflib.get_close_matches(name, names, 3, 0.5)
            meant = [shlex.join([*command.split(), other, *rest]) for other in alike]
            hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
            listed = LISTED if names is CONFIGS else f"{command} --help prints all"
            raise ValueError(f"no {kind} {name!r}{hint}; {listed}")


CONSTRUCTORS = ConstructorRegistry()


@CONSTRUCTORS.primitive_rule
def bounded_integer(argument: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Integers that JAX's int32 holds: steps, seeds, classes and all else that is counted."""
    if argument.type is not int:
        return None

    def read(words: list[str]) -> int:
        value = int(words[0]) if len(words[0]) < 20 else LARGEST + 1
        if abs(value) > LARGEST:
            raise ValueError(f"must be an integer of at most {LARGEST}, got {words[0]:.40}")
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


class Kept(io.StringIO):
    """Keeps what is printed, in the colours of the terminal that it is for."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


def parsed(arguments: list[str]) -> functools.partial[Any]:
    """The command with its arguments.

    Raises:
      ValueError: a configuration refuses a value.
      SystemExit: anything else that tyro takes for a mistake, or help; it has said which.
    """
    out, said = Kept(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said), CONSTRUCTORS:
            return tyro.extras.subcommand_cli_from_dict(
                {name: postponed(function) for name, function in COMMANDS.items()},
                prog=PROG,
                description=__doc__,
                args=arguments,
                config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        # tyro would show a configuration's own error under an internal name, so show the error
        # alone. For an argument tyro names the flag.
        by_tyro = stop.__context__
        refused = by_tyro.__context__ if by_tyro is not None else None
        if isinstance(refused, ValueError) and isinstance(getattr(by_tyro, "arg", None), str):
            raise refused from None
        # The usage line repeats all the names that help lists below. tyro wraps only its boxes;
        # the console wraps the other lines.
        said_out = out.getvalue()
        for listed, word in ((CONFIGS, "CONFIGURATION"), (COMMANDS, "COMMAND")):
            said_out = said_out.replace(f"{{{','.join(listed)}}}", word)
        Console().print(Text.from_ansi(said_out))
        sys.stderr.write(said.getvalue())
        raise


def prepare_streams() -> None:
    """Makes printing safe in locales without λ and in terminals of few columns."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


def say(text: str) -> None:
    """Prints a line on the standard error, unless that is closed."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    prepare_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        check_name(arguments)
        command = parsed(arguments)
        code = command() or 0
        sys.stdout.flush()
        return int(code)
    except BrokenPipeError:
        code = 1  # the reader, such as `head`, has closed the pipe
    except (ValueError, OSError, ImportError) as error:
        if TRACEBACK in os.environ:
            raise
        say(f"error: {error}")
        code = 2
    except KeyboardInterrupt:
        if TRACEBACK in os.environ:
            raise
        continues = "; the same command continues from the last checkpoint"
        say("interrupted" + (continues if CONTINUED & {*arguments[:1]} else ""))
        code = loop.INTERRUPTED
    try:
        sys.stdout.flush()
    except OSError:
        # Python flushes again when it exits, and would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to be interrupted
    sys.exit(code)
