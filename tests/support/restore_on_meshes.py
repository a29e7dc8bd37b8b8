"""Run by `test_durability.py` with 8 virtual devices: saves on some of them, restores on others, compares the bits."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twotower_jax.checkpoint.workdir import Workdir
from twotower_jax.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=8, hidden_size=8, hybrid_override_pattern="-", intermediate_size=8,
    mamba_num_heads=1, mamba_head_dim=1, ssm_state_size=1, n_groups=1,
)  # fmt: skip
SETTINGS = {"objective": "denoiser", "variant": {}, "model": dataclasses.asdict(MODEL)}


def sharding(devices: int, spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("x",)), spec)


def trees(devices: int):
    """Parameters, optimizer state and frozen parameters as host values with a sharding each."""
    rng = np.random.default_rng(0)
    rows, columns, whole = (sharding(devices, PartitionSpec(*spec)) for spec in (("x",), (None, "x"), ()))
    params = {"a": {"w": (rng.standard_normal((16, 24), np.float32), rows), "b": (np.float32([np.nan, -0.0]), whole)}}
    optimizer = ({"mu": (rng.standard_normal((24, 8), np.float32), columns)}, (np.int32(7), whole))
    frozen = {"f": (rng.standard_normal((8, 8), np.float32).astype(jax.numpy.bfloat16), rows)}
    return params, optimizer, frozen


def is_pair(node) -> bool:
    return isinstance(node, tuple) and len(node) == 2 and isinstance(node[1], NamedSharding)


def put(tree):
    return jax.tree.map(lambda pair: jax.device_put(*pair), tree, is_leaf=is_pair)


def abstract(tree):
    return jax.tree.map(
        lambda pair: jax.ShapeDtypeStruct(pair[0].shape, pair[0].dtype, sharding=pair[1]), tree, is_leaf=is_pair
    )


def main(folder: pathlib.Path) -> None:
    for saved_on in (1, 4):
        path = folder / str(saved_on)
        params, optimizer, frozen = map(put, trees(saved_on))
        run = Workdir(path, SETTINGS, ())
        run.create(MODEL, frozen)
        with run.saver(1) as saver:
            saver.save(3, params, optimizer, {"note": "kept"})
        for restored_on in (1, 2, 8):
            wanted = trees(restored_on)
            *found, about = Workdir(path, SETTINGS, ()).restore(*map(abstract, wanted))
            assert about["note"] == "kept" and about["step"] == 3
            pairs = jax.tree.leaves(wanted, is_leaf=is_pair)
            for (value, placed), array in zip(pairs, jax.tree.leaves(tuple(found)), strict=True):
                assert array.sharding == placed, (array.sharding, placed)
                assert np.asarray(array).tobytes() == value.tobytes() and array.dtype == value.dtype
            print(f"saved on {saved_on}, restored on {restored_on}: exact")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
