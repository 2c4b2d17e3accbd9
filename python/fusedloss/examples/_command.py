"""The command line of the examples."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from fusedloss.cli import COLUMNS


def main(run: Callable, description: str) -> None:
    """Calls `run(quick, folder, console)` with what the command line says."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps: rougher results")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=Path())
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else COLUMNS, highlight=False)
    run(arguments.quick, arguments.output, console)
