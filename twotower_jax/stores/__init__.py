"""Paths that are addresses of object stores: gs:// and s3:// to read and write, hf:// to read.

    path.py      `StorePath`, which has of pathlib's interface what this program uses; one is made by `paths.as_path`
    clients.py   one class for each kind of store, over gcsfs, s3fs and huggingface_hub: a request, and what it answers
    retrying.py  how long a request is tried again, and what is said when that is over
    lease.py     one writer at a time where there are no locks
    cache.py     copies on this machine's disk, within a limit, for readers that need a file

A store has objects and no folders: an object appears whole under its name, or not at all; nothing is renamed. Where an
object is written it is said what has to be there before (nothing, this very version, or whatever may be), and of two
writers one is refused. The libraries are imported when the first address is met (the extra `stores`).
"""

from twotower_jax.stores.retrying import Changed, StoreError, patient

__all__ = ["Changed", "StoreError", "patient"]
