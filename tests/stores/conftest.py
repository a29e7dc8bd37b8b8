"""A server of gs:// for the tests of this folder, and a cache of their own."""

import pytest

import buckets


@pytest.fixture(scope="session", autouse=True)
def server(tmp_path_factory):
    with buckets.gs() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield url


@pytest.fixture(scope="module", autouse=True)
def online():
    """The Hub is asked here, a stand-in of it; other tests are kept from asking."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def s3():
    """Serves s3://bucket."""
    with buckets.s3():
        yield


@pytest.fixture
def address(request) -> str:
    """The address of a folder of the bucket that nobody else uses."""
    return f"gs://{buckets.BUCKET}/{request.node.name}".replace("[", "-").replace("]", "")
