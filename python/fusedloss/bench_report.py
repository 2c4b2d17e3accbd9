"""What `fusedloss bench` and `benchmarks/report.py` make of measurements: tables and a plot."""

import numpy as np
from rich.table import Table

from fusedloss.bench import FUSED_FLOAT32, FUSED_PLAIN, MODES, Result, Timing

MODE_TITLES = {"graph": "graph", "xla": "XLA"}
MEMORY_LIMIT_BYTES, MEMORY_LIMIT_ROW_BYTES = 1 << 20, 16


def title(result: Result) -> str:
    return f"{'×'.join(map(str, result.shape))} {result.dtype}, {result.title}"


def ratio(result: Result, timing: Timing) -> float:
    """How many times as long as ours in the same mode."""
    return timing.median_ms / result.fused(timing.mode).median_ms


def _number(value: float | None, digits: int = 3) -> str:
    """`value` with so many significant digits, never as 1e+03."""
    if value is None:
        return "–"
    if value == 0 or abs(value) < 1e-3:
        return f"{value:.0e}" if value else "0"
    return f"{value:.{max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))}f}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def timings_table(result: Result) -> Table:
    """Every form of one setting, losing ones included."""
    traffic_ms = float(np.median(result.traffic_ms)) if result.traffic_ms else None
    table = Table(title=title(result), title_justify="left")
    for heading in (
        "mode", "form", "median ms", "p20", "p80", "GB/s", f"of {result.traffic}", "× ours",
        "extra MiB", "loss err", "grad err",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("mode", "form") else "right")
    for timing in result.timings:
        own_traffic = timing.form != FUSED_FLOAT32
        extra = None if timing.extra_bytes is None else timing.extra_bytes / 2**20
        table.add_row(
            MODE_TITLES[timing.mode],
            timing.form,
            _number(timing.median_ms),
            _number(float(np.percentile(timing.samples_ms, 20))),
            _number(float(np.percentile(timing.samples_ms, 80))),
            # The float32 step of a narrower setting moves other bytes.
            _number(result.traffic_bytes / timing.median_ms / 1e6) if own_traffic else "–",
            f"{traffic_ms / timing.median_ms:.0%}" if traffic_ms and own_traffic else "–",
            _number(ratio(result, timing)),
            _number(extra),
            _error(timing.loss_error),
            _error(timing.gradient_error),
        )
    if traffic_ms:
        table.add_section()
        table.add_row(
            "", f"bare {result.traffic}", _number(traffic_ms),
            _number(float(np.percentile(result.traffic_ms, 20))),
            _number(float(np.percentile(result.traffic_ms, 80))),
            _number(result.traffic_bytes / traffic_ms / 1e6), "100%",
        )  # fmt: skip
    if result.arithmetic_ms:
        table.add_row(
            "", "arithmetic", _number(float(np.median(result.arithmetic_ms))),
            _number(float(np.percentile(result.arithmetic_ms, 20))),
            _number(float(np.percentile(result.arithmetic_ms, 80))),
        )  # fmt: skip
    return table


def verdicts(result: Result) -> list[tuple[str, str, str, bool | None]]:
    """(comparison, measured, asked, met) for every goal; met is None where it was not measured."""
    found = []
    for mode in MODES:
        asked = getattr(result.goal, mode)
        if asked is not None:
            stock = result.fastest_stock(mode)
            times = ratio(result, stock)
            name = f"{stock.form} {MODE_TITLES[mode]}"
            found.append((name, f"{times:.2f}× as fast", f"≥ {asked:g}×", times >= asked))
    if result.goal.floor is not None:
        floor = result.floor_ms()
        for mode in MODES:
            times = result.fused(mode).median_ms / floor if floor else None
            found.append(
                (
                    f"floor, {MODE_TITLES[mode]}",
                    f"{times:.2f}×" if floor else "–",
                    f"≤ {result.goal.floor:g}×",
                    times <= result.goal.floor if floor else None,
                )
            )
    for name, form in (("float32", FUSED_FLOAT32), ("plain", FUSED_PLAIN)):
        asked = getattr(result.goal, name)
        for mode in MODES if asked is not None else ():
            share = result.fused(mode).median_ms / result.timing(mode, form).median_ms
            found.append(
                (f"{name} {MODE_TITLES[mode]}", f"{share:.2f}×", f"≤ {asked:g}×", share <= asked)
            )
    limit = MEMORY_LIMIT_BYTES + MEMORY_LIMIT_ROW_BYTES * result.rows
    extras = [result.fused(mode).extra_bytes for mode in MODES]
    if None in extras:
        found.append(("extra memory", "–", f"≤ {_number(limit / 2**20)} MiB", None))
    else:
        found.append(
            (
                "extra memory",
                f"{_number(max(extras) / 2**20)} MiB",
                f"≤ {_number(limit / 2**20)} MiB",
                max(extras) <= limit,
            )
        )
    return found


