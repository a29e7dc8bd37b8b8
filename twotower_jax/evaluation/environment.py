"""What lm_eval and `datasets` read of the environment as they are imported."""

import logging
import os
import socket
import urllib.parse

# Seconds to reach the Hub before data sets count as not to be downloaded.
_REACH = 3.0


def settle_environment() -> None:
    """Before lm_eval and `datasets` are imported: no bars of theirs, no processes of their own, and no waiting for a
    Hub that cannot be reached."""
    for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_MULTIPROC"):
        os.environ.setdefault(name, "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)
    if "HF_HUB_OFFLINE" not in os.environ and not _reaches_hub():
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def _reaches_hub() -> bool:
    """Whether the Hub, or the proxy that leads to it, takes a connection."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    proxy = next((os.environ[name] for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY") if os.environ.get(name)), "")
    address = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}" if proxy else endpoint)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname, port), _REACH):
            return True
    except (OSError, ValueError):
        return False
