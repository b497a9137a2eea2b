"""``python -m experiments COMMAND``; ``--help`` after any part of it says more."""

import contextlib
import difflib
import functools
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from experiments import quickstart
from experiments.benchmarks import convergence, head, step
from experiments.benchmarks.compiled import compile_
from experiments.benchmarks.scale import scale
from experiments.faces.align import align
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

# A mistake of the user is one message; this shows where it was raised.
TRACEBACK = "EXPERIMENTS_TRACEBACK"
CLONE = Path(__file__).parents[1]


def quickstart_(out: Path = quickstart.OUT) -> int:
    """Trains softmax and L-Softmax on scikit-learn's digits; prints a table, draws a picture.

    Args:
      out: folder of the results and the picture.
    """
    with loop.interruptible() as stop:
        return quickstart.run(out, stop)


def train_(
    config: Named,
    data: Path | None = None,
    out: Path = loop.RUNS,
    devices: int | None = None,
    checkpoint_seconds: float = 60.0,
    meeting: Annotated[Meeting, tyro.conf.arg(name="")] = ALONE,
) -> int:
    """Trains one configuration, or continues it, and writes its result.

    On many hosts run the same command in every process, with --out on a file system that all of
    them see. On SLURM run one process a GPU:

        srun --ntasks-per-node=8 --gpus-per-node=8 python -m experiments train mnist-m4 --cluster

    On Cloud TPU give --cluster on every host. Anywhere else give this on host number I of N:

        python -m experiments train mnist-m4 --coordinator HOST0:9876 --processes N --process I

    If a process is lost, the others end too. The same command then continues from the last
    checkpoint, on any number of processes and devices.

    Args:
      config: the configuration. Flags change it, and the result records every change. Of the
        paper's numbers a public source has the confirmed ones, none the recalled ones.
      data: folder of NAME.npz or of TFDS; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      out: folder of the results.
      devices: how many to train on, the first ones; by default all.
      checkpoint_seconds: seconds between two checkpoints.
    """
    with joined(meeting), loop.interruptible() as stop:
        outcome = train.run(
            config,
            folder=data,
            out=out,
            devices=devices,
            checkpoint_seconds=checkpoint_seconds,
            stop=stop,
        )
        if outcome is None or outcome["status"] == "diverged":
            return loop.exit_code(outcome)
        label = "reduced run, " if outcome["reduced"] else ""
        console = Console()
        title = f"{run_name(config)}, {label}last iterate"
        console.print(table(title, {split: outcome[split] for split in ("train", "test")}))
        console.print(
            f"{outcome['images_per_second']:.0f} images/s on {outcome['device']}, "
            f"{100 * outcome['outside_step']:.1f} % of the loop's time outside the step"
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
    Annotated[Any, tyro.conf.subcommand("head", constructor=postponed(head.bench))]
    | Annotated[Any, tyro.conf.subcommand("step", constructor=postponed(step.bench))]
    | Annotated[Any, tyro.conf.subcommand("convergence", constructor=postponed(convergence.bench))]
)


def bench(benchmark: Benchmark) -> None:
    """Measures what a margin costs and which λ trains; writes a table and a JSON."""
    benchmark()


COMMANDS: dict[str, Callable[..., Any]] = {
    "quickstart": quickstart_,
    "list": scoreboard,
    "train": train_,
    "evaluate": evaluate,
    "reproduce": reproduce,
    "campaign": campaign,
    "tune": tune,
    "report": report,
    "figures": figures,
    "train-faces": train_faces,
    "embed": embed,
    "verify": verify_faces,
    "align": align,
    "pairs": pairs,
    "bench": bench,
    "scale": scale,
    "compile": compile_,
}


def check_name(arguments: list[str]) -> None:
    """Raises ValueError, with names alike, if a command is given no configuration there is."""
    match arguments:
        case ["train" | "tune" as command]:
            raise ValueError(f"{command}: name a configuration, such as mnist-m4; list prints all")
        case ["train" | "tune" as command, name, *_] if name[:1] != "-" and name not in CONFIGS:
            alike = difflib.get_close_matches(name, CONFIGS, 3, 0.5)
            meant = f"; did you mean {', '.join(alike)}?" if alike else ""
            raise ValueError(f"{command}: no configuration {name!r}{meant} list prints all")


CONSTRUCTORS = ConstructorRegistry()


@CONSTRUCTORS.primitive_rule
def path_in_help(argument: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """Paths as everywhere, but help names a default in the clone from the clone's folder on."""
    if argument.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: Path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path).removeprefix(f"{CLONE}/")],
    )


class Kept(io.StringIO):
    """Keeps what is printed, in the encoding and colours of the terminal that it is for."""

    encoding = sys.stdout.encoding

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


def parsed(arguments: list[str]) -> Callable[[], Any]:
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
                prog="python -m experiments",
                description=__doc__,
                args=arguments,
                config=(tyro.conf.CascadeSubcommandArgs, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        # tyro frames what a configuration says, under a name that means nothing to its user. An
        # argument's own mistake it calls by its flag.
        by_tyro = stop.__context__
        refused = by_tyro.__context__ if by_tyro is not None else None
        if isinstance(refused, ValueError) and isinstance(getattr(by_tyro, "arg", None), str):
            raise refused from None
        # The usage line of help has all the configurations that help lists below.
        print(out.getvalue().replace(f"{{{','.join(CONFIGS)}}}", "CONFIGURATION"), end="")
        sys.stderr.write(said.getvalue())
        raise


def main(arguments: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no locale makes λ an error
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        check_name(arguments)
        return parsed(arguments)() or 0
    except BrokenPipeError:
        # Whoever reads, `head` say, has seen enough. Python would flush once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        if TRACEBACK in os.environ:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if TRACEBACK in os.environ:
            raise
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return loop.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
