"""Turns the JSON of a benchmark run into the README's Markdown table and its picture.

Reads what `fusedloss bench --json` writes and what `pytest benchmarks --benchmark-json` writes.
"""

import argparse
import json
from collections import defaultdict

from fusedloss import bench, bench_report
from fusedloss.cases import CASES, Goal


def of_command(document: dict) -> list[bench.Result]:
    """Results as `fusedloss bench --json` writes them."""
    return [
        bench.Result(
            **{
                **result,
                "shape": tuple(result["shape"]),
                "goal": Goal(**result["goal"]),
                "timings": [bench.Timing(**timing) for timing in result["timings"]],
            }
        )
        for result in document["results"]
    ]


def of_pytest(document: dict) -> list[bench.Result]:
    """Results put together from the benchmarks of `test_speed.py`, one for each group."""
    groups = defaultdict(dict)
    for entry in document["benchmarks"]:
        groups[entry["group"]][entry["extra_info"]["key"]] = entry
    results = []
    for entries in groups.values():
        facts = next(iter(entries.values()))["extra_info"]
        case, shape = CASES[facts["case"]], tuple(facts["shape"])
        setting = next(s for s in case.settings if (s.shape, s.dtype) == (shape, facts["dtype"]))
        result = bench.blank(case, setting)
        for timing in result.timings:
            facts = entries[timing.key]["extra_info"]
            timing.loss_error = facts["loss_error"]
            timing.gradient_error = facts["gradient_error"]
            timing.extra_bytes = facts["extra_bytes"]
        samples = {
            key: [seconds * 1e3 for seconds in entry["stats"]["data"]]
            for key, entry in entries.items()
        }
        bench.record(result, samples, case, setting)
        results.append(result)
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", metavar="JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios (png, svg, pdf)")
    arguments = parser.parse_args(argv)
    with open(arguments.json) as file:
        document = json.load(file)
    results = of_command(document) if "results" in document else of_pytest(document)
    print(bench_report.markdown(results), end="")
    if arguments.plot:
        bench_report.plot(results, arguments.plot)


if __name__ == "__main__":
    main()
