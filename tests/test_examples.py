"""The examples as a user runs them, on settings that take seconds."""

import importlib
import runpy
import sys

import h5py
import keras
import numpy as np
import pytest
from rich.console import Console

import fusedloss.examples
from fusedloss.examples import (
    _vgg16,
    blended,
    content_loss,
    frozen_head,
    style_transfer,
    transfer_learning,
)

PNG = b"\x89PNG"


def run(example, folder, capsys):
    """The results of an example and what it printed."""
    results = example.run(True, folder, Console(width=120, highlight=False))
    printed = capsys.readouterr().out
    picture = folder / f"{example.__name__.rsplit('.')[-1]}.png"
    assert picture.read_bytes().startswith(PNG)
    assert max(map(len, printed.splitlines())) <= 120
    return results, printed


def test_content_loss_is_the_same_in_a_loop_and_under_fit(tmp_path, capsys):
    results, printed = run(content_loss, tmp_path, capsys)
    assert results["curves"].shape == (3, 3)
    assert 0 <= results["difference"] <= content_loss.TOLERANCE
    assert (np.diff(results["curves"]) < 0).all()
    for loss in results["curves"].flat:
        assert f"{loss:.6f}" in printed


def test_content_loss_fails_where_the_losses_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(content_loss, "fused", lambda features: 2 * content_loss.by_hand(features))
    with pytest.raises(SystemExit, match="do not give the same losses"):
        content_loss.run(True, tmp_path, Console(quiet=True))


@pytest.mark.parametrize("has_vgg16", [False, True], ids=["digits network", "VGG16 if installed"])
def test_style_transfer_comes_closer_to_the_style(has_vgg16, tmp_path, capsys, monkeypatch):
    if not has_vgg16:
        monkeypatch.setattr(_vgg16, "weights_file", lambda: None)
    results, printed = run(style_transfer, tmp_path, capsys)
    assert ("VGG16" in printed) == (_vgg16.weights_file() is not None)
    style, content = results["style"], results["content"]
    assert content[0] < 1e-6  # It begins as the photograph itself.
    assert (content[1:] > 0).all()
    assert style[-1] < 0.6 * style[0]


def test_vgg16_has_the_weights_of_the_file(tmp_path):
    rng = np.random.default_rng(0)
    written = keras.applications.VGG16(weights=None, include_top=False)
    path = tmp_path / "hed.weights.h5"
    with h5py.File(path, "w") as file:
        for block in range(1, 6):
            layers = [x for x in written.layers if x.name.startswith(f"block{block}_conv")]
            for number, layer in enumerate(layers):
                name = f"conv2d_{number}" if number else "conv2d"
                for index, shape in enumerate(weight.shape for weight in layer.weights):
                    values = rng.standard_normal(shape, np.float32)
                    file[f"block{block}/layers/{name}/vars/{index}"] = values
                layer.set_weights(
                    [file[f"block{block}/layers/{name}/vars/{index}"][()] for index in (0, 1)]
                )
    read = _vgg16.vgg16(path)
    for one, other in zip(written.get_weights(), read.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_blended_finds_digits_despite_wrong_labels(tmp_path, capsys):
    results, _ = run(blended, tmp_path, capsys)
    assert results["moved"] == 0
    assert results["blended"][-1] > results["plain"][-1] + 0.04


def test_frozen_head_reads_more_with_the_frozen_model(tmp_path, capsys):
    results, _ = run(frozen_head, tmp_path, capsys)
    assert results["moved"] == 0
    assert results["same after loading"]
    without, found = results["metrics"]["digit"]
    assert found > without
    without, found = results["metrics"]["number"]
    assert found < without


def test_transfer_learning_moves_nothing_that_is_frozen(tmp_path, capsys):
    results, _ = run(transfer_learning, tmp_path, capsys)
    scratch, *moved = results.values()
    base, last, both = moved
    assert [way["moved"] for way in moved] == [0, 0, 0]
    assert base["trained"] < last["trained"] == both["trained"] < scratch["trained"]
    assert min(way["curve"][-1] for way in moved) > 0.4  # One in five is chance.


def test_an_example_runs_as_a_command(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["content_loss", "--quick", "--output", str(folder)])
    runpy.run_path(content_loss.__file__, run_name="__main__")
    assert (folder / "content_loss.png").read_bytes().startswith(PNG)
    assert "Picture:" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["sklearn", "skimage", "matplotlib"])
def test_a_missing_extra_is_named(missing, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda x: None if x == missing else find(x))
    with pytest.raises(ImportError, match=r"pip install 'fusedloss\[examples\]'"):
        importlib.reload(fusedloss.examples)