def goals_table(results: list[Result]) -> Table:
    """What is asked of each setting, and whether it is met."""
    table = Table(title="Goals", title_justify="left")
    for heading in ("setting", "against", "measured", "asked", ""):
        table.add_column(heading, justify="right" if heading in ("measured", "asked") else "left")
    words = {True: "met", False: "[red]not met[/]", None: "not measured"}
    for result in results:
        name = f"{'×'.join(map(str, result.shape))} {result.dtype}, {result.case.split('/')[-1]}"
        for index, (against, measured, asked, met) in enumerate(verdicts(result)):
            table.add_row("" if index else name, against, measured, asked, words[met])
        table.add_section()
    return table


LEGEND = (
    "× ours: time over fusedloss's in the same mode. extra MiB: peak above the inputs and the "
    "gradient. Errors: against float64, relative to the loss and to the largest gradient."
)


def markdown(results: list[Result]) -> str:
    """The README's table: one line a setting, milliseconds and ratios."""
    lines = [
        "| shape, dtype | case | fusedloss graph, ms | stock graph | fusedloss XLA, ms | stock XLA "
        "| of the bare traffic | extra memory, MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        cells = [f"{'×'.join(map(str, result.shape))} {result.dtype}", result.title]
        for mode in MODES:
            stock = result.fastest_stock(mode)
            cells.append(_number(result.fused(mode).median_ms))
            cells.append(
                f"{_number(stock.median_ms)} ({stock.form}), **{ratio(result, stock):.1f}×**"
            )
        fused_ms = min(result.fused(mode).median_ms for mode in MODES)
        traffic = result.traffic_ms
        cells.append(f"{np.median(traffic) / fused_ms:.0%} of {result.traffic}" if traffic else "–")
        extras = [result.fused(mode).extra_bytes for mode in MODES]
        cells.append("–" if None in extras else _number(max(extras) / 2**20))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: list[Result], path: str) -> None:
    """Bars of how many times as fast as the fastest stock form, graph and XLA, to an image file."""
    from matplotlib.figure import Figure

    colours = {"graph": "#1f6f8b", "xla": "#e0912f"}
    figure = Figure(figsize=(8.5, 0.9 + 0.72 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{'×'.join(map(str, r.shape))} {r.dtype}\n{r.case.split('/')[-1]}" for r in results]
    for offset, mode in zip((0.19, -0.19), reversed(MODES), strict=True):
        ratios = [ratio(result, result.fastest_stock(mode)) for result in results]
        bars = axes.barh(
            np.arange(len(results)) + offset,
            ratios,
            height=0.36,
            color=colours[mode],
            label=f"against Keras, {'under ' if mode == 'xla' else 'in a '}{MODE_TITLES[mode]}",
        )
        axes.bar_label(bars, fmt="%.1f×", padding=3, fontsize=9)
    axes.axvline(1, color="#555555", linewidth=1, linestyle=":")
    axes.set_yticks(np.arange(len(results)), names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("times as fast as the fastest stock form (loss + gradient)")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="best", fontsize=9)
    figure.savefig(path, dpi=150)
