"""Hugging Face folder → this program's checkpoint folder, streamed tensor by tensor.

Memory is bounded by the largest tensor and the window of `pipeline.py`, whatever the checkpoint's size: one thread
reads the source files from start to end, one hashes them, and several turn tensors into files of `arrays.py` and hash
those.
"""

import collections
import hashlib
import pathlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np

from twotower_jax import parameters, randomness
from twotower_jax.atomic import new_folder
from twotower_jax.checkpoint import arrays, huggingface, manifest
from twotower_jax.checkpoint.arrays import PARAMS
from twotower_jax.checkpoint.config_file import SMALL_FILES, read_small_file
from twotower_jax.checkpoint.manifest import Digest, Manifest, write_file
from twotower_jax.checkpoint.pipeline import in_order
from twotower_jax.checkpoint.plan import ConversionPlan, make_plan, segment_list
from twotower_jax.checkpoint.quantizing import quantize_tensor
from twotower_jax.checkpoint.safetensors_file import Entry, next_tensor
from twotower_jax.files import CheckpointError, open_regular, read_file
from twotower_jax.parameters import Parameter, Path
from twotower_jax.progress import Progress
from twotower_jax.quantization import SCALE_DTYPE, SCALES, VALUE_DTYPE, VALUES, Method, disk_table


def convert(
    source: pathlib.Path,
    output: pathlib.Path,
    *,
    time_init: str = "identity",
    name: str | None = None,
    revision: str | None = None,
    expected: Mapping[str, str] = {},  # noqa: B006 (never written)
    verify: bool = False,
    quantize: Method | None = None,
) -> Manifest:
    """Converts a folder; afterwards `output` holds a whole checkpoint, or nothing where anything went wrong.

    Args:
      source: a Hugging Face folder of either kind; only read.
      output: must not exist.
      time_init: for a single tower, see `make_plan`.
      name, revision: what the manifest says of the source; the folder's name where not given.
      expected: SHA-256 of source files, by name, that must be met.
      verify: reads source and result again and compares every tensor.
      quantize: how weights are stored in fewer bits, if so.

    Raises:
      CheckpointError: if the source is broken or not of this model.
      ValueError, OSError: if the output cannot be written, or arrays not be stored under such a path.
    """
    arrays.check_path(output)
    folder = huggingface.open_folder(source)
    if huggingface.is_packed(source):
        raise ValueError(
            f"{source}: it is packed; export it first (launch/export.py --checkpoint={source} --output=DIR)"
        )
    plan = make_plan(folder.config, folder.single_tower, time_init)
    on_disk = disk_table(plan.table, quantize)
    huggingface.check(folder, huggingface.own_table(folder))
    huggingface.say_ignored(folder)
    dtypes = _dtypes(folder, plan)
    with new_folder(output) as partial:
        files = _write_metadata(partial, on_disk, dtypes)
        source_files = _copy_small_files(folder.path, partial, expected)
        files |= {file: source_files[file] for file in source_files if file in SMALL_FILES}
        files |= _write_fresh(partial, plan)
        streamed, written = _stream(folder, plan, partial, expected, quantize)
        counts = _count_dtypes(plan, dtypes, quantize)
        result = Manifest(
            source=name or folder.path.resolve().name,
            revision=revision,
            kind="single_tower" if folder.single_tower else "two_tower",
            time_init=time_init if folder.single_tower else None,
            tensors=len(plan.places),
            parameters=parameters.count(plan.table),
            dtypes=counts,
            segments=segment_list(folder.config),
            source_files=source_files | streamed,
            files=files | written,
            quantization=None if quantize is None else quantize.describe(plan.table),
        )
        result.write(partial)
        if verify:
            _verify(folder, plan, partial, quantize)
    return result


def _dtypes(folder: huggingface.Folder, plan: ConversionPlan) -> dict[Path, np.dtype]:
    """The dtype of each array on disk: that of its tensors, which must agree."""
    dtypes: dict[Path, np.dtype] = dict.fromkeys(plan.fresh, np.dtype(np.float32))
    first: dict[Path, str] = {}
    for name, targets in plan.targets.items():
        tensor = folder.tensors[name]
        for target in targets:
            path = plan.places[target].parameter.path
            if dtypes.setdefault(path, tensor.entry.dtype) != tensor.entry.dtype:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name!r} is {tensor.entry.dtype}, {first[path]!r} of the same stack is "
                    f"{dtypes[path]}"
                )
            first.setdefault(path, name)
    return dtypes


def _count_dtypes(plan: ConversionPlan, dtypes: Mapping[Path, np.dtype], quantize: Method | None) -> dict[str, int]:
    """The number of tensors of each dtype, by name; of quantized ones by their bits."""
    counts: collections.Counter[str] = collections.Counter()
    for parameter in plan.table.values():
        layout = None if quantize is None else quantize.layout(parameter)
        name = str(dtypes[parameter.path]) if layout is None else f"int{layout[0]}"
        counts[name] += parameter.tensors.size
    return dict(sorted(counts.items()))


def _pieces(
    parameter: Parameter, index: tuple[int, ...], tensor: np.ndarray, quantize: Method | None
) -> Iterator[tuple[Parameter, np.ndarray]]:
    """The arrays on disk that hold a published tensor, each with its part of it, as `arrays.chunk_bytes` takes them."""
    if quantize is None or parameter.scales is None:
        yield parameter, tensor
    else:
        made = quantize_tensor(parameter, quantize, index, parameter.from_tensor(tensor))
        yield from zip(quantize.parts(parameter).values(), made, strict=True)


