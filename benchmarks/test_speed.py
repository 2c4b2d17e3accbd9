"""Every setting of every case, by pytest-benchmark: ours, stock, graph and XLA in one group.

    python -m pytest benchmarks --benchmark-json=speed.json
    python benchmarks/report.py speed.json --plot speed.png

What runs is what `fusedloss bench` runs. pytest-benchmark times one form after the other, though;
where the machine is not quiet, the interleaved `fusedloss bench --json` gives the better ratios.
"""

from functools import lru_cache

import pytest

from fusedloss import bench, bench_memory
from fusedloss.cases import CASES


def _settings():
    for case in CASES.values():
        for setting in case.settings:
            name = f"{case.name} {'x'.join(map(str, setting.shape))} {setting.dtype}"
            yield name, case, setting


SETTINGS = {name: (case, setting) for name, case, setting in _settings()}
KEYS = [
    (name, key) for name, (case, setting) in SETTINGS.items() for key in bench.keys(case, setting)
]


@lru_cache(maxsize=1)  # the tests of a setting follow one another; two settings may not fit
def _prepared(name):
    result, calls = bench.prepare(*SETTINGS[name])
    bench_memory.add_peak_memory([result])
    return result, calls


@pytest.mark.parametrize("name,key", KEYS, ids=lambda value: value.replace(" ", "-"))
def test_step(benchmark, name, key):
    result, calls = _prepared(name)
    case, setting = SETTINGS[name]
    benchmark.group = name
    benchmark.extra_info |= {"case": case.name, "shape": setting.shape, "dtype": setting.dtype}
    benchmark.extra_info["key"] = key
    for timing in result.timings:
        if timing.key == key:
            benchmark.extra_info["loss_error"] = timing.loss_error
            benchmark.extra_info["gradient_error"] = timing.gradient_error
            benchmark.extra_info["extra_bytes"] = timing.extra_bytes
    calls[key]()
    benchmark.pedantic(
        calls[key],
        rounds=bench.ROUNDS,
        iterations=bench.calls_per_sample(calls[key]),
        warmup_rounds=1,
    )
