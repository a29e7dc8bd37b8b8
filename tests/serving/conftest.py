"""A small checkpoint, and services on it."""

import pathlib

import pytest
from served import SETTINGS, Scripted, scripted_service, write_checkpoint

from twotower_jax.checkpoint.load import load
from twotower_jax.execution import Execution
from twotower_jax.generation.placement import TowerMeshes
from twotower_jax.generation.settings import Settings
from twotower_jax.serving.start import make_service


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory, random_params) -> pathlib.Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "small", random_params)


@pytest.fixture(scope="package")
def scripted(checkpoint):
    """Makes a service whose engine has no model, and that engine."""

    def make(slots: int = 2, **options):
        engine = Scripted(checkpoint, slots)
        return scripted_service(checkpoint, engine, **options), engine

    return make


@pytest.fixture(scope="package")
def loaded(checkpoint):
    """The small model, as the command computes it, its parameters, and the folder."""
    return load(checkpoint, execution=Execution(scan_layers=True))


@pytest.fixture(scope="package")
def served(loaded):
    """Makes a service of the small model."""

    def make(settings: Settings = SETTINGS, **options):
        shape = {"name": "small", "slots": 4, "capacity": 100, "max_waiting": 60} | options
        return make_service(*loaded, settings, placement=TowerMeshes(), **shape)()

    return make
