"""A training workdir: what a run needs to go on, and what generation needs to start from it.

    config.json        the run's settings, the model's shape among them
    tokenizer.json …   the tokenizer's files
    frozen/            params/: the parameters that do not train, once; an adapter's run has none
    base.json          of an adapter's run: the checkpoint that it adapts, and the hash of each of its towers
    checkpoints/STEP/  params/ (float32), optimizer/, run.json (step, data position, open sums, settings);
                       average/, of the parameters with gradients, where the run keeps one

Both kinds of folder appear whole or not at all, with the hashes of their files (`orbax_steps.py`; of a workdir in a
store, `store_steps.py`). A workdir belongs to one run: settings that make it another one are refused, with the
differences. One run at a time writes to it: here it holds a lock, in a store the lease `lease.json`.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from twotower_jax.atomic import locked_folder
from twotower_jax.checkpoint import orbax_steps
from twotower_jax.checkpoint.config_file import is_run
from twotower_jax.config import ModelConfig, Variant
from twotower_jax.files import CheckpointError, read_json
from twotower_jax.outputs import check_writable
from twotower_jax.parameters import (
    Params,
    flatten,
)
from twotower_jax.paths import as_path, in_store

if TYPE_CHECKING:
    from twotower_jax.checkpoint.local_copies import Copy
    from twotower_jax.checkpoint.store_steps import StoreWriter
    from twotower_jax.stores.lease import Lease

CONFIG, CHECKPOINTS, FROZEN, BASE = "config.json", "checkpoints", "frozen", "base.json"
LEASE = "lease.json"
_LOGS = "logs"
# An hour of work waits for a store that has gone away for some minutes.
_PATIENCE_SECONDS = 300.0
_MODEL_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.default is not dataclasses.MISSING and field.name != "layer_fields"
}
# The trees of a step's folder and its JSON values; a frozen folder has params alone.
PARAMS, OPTIMIZER, AVERAGE, RUN = "params", "optimizer", "average", "run"

Settings = dict[str, Any]


class Workdir:
    """One run's workdir, new or to be gone on with. Nothing is written before `create`.

    Attributes:
      step: of the state to go on from, the newest committed checkpoint or a later copy on this machine; or None.
      stored_step: of the newest committed checkpoint.
      model: the model's shape as config.json has it, or None in a new workdir.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        settings: Settings,
        changeable: tuple[str, ...],
        added: Mapping[str, Any] | None = None,
        local_copy: str = "",
    ):
        """Looks at what is there.

        Args:
          path: need not exist.
          settings: of the run, JSON-able; `model` holds the model's fields as the user gave them.
          changeable: settings in which a resumed run may differ from the saved one.
          added: see `identity`.
          local_copy: a folder of this machine in which a run in a store keeps its newest state too; "" for none.

        Raises:
          ValueError: if `path` holds something else, or a run with other settings (the message lists what differs), or
            checkpoints could not be read back from under such a path.
        """
        self.path = as_path(path)
        orbax_steps.check_path(self.path)
        self._lease: Lease | None = None
        self._spool, self._copies, self._copy = None, None, None
        if local_copy and not in_store(self.path):
            raise ValueError(f"local_copy={local_copy} is for a workdir in a store; {self.path} is on this machine")
        if in_store(self.path):
            if jax.process_index() == 0:
                check_writable(self.path)
            from twotower_jax.stores.spool import Spool

            self._spool = Spool(self.path)
            if local_copy:
                from twotower_jax.checkpoint.local_copies import LocalCopies

                self._copies = LocalCopies(pathlib.Path(local_copy), self.path)
        self._settings = settings
        self._identity = identity(settings, changeable, added)
        if in_store(self.path):
            blocked = self.path if self.path.is_file() else None  # one question: others may be writing below it
        else:
            above = (self.path, *self.path.parents)
            blocked = next((parent for parent in above if parent.exists() and not parent.is_dir()), None)
        if blocked is not None:
            raise ValueError(f"workdir {self.path}: {blocked} is a file, not a folder")
        self.step, self.stored_step, self.model = None, None, None
        if not self.path.exists() or not any(_counts(p.name) for p in self.path.iterdir()):
            return
        if not (self.path / CONFIG).exists():
            raise ValueError(f"workdir {self.path} holds files but no {CONFIG}; choose a new or empty folder")
        saved = read_settings(self.path)
        _refuse_differences(self.path, identity(saved, changeable, added), self._identity, changeable)
        self.model = model_config(self.path, saved)
        self.step = self.stored_step = orbax_steps.latest_step(self.path / CHECKPOINTS)
        if self._copies is not None:
            self._copy = self._newest_copy()
            self.step = self.step if self._copy is None else self._copy.step

    def _newest_copy(self) -> "Copy | None":
        """The copy on this machine to go on from: none that is older than the store's newest step, or of another run
        that stood in this place."""
        copy = self._copies.agreed()
        if copy is None or copy.step < (self.stored_step or 0):
            return None
        if read_json(copy.folder / f"{RUN}.json")["identity"] != _digest(self._identity):
            return None
        if copy.step == self.stored_step:
            digest = hashlib.sha256((self.path / CHECKPOINTS / str(copy.step) / f"{RUN}.json").read_bytes())
            return copy if digest.hexdigest() == copy.values else None
        return copy

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While this run writes to the workdir; process 0 holds the lock, for as long as it lives.

        Raises:
          ValueError: if another run holds it, or the file system has no locks.
        """
        busy = f"workdir {self.path}: another run is training in it; choose another one"
        if in_store(self.path):
            from twotower_jax.stores import lease, retrying

            with contextlib.ExitStack() as stack:
                if jax.process_index() == 0:
                    self._lease = stack.enter_context(lease.held(self.path / LEASE, busy))
                stack.enter_context(retrying.patient(_PATIENCE_SECONDS))
                yield
            return
        if jax.process_index() > 0:
            yield
            return
        new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        with locked_folder(self.path, busy, ours=new):
            yield

    @property
    def from_copy(self) -> bool:
        """Whether `step` is that of a copy on this machine."""
        return self._copy is not None

    @property
    def logs(self) -> pathlib.Path:
        """Where files grow that tell of the run; within `logging`, what they hold comes to the workdir."""
        return self.path if self._spool is None else self._spool.folder

    @contextlib.contextmanager
    def logging(self, *names: str) -> Iterator[None]:
        """While the run writes to `logs`, where `names` go on from what the workdir has of them.

        Raises:
          SaveError: if a store does not take them.
        """
        if self._spool is None:
            yield
            return
        later = None if self._copy is None else self._copy.folder / _LOGS
        with orbax_steps.as_save_error(self.path), self._spool.running(*names, later=later):
            yield

    def create(self, model: ModelConfig, frozen: Params) -> None:
        """Writes what a new workdir holds once: settings and frozen parameters. Every process calls it.

        Raises:
          SaveError: if it cannot be written.
        """
        if jax.process_index() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_settings(model)
            orbax_steps.clean_up(self.path, FROZEN)
        if frozen:
            writer = self._writer()
            writer.start(self.path / FROZEN, {PARAMS: frozen}, {})
            writer.wait()
            writer.close()

    def write_base(self, base: "Base") -> None:
        """Writes base.json, all of it or nothing; on process 0."""
        if jax.process_index() == 0:
            orbax_steps.write_atomically(self.path / BASE, json.dumps(base._asdict(), indent=2) + "\n")

    def write_settings(self, model: ModelConfig) -> None:
        """Writes config.json, all of it or nothing; on process 0."""
        if jax.process_index() == 0:
            settings = self._settings | {"model": model.as_json()}
            orbax_steps.write_atomically(self.path / CONFIG, json.dumps(settings, indent=2) + "\n")

    def restore(self, params: Params, optimizer: Any, frozen: Params) -> tuple[Params, Any, Params, dict[str, Any]]:
        """Reads the newest checkpoint, after comparing its files and those of the frozen parameters with their hashes.

        Args:
          params, optimizer, frozen: trees of `jax.ShapeDtypeStruct` that what is read must fit. Each array is placed as
            its `sharding` says, whatever mesh it was saved from.

        Returns:
          params, optimizer state, frozen parameters, and the `run` given to `save`.

        Raises:
          CheckpointError: if a file is not as it was written, or an array is missing, left over, or of another shape or
            dtype. Nothing falls back to an earlier checkpoint by itself; the message says how to.
        """
        if self._copy is not None:
            from twotower_jax.checkpoint.local_copies import all_well

            try:
                read = self._restore_copy(params, optimizer)
            except (CheckpointError, OSError):  # of another mesh, for one, whose parts lie elsewhere
                read = None
            if all_well(read is not None):
                if frozen:
                    orbax_steps.verify(self.path / FROZEN)
                    frozen = orbax_steps.restore_arrays(self.path / FROZEN / PARAMS, frozen)
                return read[0], read[1], frozen, read[2]
            self._copy, self.step = None, self.stored_step
            if self.step is None:
                raise CheckpointError(
                    f"{self.path}: has no finished checkpoint yet, and the copies on the disks (local_copy) are not of "
                    "this mesh; go on with the mesh and the processes of before, or use a new workdir"
                )
        folder = step_folder(self.path, self.step)
        if frozen:
            orbax_steps.verify(self.path / FROZEN)
        run = read_json(folder / f"{RUN}.json")
        if run["identity"] != _digest(self._identity):
            raise CheckpointError(f"{self.path}: step {self.step} was saved by a run of other settings than {CONFIG}")
        named, structure = orbax_steps.name_leaves(optimizer)
        params = orbax_steps.restore_arrays(folder / PARAMS, params)
        optimizer = {}
        for name, tree in _with_average_apart(named).items():
            read = orbax_steps.restore_arrays(folder / name, tree)
            optimizer |= {AVERAGE: read} if name == AVERAGE else read
        optimizer = orbax_steps.unname_leaves(optimizer, named, structure)
        frozen = orbax_steps.restore_arrays(self.path / FROZEN / PARAMS, frozen) if frozen else {}
        return params, optimizer, frozen, run

    def _restore_copy(self, params: Params, optimizer: Any) -> tuple[Params, Any, dict[str, Any]]:
        """From the copy on this machine, whose files have been compared with their hashes."""
        from twotower_jax.checkpoint import store_steps

        def read(name: str, target: Params) -> Params:
            folder = self._copy.folder / name
            orbax_steps.check_fits(folder, store_steps.stored_arrays(folder), target)
            return store_steps.restore_arrays(folder, target)

        run = read_json(self._copy.folder / f"{RUN}.json")
        named, structure = orbax_steps.name_leaves(optimizer)
        params, leaves = read(PARAMS, params), {}
        for name, tree in _with_average_apart(named).items():
            leaves |= {AVERAGE: read(name, tree)} if name == AVERAGE else read(name, tree)
        return params, orbax_steps.unname_leaves(leaves, named, structure), run

    def saver(self, keep: int) -> "Saver":
        """What writes checkpoints, keeping the newest `keep`; a context manager."""
        if jax.process_index() == 0:
            orbax_steps.clean_up(self.path / CHECKPOINTS)
        return Saver(self.path, keep, self._settings, _digest(self._identity), self._writer(self._keep()))

    def _keep(self) -> Callable | None:
        """What keeps a step on this machine too, with what tells of the run so far."""
        if self._copies is None:
            return None

        def keep(step: str, texts: Mapping[str, bytes], parts: Any) -> None:
            logs = {f"{_LOGS}/{file.name}": file.read_bytes() for file in self.logs.glob("*.jsonl")}
            self._copies.keep(step, {**texts, **logs}, parts)

        return keep

    def _writer(self, keep: Callable | None = None) -> "orbax_steps.FolderWriter | StoreWriter":
        if not in_store(self.path):
            return orbax_steps.FolderWriter()
        from twotower_jax.checkpoint.store_steps import StoreWriter

        return StoreWriter(self._lease, self._spool.send, keep)


class Base(NamedTuple):
    """What an adapter's run adapts: a checkpoint's path, and the hash of each of its towers (fingerprint.py)."""

    checkpoint: str
    towers: dict[str, str]


def read_base(path: pathlib.Path) -> Base | None:
    """The base of the adapter that a workdir holds; None where it holds a whole model.

    Raises:
      CheckpointError: if what says it is broken.
    """
    file = path / BASE
    if not file.exists():
        return None
    raw = read_json(file)
    ok = isinstance(raw, dict) and raw.keys() == set(Base._fields) and isinstance(raw["checkpoint"], str)
    towers = raw["towers"] if ok else None
    if not isinstance(towers, dict) or not all(isinstance(value, str) for value in towers.values()):
        raise CheckpointError(f"{file}: is not an object of checkpoint and towers")
    return Base(raw["checkpoint"], towers)


class Saver:
    """Writes checkpoints in the background, one at a time. Every process of a run calls it alike."""

    def __init__(
        self,
        path: pathlib.Path,
        keep: int,
        settings: Settings,
        digest: str,
        writer: "orbax_steps.FolderWriter | StoreWriter",
    ):
        self._folder, self._keep, self._writer = path / CHECKPOINTS, keep, writer
        self._about = {"settings": settings, "identity": digest}

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        # A process of several that leaves alone must not wait for the others; they may be gone.
        if kind not in (None, FloatingPointError) and jax.process_count() > 1:
            return
        # The first of two errors counts.
        with contextlib.suppress(*(() if kind is None else (orbax_steps.SaveError,))):
            self._writer.wait()
        self._writer.close()

    def save(self, step: int, params: Params, optimizer: Any, run: Mapping[str, Any]) -> None:
        """Begins to save a step; the arrays may change when this returns. Older checkpoints go when it is on the disk.

        `run` is JSON-able and comes back from `Workdir.restore`.

        Raises:
          SaveError: if this or the one before cannot be written.
        """
        named, _ = orbax_steps.name_leaves(optimizer)
        self._writer.start(
            self._folder / str(step),
            {PARAMS: params} | _with_average_apart(named),
            {RUN: dict(run) | {"step": step} | self._about},
            lambda: orbax_steps.keep_newest(self._folder, self._keep),
        )

    @property
    def failed(self) -> bool:
        """Whether a save has failed."""
        return self._writer.failed

    def raise_failure(self) -> None:
        """Raises SaveError if a save has failed; does not wait for one that is under way."""
        self._writer.raise_failure()

    def wait(self) -> None:
        """Returns when every save is on the disk; raises SaveError if one could not be written."""
        self._writer.wait()


def described(path: pathlib.Path) -> tuple[ModelConfig, Variant, bool]:
    """The model that was trained, the variant that `load` makes of it, and whether it is a backbone.

    Raises:
      CheckpointError: see `read_settings`.
    """
    settings = read_settings(path)
    single = settings["objective"] == "autoregressive"
    return model_config(path, settings), Variant() if single else variant_of(path, settings), single


def read_settings(path: pathlib.Path) -> Settings:
    """The config.json of a workdir.

    Raises:
      CheckpointError: if it is missing or is not one of ours.
    """
    settings = read_json(path / CONFIG)
    if not is_run(settings):
        raise CheckpointError(f"{path / CONFIG}: not the settings of a training run; choose another workdir")
    return settings


def identity(settings: Settings, changeable: tuple[str, ...], added: Mapping[str, Any] | None = None) -> Settings:
    """The settings that make a run what it is, as one flat dictionary of JSON values.

    `added` are settings that came later, each with the value that stands for what was done before: with it they are
    left out, so that a workdir without them is the same run.

    Where a run starts from a checkpoint, that decides the model's shape and vocabulary, and not these settings. A field
    of the model that a run of an earlier version does not have is at its default.
    """
    unused = ("model", "vocab_size") if settings.get("init_from") else ()
    kept = {name: value for name, value in settings.items() if name not in changeable + unused}
    if isinstance(kept.get("model"), dict):
        kept["model"] = _MODEL_DEFAULTS | kept["model"]
    flat = {".".join(path): value for path, value in flatten(kept).items()}
    before = dict(added or {})
    return {
        name: json.loads(json.dumps(value))
        for name, value in flat.items()
        if name != "model.vocab_size" and not (name in before and before[name] == value)
    }


def _counts(name: str) -> bool:
    """Whether a name in a workdir's place says that something is there, and is not left of what was begun there."""
    return not name.endswith(".partial") and name != LEASE and not name.startswith(".probe-")


