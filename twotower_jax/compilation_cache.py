"""Programs that an earlier start of a command compiled, kept in the user's cache folder.

JAX's persistent cache does the work: what it stores is keyed by the program, the compiler's version and flags, and the
devices it was compiled for (processors: with their instruction sets), so that one folder serves all versions and
machines that share a home. Here it is given a place, a bound, and manners: where it cannot be used a command runs
without it.
"""

import contextlib
import os
import pathlib
import tempfile
import warnings

from absl import flags

from twotower_jax.paths import local_path

FLAG = "compilation_cache"
OFF = "off"

_MAX_BYTES = 2**30  # of all programs; those not used for longest make room.
_MIN_SECONDS = 0.01  # of compiling; what takes less is not worth a file.

flags.DEFINE_string(
    FLAG,
    None,
    f"Folder for compiled programs, which the next start then need not compile; or {OFF}. "
    "Default: JAX_COMPILATION_CACHE_DIR, or else twotower_jax in the user's cache folder.",
)


def enable(chosen: str | None, *, by_default: bool = True) -> pathlib.Path | None:
    """Lets JAX keep compiled programs from now on.

    Args:
      chosen: a folder, `OFF`, or None for what the environment says and then for the default.
      by_default: whether there is a default; a measurement of compiling wants none.

    Returns:
      The folder that is used; None if there is none, or if it is the environment's.

    Raises:
      OSError: a chosen folder cannot be written. A default one that cannot is not used, without a word.
    """
    import jax  # here, as `filelock` below, because what only shows --help need not wait for them

    if chosen == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if chosen is None and (given := jax.config.jax_compilation_cache_dir) is not None:
        if (path := local_path(given)) != given:  # JAX would make a folder named ~
            jax.config.update("jax_compilation_cache_dir", path)
        return None
    if chosen is None and not by_default:
        return None
    try:
        folder = default_folder() if chosen is None else pathlib.Path(local_path(chosen)).absolute()
        _prepare(folder, private=chosen is None)
    except (OSError, RuntimeError, NotImplementedError) as error:
        if chosen is None:
            return None
        raise OSError(f"--{FLAG}={chosen}: {getattr(error, 'strerror', None) or error}") from error
    settings = {
        "jax_compilation_cache_max_size": _MAX_BYTES,
        "jax_persistent_cache_min_compile_time_secs": _MIN_SECONDS,
    }
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A full disk, a lock that another process holds for long: then the program is compiled, and nothing is lost.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    warnings.filterwarnings("ignore", message="Cache value for key")
    return folder


def default_folder() -> pathlib.Path:
    """`twotower_jax/compiled` in the cache folder of the XDG base directory specification.

    Raises:
      RuntimeError: the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
    return home / "twotower_jax" / "compiled"


def _prepare(folder: pathlib.Path, *, private: bool) -> None:
    """Makes the folder, shows that it can be written, and clears it of what a killed process left half written.

    A program read from the cache is executed. So a default folder, which nobody named, has to be the user's own.

    Raises:
      OSError: it cannot be used.
      NotImplementedError: its file system has no locks.
    """
    import filelock

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if private and (state.st_uid != os.geteuid() or state.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written by others")
    with tempfile.TemporaryFile(dir=folder):
        pass
    # JAX holds this lock while it writes an entry and then the time of its last use, so that under the lock an entry
    # without a time is one whose writer died.
    with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile").acquire(timeout=0):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()
