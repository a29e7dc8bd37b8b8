"""hf:// is read, s3:// read and written, with the promises of gs://."""

import jax
import numpy as np
import pytest

import buckets
from twotower_jax.checkpoint import fingerprint, load, orbax_steps, store_steps
from twotower_jax.checkpoint.convert import convert
from twotower_jax.data import load_tokenizer
from twotower_jax.paths import as_path
from twotower_jax.stores import Changed, StoreError, lease
from workdirs import same


@pytest.mark.whole
def test_the_hub_is_read(backbone_folder, address, tmp_path):
    """Straight into a store, without a copy of the model here."""
    with buckets.hub(backbone_folder):
        path = as_path("hf://org/name")
        assert path.is_dir() and (path / "config.json").is_file() and not (path / "nothing").exists()
        assert {p.name for p in path.iterdir()} == {p.name for p in backbone_folder.iterdir()}
        assert (path / "config.json").read_bytes() == (backbone_folder / "config.json").read_bytes()
        assert path.sizes() == {p.name: p.stat().st_size for p in backbone_folder.iterdir()}
        assert load_tokenizer("hf://org/name").to_str() == load_tokenizer(backbone_folder).to_str()
        made = convert(path, as_path(f"{address}/out"))
        with pytest.raises(StoreError, match="only read"):
            (path / "x").write_bytes(b"1")
        with pytest.raises(StoreError, match="hf://org/other: there is no such repository"):
            as_path("hf://org/other").check()
    assert made.files == convert(backbone_folder, tmp_path / "out").files
    assert fingerprint.fingerprint(as_path(f"{address}/out")) == fingerprint.fingerprint(backbone_folder)


def test_objects_of_s3(s3):
    path = as_path("s3://bucket/a b/é#1")
    path.create(b"one")
    with pytest.raises(Changed):
        path.create(b"two")
    version = path.info().version
    path.write(b"three", version)
    with pytest.raises(Changed):
        path.write(b"four", version)
    assert path.read_bytes() == b"three" and path.read(1, 3) == b"hr"
    assert list(path.parent.iterdir()) == [path] and path.parent.sizes() == {"é#1": 5}
    with pytest.raises(StoreError, match="no such bucket"):
        as_path("s3://nowhere").check()
    held = lease.held(path.parent / "lease", "busy")
    with held, pytest.raises(ValueError, match="busy"), lease.held(path.parent / "lease", "busy"):
        pass
    path.unlink()
    assert not path.parent.is_dir()


def test_steps_in_s3(s3):
    folder, values = as_path("s3://bucket/run/checkpoints/3"), np.arange(12.0).reshape(3, 4)
    writer = store_steps.StoreWriter()
    writer.start(folder, {"params": {"x": jax.numpy.asarray(values)}}, {"run": {}})
    writer.wait()
    assert orbax_steps.committed_steps(folder.parent) == [3]
    orbax_steps.verify(folder)
    (found,) = orbax_steps.restore_arrays(folder / "params", {"x": jax.ShapeDtypeStruct((3, 4), np.float32)}).values()
    np.testing.assert_array_equal(found, values)


@pytest.mark.whole
def test_checkpoints_from_s3(s3, backbone_folder):
    convert(backbone_folder, as_path("s3://bucket/converted"))
    assert same(load.load("s3://bucket/converted").params, load.load(backbone_folder).params)