def model_config(path: pathlib.Path, settings: Settings) -> ModelConfig:
    """The model of a run's settings; CheckpointError naming the file if they describe none."""
    try:
        return ModelConfig.from_hf(settings["model"])
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from None


def variant_of(path: pathlib.Path, settings: Settings) -> Variant:
    """The variant of a run's settings; CheckpointError naming the file if there is no such one."""
    given = settings["variant"]
    known = {field.name for field in dataclasses.fields(Variant)}
    if not isinstance(given, dict) or not given.keys() <= known:
        raise CheckpointError(f"{path / CONFIG}: variant={given!r} is not an object of {', '.join(sorted(known))}")
    try:
        return Variant(**given)
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from None


def _refuse_differences(path: pathlib.Path, saved: Settings, now: Settings, changeable: tuple[str, ...]) -> None:
    differences = [
        f"{name} {saved.get(name, 'absent')!r} -> {now.get(name, 'absent')!r}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"workdir {path} holds another run (saved -> now): {', '.join(differences)}; use a new workdir "
            f"(only {', '.join(changeable)} may change when a run is resumed)"
        )


def _digest(identity: Settings) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def step_folder(path: pathlib.Path, step: int, only: str = "") -> pathlib.Path:
    """The folder of a step, whose files are as they were written; `only` one of its trees is looked at.

    Raises:
      CheckpointError: if they are not; the message says which earlier step there is.
    """
    folder = path / CHECKPOINTS / str(step)
    try:
        orbax_steps.verify(folder, only=only)
    except CheckpointError as error:
        earlier = max((s for s in orbax_steps.committed_steps(folder.parent) if s < step), default=None)
        advice = f"to go on from step {earlier}, remove {folder}" if earlier else "there is no earlier checkpoint"
        raise CheckpointError(f"{error}; {advice}") from None
    return folder


def _with_average_apart(named: Params) -> dict[str, Params]:
    """The trees that hold an optimizer's named leaves: an average of the weights has one of its own."""
    rest = {name: leaf for name, leaf in named.items() if name != AVERAGE}
    return {OPTIMIZER: rest} | ({AVERAGE: named[AVERAGE]} if AVERAGE in named else {})
