"""Tests of twotower_jax.checkpoint.packed: what rounding changes, what an archive takes, and what reads it."""

import gzip
import io
import json
import pathlib

import numpy as np
import pytest

from twotower_jax import parameters
from twotower_jax.checkpoint import huggingface
from twotower_jax.checkpoint.convert import convert
from twotower_jax.checkpoint.export import export, model_tensors
from twotower_jax.checkpoint.fingerprint import fingerprint
from twotower_jax.checkpoint.load import load
from twotower_jax.checkpoint.packed import TENSORS, read_packed, rounded, write_packed
from twotower_jax.files import CheckpointError
from twotower_jax.two_tower import TwoTower


@pytest.fixture(scope="module")
def packed(small_config, random_params, tmp_path_factory):
    """A packed folder, and its tensors before."""
    model = TwoTower(small_config("M*E"))
    folder = tmp_path_factory.mktemp("packed") / "folder"
    tensors = {name: tensor.read for name, tensor in model_tensors(model, random_params(model)).items()}
    write_packed(folder, tensors, {"config.json": json.dumps(model.config.to_hf()).encode()}, 0.14)
    return folder, {name: read() for name, read in tensors.items()}


@pytest.mark.parametrize("coarseness", [0.05, 0.14, 0.5])
def test_numbers_move_by_half_a_step_at_most_and_cost_the_entropy(tmp_path, coarseness):
    rng = np.random.default_rng(3)
    matrix = (rng.standard_normal((256, 512)) * np.exp(rng.standard_normal((256, 1)))).astype(np.float32)
    multiples, step = rounded(matrix, coarseness)
    expected = [coarseness * np.sqrt((row.astype(float) ** 2).mean()) for row in matrix]
    np.testing.assert_allclose(step[:, 0], expected, 1e-6)
    assert np.all(np.abs(multiples * step - matrix) <= step / 2 * (1 + 1e-5))
    write_packed(tmp_path / "out", {"w": lambda: matrix}, {}, coarseness)
    bits = 8 * (tmp_path / "out" / TENSORS).stat().st_size / matrix.size
    entropy = np.log2(np.sqrt(2 * np.pi * np.e) / coarseness)
    assert entropy - 0.02 < bits < entropy + 0.3
    np.testing.assert_array_equal(read_packed(tmp_path / "out")["w"], multiples * step)


def test_rows_of_zeros_and_vectors_stay_and_outliers_are_refused(tmp_path):
    matrix, vector = np.eye(3, 4, dtype=np.float32), np.array([1e-30, 7], np.float32)
    matrix[1] = 0
    write_packed(tmp_path / "out", {"w": lambda: matrix, "v": lambda: vector}, {}, 0.5)
    found = read_packed(tmp_path / "out")
    np.testing.assert_array_equal(found["w"], matrix)
    np.testing.assert_array_equal(found["v"], vector)
    with pytest.raises(ValueError, match="^w: a number is 1000 steps from 0"):
        write_packed(tmp_path / "none", {"w": lambda: np.eye(1, 10_000, dtype=np.float32)}, {}, 0.1)
    assert not (tmp_path / "none").exists()


def test_a_folder_is_read_as_any_other(packed, tmp_path):
    folder, tensors = packed
    model, params, _ = load(folder)
    flat, table = parameters.flatten(params), parameters.parameter_table(model)
    for path, parameter in table.items():
        for index, name in np.ndenumerate(parameter.tensors):
            found = parameter.to_tensor(np.asarray(flat[path][index]))
            expected = tensors[name].astype(np.float32)
            if expected.ndim > 1:
                multiples, step = rounded(expected, 0.14)
                expected = multiples * step
            np.testing.assert_array_equal(found, expected)
    # Exported it is the same numbers in a plain folder, which is the same start of a run.
    export(folder, tmp_path / "plain", "both", 10**9)
    assert fingerprint(tmp_path / "plain") == fingerprint(folder)
    plain = huggingface.open_folder(tmp_path / "plain")
    np.testing.assert_array_equal(
        *(f.tensors["lm_head.weight"].read() for f in (plain, huggingface.open_folder(folder)))
    )
    with pytest.raises(ValueError, match="it is packed; export it first"):
        convert(folder, tmp_path / "converted")


@pytest.mark.parametrize("broken", ["cut", "pickle", "no steps", "other type"])
def test_a_broken_archive_is_refused(packed, tmp_path, broken):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_bytes((packed[0] / "config.json").read_bytes())
    path: pathlib.Path = folder / TENSORS
    with gzip.open(packed[0] / TENSORS) as file:
        arrays = dict(np.load(io.BytesIO(file.read())))
    if broken == "cut":
        path.write_bytes((packed[0] / TENSORS).read_bytes()[:-100])
    elif broken == "pickle":
        _save(path, w=np.array([{}], object))
    else:
        name = next(name for name in arrays if f"{name}.step" in arrays)
        if broken == "no steps":
            del arrays[f"{name}.step"]
        else:
            arrays[name] = arrays[name].astype(np.int16)
        _save(path, **arrays)
    with pytest.raises(CheckpointError, match="packed.npz.gz"):
        huggingface.open_folder(folder)


def _save(path, **arrays):
    plain = io.BytesIO()
    np.savez(plain, **arrays)
    path.write_bytes(gzip.compress(plain.getvalue()))
