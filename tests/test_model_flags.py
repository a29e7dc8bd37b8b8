"""How commands lay out a checkpoint's layers: by its size on disk."""

import pytest

from twotower_jax.checkpoint import load


@pytest.mark.parametrize(("sizes", "small"), [((), True), ((60, 39), True), ((60, 40), False), ((200,), False)])
def test_a_large_checkpoint_is_not_scanned(tmp_path, monkeypatch, sizes, small):
    """Files in folders count too."""
    monkeypatch.setattr(load, "_SMALL", 100)
    for i, size in enumerate(sizes):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "array").write_bytes(b"0" * size)
    assert load.is_small(tmp_path) is small
