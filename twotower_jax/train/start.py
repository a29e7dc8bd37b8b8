"""What a run starts from: tokenizer, model shape, first parameters, and the data as windows of tokens."""

import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from twotower_jax import memory, randomness
from twotower_jax.checkpoint.fingerprint import fingerprint
from twotower_jax.checkpoint.load import contents, load, stored_method
from twotower_jax.checkpoint.workdir import Base, Workdir, read_base
from twotower_jax.config import ModelConfig
from twotower_jax.data import load_tokenizer
from twotower_jax.data.mixture import Mixture
from twotower_jax.data.mixture_schedule import Run
from twotower_jax.data.opening import Data, Packing, Windows
from twotower_jax.data.tokenizer import id_range
from twotower_jax.data.windows import Concatenation
from twotower_jax.files import check_folder
from twotower_jax.memory import Room
from twotower_jax.mesh_check import check_fits
from twotower_jax.parameters import Params, parameter_table, unflatten
from twotower_jax.paths import as_path
from twotower_jax.sharding import MeshShape, stored_sharding
from twotower_jax.train.config import TrainConfig
from twotower_jax.train.objectives import Objective, make_objective
from twotower_jax.train.placement import choose_mesh
from twotower_jax.train.step import TrainState, abstract_state, make_optimizer, tables


class Start(NamedTuple):
    """All that the loop needs.

    Attributes:
      tokenizer_folder: the checkpoint that the tokenizer comes from; None where it comes with the data or a workdir.
      params: the first parameters of all of the model; None where they come from the workdir's checkpoint; an
        adapter's base does not.
      training, validation: windows of tokens; validation is None where nothing is held out.
      mesh: of the devices that the run uses; None for one.
      conversational: whether the windows say what each token counts.
      base: the checkpoint that an adapter is of; None without one.
    """

    tokenizer: Tokenizer
    model: ModelConfig
    objective: Objective
    params: Params | None
    training: Windows | Mixture
    validation: Windows | Concatenation | None
    mesh: Mesh | None
    tokenizer_folder: pathlib.Path | None = None
    conversational: bool = False
    base: Base | None = None


def make_start(config: TrainConfig, workdir: Workdir, report: Callable[[str], None] = lambda line: None) -> Start:
    """Reads all inputs, the first parameters last; see `read_inputs` and `with_params`."""
    return with_params(config, workdir, read_inputs(config, workdir, report))


def read_inputs(config: TrainConfig, workdir: Workdir, report: Callable[[str], None] = lambda line: None) -> Start:
    """Reads all inputs but parameters, and checks them against one another; writes nothing, reports what is left out.

    A workdir with a checkpoint comes first: tokenizer and model are its own. Then `init_from`; then random weights
    and a tokenizer that comes with the data or is trained on the text. The base of an adapter is read from `init_from`
    each time, and has to be the one that it was.

    Raises:
      ValueError, OSError: for inputs that are missing, broken, or do not fit together.
    """
    data, mesh = Data(config.data, report), choose_mesh(config.mesh)
    folder = None
    if config.init_from and read_base(as_path(config.init_from)) is not None:
        raise ValueError(
            f"init_from={config.init_from}: holds an adapter and not a whole model; launch/export.py --merge makes one "
            "of it"
        )
    base = _base(config, workdir) if config.lora.rank else None
    if workdir.step is not None and base is None:
        tokenizer, model = load_tokenizer(workdir.path), workdir.model
    elif config.init_from:
        # Any will do for a backbone, which takes the context tower alone.
        if (method := stored_method(config.init_from)) is not None:
            instead = f", and lora.base={method.name}" if base is not None else ""
            raise ValueError(
                f"init_from={config.init_from}: its weights are quantized ({method.name}), from which training cannot "
                f"start; give the checkpoint that it was made from{instead}"
            )
        folder = as_path(config.init_from)
        model, tokenizer = contents(folder).config, load_tokenizer(folder)
        if (used := id_range(tokenizer)) > model.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer gives ids up to {used - 1}, which lie outside the "
                f"model's vocab_size {model.vocab_size}"
            )
    else:
        tokenizer = data.tokenizer(config.vocab_size)
        model = config.model_config(id_range(tokenizer))
    if config.two_towers and config.variant.bidirectional_mamba and "M" not in model.hybrid_override_pattern:
        raise ValueError(
            "variant.bidirectional_mamba=True changes nothing: "
            f"hybrid_override_pattern={model.hybrid_override_pattern!r} has no Mamba-2 layer"
        )
    if mesh is not None:
        rows = config.batch_size // config.accumulate
        for block_size in config.block_sizes:
            check_fits(MeshShape(**mesh.shape), model, rows, config.sequence_length, block_size)
    objective = make_objective(config, model)
    check_memory(config, objective, mesh)
    align = math.lcm(*config.block_sizes)
    packing = Packing(
        sequence_length=config.sequence_length,
        vocab_size=model.vocab_size,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        align=align if config.reset_at_documents or data.conversational else None,
        end_tokens=model.eos_token_ids,
        turn_align=align if config.two_towers else 1,
        padding_weight=config.padding_weight,
        tokenizer_folder=workdir.path if workdir.step is not None else folder,
    )
    training, validation = data.windows(tokenizer, packing, Run(config.steps, config.batch_size))
    return Start(tokenizer, model, objective, None, training, validation, mesh, folder, data.conversational, base)


