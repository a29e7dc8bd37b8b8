"""A workdir in a store: the run that it is on a disk, whole checkpoints or none, and copies on local disks."""

import contextlib
import itertools
import pathlib
import shutil

import jax
import numpy as np
import pytest

import buckets
from twotower_jax.checkpoint import load, local_copies, orbax_steps, store_steps, workdir
from twotower_jax.checkpoint.orbax_steps import SaveError
from twotower_jax.files import CheckpointError
from twotower_jax.paths import as_path
from twotower_jax.stores import lease, spool
from twotower_jax.train.config import base_config, freeze
from twotower_jax.train.loop import train
from workdirs import rows, state

STEPS = 5


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Settings of a small run, and a function that trains; all runs share what they compile."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("\n".join(f"line {i} of a text that is trained on" for i in range(300)))
    model = {
        **{"hidden_size": 16, "hybrid_override_pattern": "*-", "mamba_num_heads": 2, "mamba_head_dim": 8},
        **{"ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"head_dim": 8, "intermediate_size": 16},
    }

    def run(path, steps: int = STEPS, stop_after: int | None = None, **options):
        config = base_config(model=model)
        settings = {"objective": "autoregressive", "vocab_size": 300, "sequence_length": 32, "batch_size": 2}
        settings |= {"data": str(folder / "text.txt"), "log_every": 1, "checkpoint_every": 2, "steps": steps}
        for name, value in (settings | options).items():
            setattr(config, name, value)
        asked = itertools.count(-1)  # once before the first step
        stop = lambda: "the test" if stop_after is not None and next(asked) >= stop_after else ""  # noqa: E731
        return train(freeze(config), str(path), lambda line: None, stop=stop)

    return run


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory) -> pathlib.Path:
    """The same run on a disk, without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    make(folder)
    return folder


def same_run(path, whole) -> bool:
    found = rows(path)
    by_step = {row["step"]: row for row in found}
    return all(by_step[row["step"]] == row for row in found + rows(whole)) and state(path) == state(whole)


def test_a_run_stops_and_goes_on(make, whole, address):
    """Bit for bit the run on a disk."""
    path = as_path(address)
    assert make(address, stop_after=3).stopped == "the test"
    assert orbax_steps.committed_steps(path / "checkpoints") == [2, 3]
    make(address)
    assert same_run(address, whole) and orbax_steps.committed_steps(path / "checkpoints") == [4, STEPS]
    assert not (path / workdir.LEASE).exists() and (path / "tensorboard").is_dir()
    steps = {name.split("/")[1] for name in path.sizes() if name.startswith("checkpoints/")}
    assert steps == {"4", str(STEPS)}


@pytest.mark.whole
def test_a_run_in_s3_stops_and_goes_on(make, whole, s3):
    address = "s3://bucket/stopped"
    make(address, stop_after=3)
    make(address)
    assert same_run(address, whole) and not as_path(f"{address}/{workdir.LEASE}").exists()


@pytest.mark.whole
def test_workdirs_are_copied_either_way(make, whole, address, tmp_path):
    """From a store to a disk and back, where they go on."""
    make(address)
    path = as_path(address)
    for name in path.sizes():
        (tmp_path / "down" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "down" / name).write_bytes((path / name).read_bytes())
    buckets.upload(whole, f"{address}-up")
    longer = shutil.copytree(whole, tmp_path / "longer")
    make(longer, STEPS + 1)
    for copy in (tmp_path / "down", f"{address}-up"):
        assert state(copy) == state(whole)
        make(copy, STEPS + 1)
        assert state(copy, STEPS + 1) == state(longer, STEPS + 1)
        there, here = load.load(str(copy)), load.load(longer)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), there.params, here.params))


@pytest.mark.whole
def test_another_run_is_kept_out(make, address):
    with (
        lease.held(as_path(address) / workdir.LEASE, "busy"),
        pytest.raises(ValueError, match="another run is"),
    ):
        make(address, 1)


@pytest.mark.whole
def test_settings_of_another_run_are_refused(make, address):
    make(address, 1)
    with pytest.raises(ValueError, match="holds another run.*seed"):
        make(address, 1, seed=5)


def test_what_is_half_sent_is_no_step(address, monkeypatch):
    folder, send = as_path(address) / "checkpoints", store_steps._send

    def half(final, texts, parts):
        send(final, texts, parts[:1])
        raise OSError("the store is gone")

    for step, sender in ((1, send), (2, half)):
        monkeypatch.setattr(store_steps, "_send", sender)
        writer = store_steps.StoreWriter()
        writer.start(folder / str(step), {"params": {"a": jax.numpy.arange(4.0), "b": jax.numpy.zeros(2)}}, {})
        with pytest.raises(SaveError, match="the store is gone") if step == 2 else contextlib.nullcontext():
            writer.wait()
    assert orbax_steps.committed_steps(folder) == [1] and (folder / "2").is_dir()
    orbax_steps.clean_up(folder)
    assert not (folder / "2").is_dir()
    orbax_steps.keep_newest(folder, 1)
    orbax_steps.verify(folder / "1")


def test_copies_of_a_step(address, tmp_path, capsys):
    """All parts and values, by hash; broken ones count as none."""
    path, values = as_path(address), np.arange(12.0, dtype=np.float32).reshape(3, 4)
    copies = local_copies.LocalCopies(tmp_path, path)
    for step in (1, 2):
        writer = store_steps.StoreWriter(keep=copies.keep)
        writer.start(path / "checkpoints" / str(step), {"params": {"x": jax.numpy.asarray(values)}}, {"run": step})
        writer.wait()
    copy = copies.agreed()
    assert copy.step == 2 and [entry.name for entry in tmp_path.glob("*/0-of-1/*")] == ["2"]
    target = {"x": jax.ShapeDtypeStruct((3, 4), np.float32)}
    np.testing.assert_array_equal(store_steps.restore_arrays(copy.folder / "params", target)["x"], values)
    part = next(copy.folder.rglob("c.*"))
    part.write_bytes(bytes(part.stat().st_size))
    assert copies.agreed() is None and "this copy is not used" in capsys.readouterr().err


@pytest.mark.whole
def test_a_step_is_whole_or_none(make, whole, address, monkeypatch):
    """Where sending ends at any object, the step before counts; what is left goes when the run goes on."""
    path, send = as_path(address), store_steps._send

    def half(final, texts, parts):
        if final.name == "4":
            send(final, texts, parts[:5])
            raise OSError("the store is gone")
        return send(final, texts, parts)

    monkeypatch.setattr(store_steps, "_send", half)
    with pytest.raises(SaveError, match="checkpoints/4: could not be written: the store is gone"):
        make(address)
    assert orbax_steps.committed_steps(path / "checkpoints") == [2] and (path / "checkpoints" / "4").is_dir()
    monkeypatch.setattr(store_steps, "_send", send)
    monkeypatch.setattr(spool, "_EVERY_SECONDS", 0.01)
    make(address)
    assert same_run(address, whole)


@pytest.mark.whole
def test_changed_parts_are_found(make, whole, address):
    buckets.upload(whole, f"{address}-up")  # in Orbax's layout
    make(address, 2)
    for path, step in ((f"{address}-up", STEPS), (address, 2)):
        folder = as_path(path) / "checkpoints" / str(step)
        name = max(folder.sizes().items(), key=lambda item: item[1])[0]
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="not what was recorded"):
            orbax_steps.verify(folder)
            state(path, step)


def test_nothing_is_written_over(make, address):
    """A run that was taken for dead and wakes up cannot spoil what another has written since."""
    folder = as_path(address) / "checkpoints" / "2"
    writer = store_steps.StoreWriter(before=lambda: (folder / orbax_steps.HASHES).create(b"{}"))
    writer.start(folder, {"params": {"a": jax.numpy.arange(4.0)}}, {})
    with pytest.raises(SaveError, match="another version is there"):
        writer.wait()
    with pytest.raises(SaveError, match="is there already; another run writes to this workdir"):
        store_steps._send(folder, {"params/a/zarr.json": b"{}"}, [])


@pytest.mark.parametrize("shape", [(64, 3, 5), *(pytest.param(s, marks=pytest.mark.whole) for s in ((), (3,)))])
def test_arrays_in_parts(address, shape, monkeypatch):
    """Arrays of every rank, cut and divided over devices in one way, come back divided in another."""
    monkeypatch.setattr(store_steps, "_CHUNK_BYTES", 100)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a") if len(shape) > 1 else jax.P())
    other = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("b") if len(shape) > 1 else jax.P())
    folder = as_path(address) / "checkpoints" / "1"
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for dtype in (np.float32, jax.numpy.bfloat16, np.int32, bool):
        writer = store_steps.StoreWriter()
        writer.start(folder, {"t": {"x": jax.device_put(values.astype(dtype), place)}}, {"run": {"a": 1}})
        writer.wait()
        target = {"x": jax.ShapeDtypeStruct(shape, dtype, sharding=other)}
        (found,) = orbax_steps.restore_arrays(folder / "t", target).values()
        assert found.sharding == other and np.asarray(found).tobytes() == values.astype(dtype).tobytes()
    with pytest.raises(CheckpointError, match="array x is"):
        orbax_steps.restore_arrays(folder / "t", {"x": jax.ShapeDtypeStruct(shape, np.float16)})


@pytest.mark.whole
@pytest.mark.parametrize("broken", [False, True])
def test_copies_on_the_local_disk(make, whole, address, tmp_path, monkeypatch, broken):
    """A run whose newest state had not come to the store goes on from the disk; from a broken copy, from the store."""
    send = store_steps._send
    with monkeypatch.context() as patch, pytest.raises(SaveError):
        patch.setattr(store_steps, "_send", lambda final, *rest: send(final, *rest) if final.name != "4" else {}[0])
        patch.setattr(spool.Spool, "send", lambda self: None)
        make(address, local_copy=str(tmp_path))
    (copy,) = tmp_path.glob("*/0-of-1/4")
    if broken:
        part = next(copy.rglob("c.*"))
        part.write_bytes(bytes(part.stat().st_size))
    make(address, local_copy=str(tmp_path))
    assert state(address) == state(whole) and (broken or same_run(address, whole))
    assert [step.name for step in tmp_path.glob("*/0-of-1/*")] == [str(STEPS)]
