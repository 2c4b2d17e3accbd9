"""The command `fusedloss`: doctor, bench, demo."""

import argparse
import dataclasses
import json
import sys
from importlib import util

from rich.console import Console
from rich.progress import Progress

# Tables are laid out for this many columns where there is no terminal to ask.
COLUMNS = 120


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0, or 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="fusedloss", description="Fused loss kernels for TensorFlow and Keras 3."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what is installed, what runs, and what to do")
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser("bench", help="speed, memory and error against stock Keras")
    bench.add_argument("case", nargs="?", default="", metavar="CASE", help="default: all of them")
    bench.add_argument("--shape", help="of the predictions, such as 1024x32000")
    bench.add_argument("--dtype", help="of the predictions, such as bfloat16")
    bench.add_argument("--json", metavar="FILE", help="write everything that was measured")
    bench.add_argument("--plot", metavar="FILE", help="draw the ratios (png, svg, pdf)")
    bench.add_argument("--quick", action="store_true", help="fewer rounds: rougher numbers")
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="one Keras model trained twice, on real data")
    demo.add_argument("--epochs", type=int, default=10)
    demo.add_argument("--plot", metavar="FILE", default="fusedloss-demo.png")
    demo.set_defaults(run=_demo)

    arguments = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else COLUMNS, highlight=False)
    try:
        return arguments.run(arguments, console)
    except UsageError as error:
        parser.error(str(error))


class UsageError(Exception):
    """A command line that makes no sense; the text says what would."""


def _needs(module: str, extra: str) -> None:
    if not util.find_spec(module):
        raise UsageError(
            f"{module} is not installed; get it with: python -m pip install 'fusedloss[{extra}]'"
        )


def _doctor(arguments, console) -> int:
    from fusedloss import doctor

    return doctor.run(console)


def _demo(arguments, console) -> int:
    _needs("sklearn", "demo")
    _needs("matplotlib", "demo")
    if arguments.epochs < 1:
        raise UsageError(f"--epochs must be at least 1, got {arguments.epochs}")
    from fusedloss import demo

    return demo.run(arguments.epochs, arguments.plot, console)


def _settings(arguments):
    """(case, setting) pairs that the command line asks for."""
    from fusedloss import bench
    from fusedloss.cases import CASES, Setting, select

    try:
        cases = select(arguments.case)
    except KeyError:
        raise UsageError(f"no case {arguments.case!r}; there are: {', '.join(CASES)}") from None
    if arguments.shape is None and arguments.dtype is None:
        return [(case, setting) for case in cases for setting in case.settings]
    given = None
    if arguments.shape is not None:
        try:
            given = bench.parse_shape(arguments.shape)
        except ValueError:
            raise UsageError(
                f"--shape is positive sizes such as 1024x32000, got {arguments.shape!r}"
            ) from None
        taken = [case for case in cases if case.rank == len(given)]
        if not taken:
            takes = [f"{case.name} takes predictions of rank {case.rank}" for case in cases]
            raise UsageError(f"--shape has {len(given)} sizes; {', '.join(takes)}")
        cases = taken
    pairs = []
    for case in cases:
        shape, dtype = given or case.settings[0].shape, arguments.dtype or "float32"
        if dtype not in case.dtypes:
            raise UsageError(
                f"--dtype {dtype!r} is not one of {case.name}: {', '.join(case.dtypes)}"
            )
        known = [s for s in case.settings if (s.shape, s.dtype) == (shape, dtype)]
        pairs.append((case, known[0] if known else Setting(shape, dtype)))
    return pairs


def _bench(arguments, console) -> int:
    if arguments.plot:
        _needs("matplotlib", "demo")
    from fusedloss import bench, bench_memory, bench_report

    pairs = _settings(arguments)
    machine = bench.machine()
    console.print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    rounds = bench.QUICK_ROUNDS if arguments.quick else bench.ROUNDS
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(pairs) + 1)
        for case, setting in pairs:
            progress.update(task, description=f"{case.name} {setting.shape} {setting.dtype}")
            results.append(bench.measure(case, setting, rounds))
            progress.advance(task)
        progress.update(task, description="peak memory")
        bench_memory.add_peak_memory(results)
    for result in results:
        console.print(bench_report.timings_table(result))
    console.print(bench_report.LEGEND)
    console.print(bench_report.goals_table(results))
    if arguments.json:
        with open(arguments.json, "w") as file:
            records = [dataclasses.asdict(result) for result in results]
            json.dump({"machine": machine, "results": records}, file, indent=1)
    if arguments.plot:
        bench_report.plot(results, arguments.plot)
    return 0
