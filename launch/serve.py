"""Serves a checkpoint over HTTP, in OpenAI's protocol.

    python launch/serve.py --checkpoint=DIR
    curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "The list object"}'

DIR is what launch/generate.py takes, and so are the flags of how to generate: here they are the defaults of requests. A
browser finds a page at / that shows blocks as they are denoised. --slots rows are computed together, each of at most
--capacity tokens, prompt and answer; --max_waiting more may wait. --adapter=NAME=DIR, which may be repeated, serves a
LoRA adapter beside the model: requests name it as their `model`, and all share one copy of the weights. Who may ask:
without --api_keys everybody who reaches the address, which is this machine's own unless --host says otherwise. SIGTERM,
or Ctrl-C, lets what was begun be finished; a second one does not. docs/guide/serving.md tells of the routes.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import asyncio
import importlib.util
import ipaddress
import sys

from absl import flags

from twotower_jax import command_line, generation_flags, model_flags
from twotower_jax.choices import APPLIED_TO

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(generation_flags)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0 or :: for all of this machine's.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen at; 0 takes a free one.", lower_bound=0, upper_bound=65535)
_SLOTS = flags.DEFINE_integer("slots", 8, "Rows computed together.", lower_bound=1)
_CAPACITY = flags.DEFINE_integer("capacity", 2048, "Tokens of a row, prompt and answer.", lower_bound=2)
_MAX_WAITING = flags.DEFINE_integer("max_waiting", 128, "Rows that may wait for a slot; more get 429.", lower_bound=0)
_API_KEYS = command_line.DEFINE_path(
    "api_keys", None, "File of keys, one a line, of which a client must give one.", local=True
)
_NAME = flags.DEFINE_string("served_model_name", None, "What clients call the model; default: the folder's name.")
_CORS = flags.DEFINE_multi_string(
    "cors_origin", [], "Origin whose web pages may ask, such as https://example.org; may be repeated."
)
_HOSTS = flags.DEFINE_multi_string(
    "allowed_host",
    [],
    "Name that requests may call the server by, as a proxy in front does; may be repeated. At an address of this "
    "machine alone localhost and the address are the only ones without it.",
)
_STEP_SECONDS = flags.DEFINE_float(
    "step_seconds", 600.0, "Of the engine, with compiling; after that it has failed. 0 waits for ever.", lower_bound=0
)
_PREFIX_CACHE_GB = flags.DEFINE_float(
    "prefix_cache_gb", 0.0, "Keep so much (GB of 10⁹ bytes) of prompts, for those that begin alike.", lower_bound=0
)
_ADAPTERS = flags.DEFINE_multi_string(
    "adapter", [], "NAME=DIR: a LoRA adapter in PEFT's files, which clients choose as `model`; may be repeated."
)
_ADAPTER_TOWER = flags.DEFINE_enum(
    "adapter_tower", None, APPLIED_TO, "Which tower adapters of a backbone change; see launch/generate.py."
)
_SEPARATE_TOWERS = flags.DEFINE_bool(
    "separate_towers", False, "Each tower on a mesh of its own, where both work at once; without --mesh on a device."
)
_WARMUP = flags.DEFINE_bool("warmup", False, "Compile what the default settings need before /ready says yes.")

if __name__ == "__main__":
    command_line.read_flags()

from twotower_jax import model_from_flags, settings_from_flags, strategy_flags
from twotower_jax.checkpoint import load
from twotower_jax.checkpoint.adapter import Adapter
from twotower_jax.paths import as_path, local_path


def _here(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _hosts() -> set[str] | None:
    """The names that it answers to; None for all."""
    if _here(_HOST.value):
        return {"localhost", "127.0.0.1", "[::1]", _HOST.value, f"[{_HOST.value}]", *_HOSTS.value}
    return set(_HOSTS.value) or None


def _adapters(name: str) -> dict[str, Adapter]:
    """Those of the flags by name, read and checked."""
    if not _ADAPTERS.value:
        command_line.refuse_given([_ADAPTER_TOWER], "without --adapter")
    found: dict[str, Adapter] = {}
    for given in _ADAPTERS.value:
        model, equals, folder = given.partition("=")
        if not (model and equals and folder):
            raise ValueError(f"--adapter={given} is not of the form NAME=DIR")
        if model in (name, *found):
            raise ValueError(f"--adapter={given}: {model!r} is the name of another model already")
        found[model] = load.read_adapter(local_path(folder), model_flags.CHECKPOINT.value)
    return found


def main() -> None:
    for package in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the package {package!r} is not installed; install it: pip install -e '.[serve]'")
    from twotower_jax.serving.app import make_app, read_keys
    from twotower_jax.serving.connection import bind, serve
    from twotower_jax.serving.limits import Limits
    from twotower_jax.serving.start import make_service

    strategy_flags.register()
    keys = read_keys(_API_KEYS.value) if _API_KEYS.value is not None else []
    settings = settings_from_flags.settings(batch_size=_SLOTS.value)
    listener = bind(_HOST.value, _PORT.value)
    if not keys and not _here(_HOST.value):
        print(f"warning: whoever reaches {_HOST.value} may ask: there is no --api_keys=FILE", file=sys.stderr)
    name = _NAME.value or as_path(model_flags.CHECKPOINT.value).resolve().name
    adapters = _adapters(name)
    loaded = model_from_flags.load_model(apart=_SEPARATE_TOWERS.value)
    beside = {one: model_from_flags.beside(loaded, found, _ADAPTER_TOWER.value) for one, found in adapters.items()}
    settings_from_flags.warn_of_unused()
    if settings.mode != "ar":
        model_from_flags.warn_if_untrained(loaded.folder, f"--mode={settings.mode}", "--mode=ar is the backbone itself")
    make = make_service(
        loaded.model,
        loaded.params,
        loaded.folder,
        settings,
        name=name,
        slots=_SLOTS.value,
        capacity=_CAPACITY.value,
        max_waiting=_MAX_WAITING.value,
        placement=loaded.placement,
        keys=keys,
        seed=settings.seed if generation_flags.SEED.present else None,
        prefix_cache_bytes=int(_PREFIX_CACHE_GB.value * 1e9),
        warm_up=_WARMUP.value,
        limits=Limits(step_seconds=_STEP_SECONDS.value),
        adapters=beside,
    )

    async def run() -> None:
        service = make()
        await serve(make_app(service, _CORS.value, _hosts()), service, listener)

    asyncio.run(run())


if __name__ == "__main__":
    command_line.run(main)