def with_params(config: TrainConfig, workdir: Workdir, start: Start) -> Start:
    """What was read, and the first parameters, unless the workdir's checkpoint has them.

    Raises:
      ValueError, OSError: for a checkpoint that is broken, or that does not become the run's model.
    """
    if workdir.step is not None and start.base is None:
        return start
    checkpoint = None
    if config.init_from:
        variant, method = config.variant if config.two_towers else None, config.lora.method
        quantize = None if method is None else method.name
        checkpoint = load(config.init_from, variant, config.execution, mesh=start.mesh, quantize=quantize).params
    return start._replace(params=_first_parameters(config, start.objective, checkpoint, start.mesh))


def _base(config: TrainConfig, workdir: Workdir) -> Base:
    """The checkpoint that the adapter of a run is of.

    Raises:
      ValueError: if there is none, or another than the run began with.
    """
    if not config.init_from:
        raise ValueError(f"config: lora.rank={config.lora.rank} needs init_from, a checkpoint to adapt")
    path = as_path(config.init_from)
    check_folder(path, "init_from has to be a checkpoint")
    base = Base(str(path.absolute()), fingerprint(path) or {})
    began = read_base(workdir.path) if workdir.step is not None else None
    if began is not None and began.towers != base.towers:
        raise ValueError(
            f"workdir {workdir.path}: its adapter is of another base than the one now in init_from={config.init_from}; "
            "put that back, or use a new workdir"
        )
    return base


def check_memory(config: TrainConfig, objective: Objective, mesh: Mesh | None, available: Room | None = None) -> None:
    """Refuses a run whose state and gradients, which are whole before any of them is used, the devices cannot hold.

    Activations come on top of them; compiling says how many (`check_room`).

    Args:
      available: what the devices have free; None asks them.

    Raises:
      ValueError: in one line, with the numbers.
    """
    optimizer = make_optimizer(config, tables(objective)[0])
    state, frozen = abstract_state(objective, optimizer, mesh)
    parts = {"trained weights": state.params, "optimizer": state.optimizer, "frozen": frozen, "gradients": state.params}
    fewer = _MOMENTS if config.moments_dtype == "float32" else ""
    memory.check_holds(_sizes(parts), _devices(mesh), "mesh.fsdp", fewer, available)


def check_room(
    config: TrainConfig, state: TrainState, frozen: Params, temporaries: int, mesh: Mesh | None,
    available: Room | None = None,
) -> None:  # fmt: skip
    """Refuses a run whose compiled step needs more than the devices have free, before its arrays are allocated.

    Args:
      state, frozen: as `abstract_state` has them. temporaries: bytes that the step needs on each device beside them,
        gradients and activations in them.
      available: what the devices have free; None asks them.

    Raises:
      ValueError: in one line, with the numbers.
    """
    needed = _sizes({"trained weights": state.params, "optimizer": state.optimizer, "frozen": frozen})
    fewer = f"accumulate={2 * config.accumulate} takes half as many rows at a time"
    if config.moments_dtype == "float32":
        fewer += f", {_MOMENTS}"
    needed["temporaries of the compiled step"] = temporaries
    memory.check_holds(needed, _devices(mesh), "mesh.fsdp", fewer, available)


_MOMENTS = 'moments_dtype="bfloat16" halves the optimizer'


def _sizes(parts: dict[str, Any]) -> dict[str, int]:
    return {kind: sum(map(memory.sharded_bytes, jax.tree.leaves(tree))) for kind, tree in parts.items()}


def _devices(mesh: Mesh | None) -> list[jax.Device]:
    return jax.devices()[:1] if mesh is None else list(mesh.devices.flat)


def _first_parameters(
    config: TrainConfig, objective: Objective, checkpoint: Params | None, mesh: Mesh | None
) -> Params:
    def draw() -> Params:
        return objective.start(None, randomness.key(config.seed))

    if checkpoint is not None:
        return objective.start(checkpoint, randomness.key(config.seed))
    if mesh is None:
        return draw()
    # Each device draws its part.
    table = parameter_table(objective.model)
    places = unflatten({path: stored_sharding(mesh, p.axes, p.shape) for path, p in table.items()})
    return jax.jit(draw, out_shardings=places)()
