"""The look of the pictures."""

from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape

ORANGE, BLUE, GREY, GREEN = "#e0912f", "#1f6f8b", "#8c8c8c", "#5b8c3a"


def plain(axes, title: str, x: str, y: str) -> None:
    """Titles and a frame without its upper and right sides, the y axis from 0."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)


def image(axes, pixels, title: str = "", **options) -> None:
    """An image without ticks."""
    axes.imshow(pixels, **options)
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def save(figure: Figure, path: Path, console: Console) -> None:
    figure.savefig(path, dpi=150)
    console.print(f"Picture: {escape(str(path))}")
