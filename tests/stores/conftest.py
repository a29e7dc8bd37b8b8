"""A server of gs:// for the tests of this folder, and a cache of their own."""

import pytest

import buckets


@pytest.fixture(scope="session", autouse=True)
def server(tmp_path_factory):
    with buckets.gs() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield url


@pytest.fixture
def address(request) -> str:
    """Of a folder of the bucket that nobody else uses."""
    return f"gs://{buckets.BUCKET}/{request.node.name}".replace("[", "-").replace("]", "")
