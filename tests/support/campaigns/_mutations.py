"""Ways in which a checkpoint folder can be broken, each a function of a folder and a seeded generator."""

import json
import os
import pathlib
import pickle
import shutil
from collections.abc import Callable
from random import Random

Mutation = Callable[[pathlib.Path, Random], None]


def _weights(folder: pathlib.Path, rng: Random) -> pathlib.Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _split(path: pathlib.Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    blob = path.read_bytes()
    end = 8 + int.from_bytes(blob[:8], "little")
    return json.loads(blob[8:end]), blob[end:]


def _join(path: pathlib.Path, header: dict | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _flip(path: pathlib.Path, rng: Random, start: int = 0, stop: int | None = None) -> None:
    blob = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8))):
        blob[rng.randrange(start, len(blob) if stop is None else stop)] ^= 1 << rng.randrange(8)
    path.write_bytes(blob)


def _header_end(path: pathlib.Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


# Mutations of any file.


def truncate(path: pathlib.Path, rng: Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def append(path: pathlib.Path, rng: Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice((1, 8, 4096))))


def delete(path: pathlib.Path, rng: Random) -> None:
    path.unlink()


def rename(path: pathlib.Path, rng: Random) -> None:
    path.rename(path.with_name(f"renamed-{path.name}"))


def overwrite(path: pathlib.Path, rng: Random) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(rng.randrange(size))
        file.write(rng.choice((rng.randbytes, bytes))(min(64, size - file.tell())))


def be_folder(path: pathlib.Path, rng: Random) -> None:
    path.unlink()
    path.mkdir()


def be_pipe(path: pathlib.Path, rng: Random) -> None:
    path.unlink()
    os.mkfifo(path)


def be_link(path: pathlib.Path, rng: Random) -> None:
    target = rng.choice(("/dev/zero", "/etc/passwd", "missing", path.name, "/proc/self/mem"))
    path.unlink()
    path.symlink_to(target)


def flip(path: pathlib.Path, rng: Random) -> None:
    _flip(path, rng)


ANY_FILE = (truncate, append, delete, rename, overwrite, be_folder, be_pipe, be_link, flip)


# Mutations of a Hugging Face folder.


def any_file(folder: pathlib.Path, rng: Random) -> None:
    files = [*folder.glob("*.safetensors"), folder / "config.json", *folder.glob("*.index.json")]
    rng.choice(ANY_FILE)(rng.choice(sorted(files)), rng)


def duplicate_shard(folder: pathlib.Path, rng: Random) -> None:
    first, second = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    shutil.copy(first, second)


def swap_shards(folder: pathlib.Path, rng: Random) -> None:
    first, second = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def flip_header(folder: pathlib.Path, rng: Random) -> None:
    file = _weights(folder, rng)
    _flip(file, rng, 0, _header_end(file))


def flip_data(folder: pathlib.Path, rng: Random) -> None:
    file = _weights(folder, rng)
    _flip(file, rng, _header_end(file))


def header_length(folder: pathlib.Path, rng: Random) -> None:
    file = _weights(folder, rng)
    blob = file.read_bytes()
    size = rng.choice((0, 1, 2**63, 2**64 - 1, len(blob), len(blob) - 8, rng.randrange(2**20), rng.randrange(2**64)))
    file.write_bytes(size.to_bytes(8, "little") + blob[8:])


def header_entry(folder: pathlib.Path, rng: Random) -> None:
    """One tensor's description says something else."""
    file = _weights(folder, rng)
    header, data = _split(file)
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    start, stop = entry["data_offsets"]
    field, values = rng.choice(
        (
            ("dtype", ("F32", "BF16", "F16", "I32", "F64", "U8", "bf16", "", None, 7, ["F32"])),
            ("shape", (entry["shape"][::-1], [*entry["shape"], 1], [], [-1], [1.0], [True], [2**62, 4], "1", None, {})),
            ("shape", ([2 * entry["shape"][0], *entry["shape"][1:]], [0], [0, 2**70], [10**400])),
            ("data_offsets", ([start + 2, stop + 2], [start, stop + 2], [start, stop - 2], [stop, start], [0, stop])),
            ("data_offsets", ([start], [start, stop, 0], [float(start), stop], [-1, stop], None, "0", [2**64, 2**65])),
            ("extra", (1,)),
        )
    )
    entry[field] = rng.choice(values)
    if rng.random() < 0.1:
        del entry[rng.choice(sorted(entry))]
    if rng.random() < 0.05:
        header[name] = rng.choice((None, [], 3, "x"))
    _join(file, header, data)


def header_names(folder: pathlib.Path, rng: Random) -> None:
    """A tensor is gone, too much, or called otherwise."""
    file = _weights(folder, rng)
    header, data = _split(file)
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    kind = rng.randrange(5)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header["extra.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    elif kind == 2:
        header["extra.weight"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
        data += bytes(8)
    elif kind == 3:
        strange = ("", "\0", "../x", "a" * 5000, "\ud800", name + "x", name.upper(), "__metadata__", "{e}")
        header[rng.choice(strange)] = header.pop(name)
    else:
        other = rng.choice(sorted(set(header) - {"__metadata__"}))
        header[name], header[other] = header[other], header[name]
    _join(file, header, data)


def header_text(folder: pathlib.Path, rng: Random) -> None:
    """JSON that a lenient reader takes, or that costs a careless one its life."""
    file = _weights(folder, rng)
    header, data = _split(file)
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    text = json.dumps(header)
    twice = text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    many = json.dumps({f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)})
    choices = (twice, "[" * 100_000, '{"a":' * 5000, "[]", "", "null", text[:-1], text + " x", "\ufeff" + text,
               many, text.replace("{", "{ ", 1), "NaN", "9" * 5000, '{"__metadata__": 3}',
               text.replace('"', "'"))  # fmt: skip
    _join(file, rng.choice(choices), data)


def index_entry(folder: pathlib.Path, rng: Random) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    places = index["weight_map"]
    name = rng.choice(sorted(places))
    kind = rng.randrange(4)
    if kind == 0:
        del places[name]
    elif kind == 1:
        places["extra.weight"] = places[name]
    elif kind == 2:
        places[name] = rng.choice(sorted(set(places.values()) - {places[name]}))
    else:
        outside = str(folder.parent / "outside.safetensors")
        names = ("../outside.safetensors", outside, "", ".", "..", "x.py", "x.bin", "a/b.safetensors", 3, None, [],
                 "missing.safetensors", "\0.safetensors", "a" * 300 + ".safetensors")  # fmt: skip
        places[name] = rng.choice(names)
    file.write_text(json.dumps(index))


def index_text(folder: pathlib.Path, rng: Random) -> None:
    file = folder / "model.safetensors.index.json"
    text = file.read_text()
    twice = text.replace('"weight_map": {', '"weight_map": {"a": "b.safetensors", "a": "b.safetensors",', 1)
    half = text[: len(text) // 2]
    file.write_text(rng.choice(("", "[]", "{}", "null", '{"weight_map": []}', "[" * 100_000, half, twice)))


def config_field(folder: pathlib.Path, rng: Random) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    name = rng.choice(sorted(config))
    if rng.random() < 0.3:
        del config[name]
    else:
        values = (0, -1, 1, 3, 10**9, 10**30, 0.5, 1e400, None, True, "", "x", "M" * 5000, "ME" * 100, [], {}, [1, 2])
        config[name] = rng.choice(values)
    file.write_text(json.dumps(config))


def config_text(folder: pathlib.Path, rng: Random) -> None:
    file = folder / "config.json"
    text = file.read_text()
    file.write_text(rng.choice(("", "[]", "{}", "null", "3", "[" * 100_000, text[: len(text) // 2], text + "}", "\0")))


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def foreign_code(folder: pathlib.Path, rng: Random) -> None:
    """Pickles and code that make a folder `executed` if they ever run; sometimes nothing else is there."""
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    for name in ("modeling_nemotron_h.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text("import os; os.mkdir('executed')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    if rng.random() < 0.5:
        for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
            file.unlink()


HUGGING_FACE: dict[str, Mutation] = {
    "any file": any_file,
    "shard duplicated": duplicate_shard,
    "shards swapped": swap_shards,
    "header bits": flip_header,
    "data bits": flip_data,
    "header length": header_length,
    "header entry": header_entry,
    "header names": header_names,
    "header text": header_text,
    "index entry": index_entry,
    "index text": index_text,
    "config field": config_field,
    "config text": config_text,
    "pickles and code": foreign_code,
}


# Mutations of a converted checkpoint.


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def converted_file(folder: pathlib.Path, rng: Random) -> None:
    rng.choice(ANY_FILE)(rng.choice(_files(folder)), rng)


def converted_array(folder: pathlib.Path, rng: Random) -> None:
    flip(rng.choice([file for file in _files(folder) if file.name.startswith("c.")]), rng)


def converted_metadata(folder: pathlib.Path, rng: Random) -> None:
    names = ("zarr.json", "_METADATA", "config.json", "conversion.json")
    rng.choice((flip, overwrite, truncate))(rng.choice([file for file in _files(folder) if file.name in names]), rng)


def converted_swap(folder: pathlib.Path, rng: Random) -> None:
    first, second = rng.sample(_files(folder), 2)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def manifest_field(folder: pathlib.Path, rng: Random) -> None:
    file = folder / "conversion.json"
    manifest = json.loads(file.read_text())
    node, field = manifest, rng.choice(sorted(manifest))
    while isinstance(node[field], dict) and node[field] and rng.random() < 0.8:
        node, field = node[field], rng.choice(sorted(node[field]))
    if rng.random() < 0.3:
        del node[field]
    elif rng.random() < 0.3:
        node[rng.choice(("../x", "/etc/passwd", "", "\0", "new"))] = node.pop(field)
    else:
        node[field] = rng.choice((0, -1, 10**30, None, "", "x", [], {}, True, 0.5))
    file.write_text(json.dumps(manifest))


CONVERTED: dict[str, Mutation] = {
    "any file": converted_file,
    "array bits": converted_array,
    "metadata": converted_metadata,
    "files swapped": converted_swap,
    "conversion.json field": manifest_field,
}