def _write_metadata(
    partial: pathlib.Path, on_disk: Mapping[Path, Parameter], dtypes: Mapping[Path, np.dtype]
) -> dict[str, Digest]:
    """Folders and metadata of all arrays; `dtypes` of those that are not quantized."""
    of_parts = {VALUES: VALUE_DTYPE, SCALES: SCALE_DTYPE}
    dtypes = {path: dtypes[path] if path in dtypes else of_parts[path[-1]] for path in on_disk}
    digests = {}
    for name, text in arrays.metadata(on_disk, dtypes).items():
        digests[f"{PARAMS}/{name}"] = write_file(partial / PARAMS / name, (text.encode(),))
    return digests


def _copy_small_files(source: pathlib.Path, partial: pathlib.Path, expected: Mapping[str, str]) -> dict[str, Digest]:
    """Configuration and tokenizer as they are; the index of the weights is only recorded."""
    digests = {}
    for name in (*SMALL_FILES, huggingface.INDEX):
        if (source / name).exists():
            data = read_small_file(source / name)
            digests[name] = manifest.digest_of(data)
            _check_expected(source / name, digests[name], expected)
            if name in SMALL_FILES:
                write_file(partial / name, (data,))
    return digests


def _write_fresh(partial: pathlib.Path, plan: ConversionPlan) -> dict[str, Digest]:
    """The time conditioning that a single tower does not bring."""
    values = parameters.flatten(parameters.initialize(plan.fresh, randomness.key(0)))
    digests = {}
    for path, parameter in plan.fresh.items():
        for index, _ in np.ndenumerate(parameter.tensors):
            tensor = parameter.to_tensor(np.asarray(values[path])[index])
            name = f"{PARAMS}/{arrays.chunk_name(parameter, index)}"
            digests[name] = write_file(partial / name, arrays.chunk_bytes(parameter, tensor))
    return digests


def _stream(
    folder: huggingface.Folder,
    plan: ConversionPlan,
    partial: pathlib.Path,
    expected: Mapping[str, str],
    quantize: Method | None,
) -> tuple[dict[str, Digest], dict[str, Digest]]:
    """All tensors; returns the digests of the source's files, of all that is in them, and of the files written."""
    by_file: dict[pathlib.Path, list[tuple[Entry, str]]] = collections.defaultdict(list)
    for name, tensor in (folder.tensors | folder.ignored).items():
        by_file[tensor.file].append((tensor.entry, name))
    progress = Progress("converting", sum(file.stat().st_size for file in by_file))
    sources: dict[str, Digest] = {}

    def read(hasher: Executor) -> Iterator[tuple[str, np.ndarray, Future]]:
        for file, tensors in by_file.items():
            tensors.sort(key=lambda item: (item[0].start, item[0].stop))
            with open_regular(file) as stream:
                digest = hashlib.sha256(stream.read(tensors[0][0].start))
                hashed = None
                for entry, name in tensors:
                    tensor = next_tensor(file, stream, entry)
                    hashed = hasher.submit(digest.update, tensor.reshape(-1).view(np.uint8).data)
                    if name in folder.ignored:
                        progress.add(tensor.nbytes)
                    else:
                        yield name, tensor, hashed
                hashed.result()
            sources[file.name] = Digest(tensors[-1][0].stop, digest.hexdigest())
            _check_expected(file, sources[file.name], expected)

    def write(item: tuple[str, np.ndarray, Future]) -> dict[str, Digest]:
        name, tensor, hashed = item
        written = {}
        for target in plan.targets[name]:
            parameter, index = plan.places[target]
            for array, part in _pieces(parameter, index, tensor, quantize):
                file = f"{PARAMS}/{arrays.chunk_name(array, index)}"
                written[file] = write_file(partial / file, arrays.chunk_bytes(array, part))
        hashed.result()
        progress.add(tensor.nbytes)
        return written

    digests: dict[str, Digest] = {}
    with ThreadPoolExecutor(1) as hasher:
        for written in in_order(read(hasher), write, lambda item: item[1].nbytes):
            digests |= written
    progress.finish()
    return sources, digests


def _check_expected(file: pathlib.Path, found: Digest, expected: Mapping[str, str]) -> None:
    if expected.get(file.name, found.sha256) != found.sha256:
        raise CheckpointError(
            f"{file}: its content has changed: SHA-256 is {found.sha256}, expected {expected[file.name]}"
        )


def _verify(folder: huggingface.Folder, plan: ConversionPlan, written: pathlib.Path, quantize: Method | None) -> None:
    """Reads source and result again and compares every tensor, or what it is when it is quantized again."""
    progress = Progress("verifying", sum(tensor.size for tensor in folder.tensors.values()))

    def compare(name: str) -> None:
        tensor = folder.tensors[name]
        data = tensor.read()
        for target in plan.targets[name]:
            parameter, index = plan.places[target]
            for array, part in _pieces(parameter, index, data, quantize):
                file = written / PARAMS / arrays.chunk_name(array, index)
                again = arrays.chunk_tensor(file, read_file(file), array, part.dtype)
                if not np.array_equal(part.view(np.uint8), arrays.contiguous(again).view(np.uint8)):
                    raise CheckpointError(f"{file}: differs from tensor {name!r} of {tensor.file}")
        progress.add(data.nbytes)

    for _ in in_order(plan.targets, compare, lambda name: folder.tensors[name].size):
        pass
    progress.finish()
