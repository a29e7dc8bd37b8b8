"""The server on weights in fewer bits, in bfloat16, on meshes, and with each tower on devices of its own."""

import asyncio

import pytest
from served import SETTINGS, running

from twotower_jax.checkpoint.load import load
from twotower_jax.execution import Execution
from twotower_jax.generation.placement import TowerMeshes, parse_mesh, tower_meshes
from twotower_jax.parameters import cast, parameter_table
from twotower_jax.serving.start import make_service

BODIES = [{"prompt": [5 + k, 9], "max_tokens": 7, "seed": k, "return_token_ids": True} for k in range(3)]
BODIES += [BODIES[0] | {"temperature": 1.0, "n": 2, "return_step_map": True}]
BODIES += [BODIES[0] | {"guided_choice": ["yes", "no, item"], "temperature": 1.0}]
OTHER = [BODIES[1] | {"mode": "ar"}, BODIES[2] | {"mode": "speculative"}]
SCORED = {"prompt": [5, 6, 7, 8, 9], "max_tokens": 0, "echo": True, "logprobs": 1}


def answers(checkpoint, bodies: list[dict], placement=None, dtype="float32", quantize=None) -> list:
    """The choices for bodies, asked together and then each alone; and what is thought of a prompt."""
    placement = placement or TowerMeshes()
    execution = Execution(scan_layers=True, dtype=dtype)
    places = None if placement.context is None else placement.parameter_sharding
    model, params, folder = load(checkpoint, execution=execution, sharding=places, quantize=quantize)
    params = cast(parameter_table(model), params, dtype)
    shape = {"name": "small", "slots": 4, "capacity": 100, "max_waiting": 60, "placement": placement}

    async def run():
        async with running(make_service(model, params, folder, SETTINGS, **shape)()) as client:

            async def ask(body):
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                return answer.json()["choices"]

            together = await asyncio.gather(*map(ask, bodies))
            assert [await ask(body) for body in bodies] == together
            (scored,) = await ask(SCORED)
            assert (await client.get("/health")).status_code == 200
            return together, scored["logprobs"]["token_logprobs"]

    return asyncio.run(run())


@pytest.mark.whole
def test_weights_in_fewer_bits_are_served_in_bfloat16(checkpoint):
    found, scored = answers(checkpoint, BODIES[:1], dtype="bfloat16", quantize="int8")
    assert len(found[0][0]["token_ids"]) == 7 and len(scored) == 5


@pytest.mark.whole
@pytest.mark.parametrize(("dtype", "quantize"), [("bfloat16", "int8"), ("bfloat16", None), ("float32", "int4")])
def test_other_weights_are_served(checkpoint, dtype, quantize):
    """What is said is a row's own, and one of the choices is one of them."""
    found, scored = answers(checkpoint, BODIES, dtype=dtype, quantize=quantize)
    assert found[-1][0]["text"] in ("yes", "no, item")
    plain = answers(checkpoint, [])[1]
    # Rounding, and no other model.
    assert all(abs(one - other) < 0.2 for one, other in zip(scored[1:], plain[1:], strict=True))


@pytest.mark.whole
@pytest.mark.parametrize(("mesh", "apart"), [("data=4", False), ("fsdp=2", False), ("", True), ("data=2", True)])
def test_on_other_devices_it_says_the_same(checkpoint, mesh, apart):
    placement = tower_meshes(parse_mesh(mesh.split(",") if mesh else []), apart=apart)
    found, scored = answers(checkpoint, [*BODIES, *OTHER], placement)
    expected, plain = answers(checkpoint, [*BODIES, *OTHER])
    assert found == expected
    assert scored[1:] == pytest.approx(plain[1:], abs=1e-5)
