"""The engine's thread: who waits is told, and who leaves is forgotten, whatever happens."""

import asyncio
import threading

import pytest
from served import running

from twotower_jax.generation.request import Request
from twotower_jax.serving.errors import ApiError
from twotower_jax.serving.limits import Limits


def complete(client, **body):
    return client.post("/v1/completions", json={"prompt": [5], "max_tokens": 8} | body)


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def test_rows_get_their_tokens_and_free_their_places(scripted):
    async def run():
        service, engine = scripted(slots=2, places=40)
        async with running(service) as client:
            answers = await asyncio.gather(*(complete(client, prompt=[k], return_token_ids=True) for k in range(40)))
            for k, answer in enumerate(answers):
                assert answer.status_code == 200
                assert answer.json()["choices"][0]["token_ids"] == [*range(k + 1, k + 9)]
            assert service.loop.taken == 0 and not engine.busy

    asyncio.run(run())


def test_a_full_queue_is_said_with_when_to_try_again(scripted):
    async def run():
        service, engine = scripted(slots=1, places=3)
        async with running(service) as client:
            engine.hold = True
            held = [asyncio.create_task(complete(client)) for _ in range(3)]
            await until(lambda: engine.running + engine.waiting == 3)
            refused = await complete(client)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "queue_full"
            # What can never be taken is no matter of trying again.
            assert (await complete(client, n=4)).json()["error"]["param"] == "n"
            assert (await complete(client, prompt=[[1]] * 4)).json()["error"]["param"] == "prompt"
            engine.hold = False
            assert [answer.status_code for answer in await asyncio.gather(*held)] == [200] * 3
            assert (await complete(client, n=3)).status_code == 200

    asyncio.run(run())


def test_one_row_fails_alone(scripted):
    async def run():
        service, engine = scripted(slots=4)
        engine.bad = {7}
        async with running(service) as client:
            bad, good = await asyncio.gather(complete(client, prompt=[7]), complete(client, prompt=[8]))
            assert (bad.status_code, good.status_code) == (500, 200)
            assert "not finite" in bad.json()["error"]["message"]
            # With a status of its own, or in the stream, if that had begun.
            assert '"row_failed"' in (await complete(client, prompt=[7], stream=True)).text
            assert (await client.get("/health")).status_code == 200
            assert service.loop.taken == 0

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_turns_red_and_leaves_nobody_waiting(scripted, stream):
    async def run():
        service, engine = scripted(slots=1)
        async with running(service) as client:
            engine.hold = True
            held = [asyncio.create_task(complete(client, stream=stream)) for _ in range(3)]
            await until(lambda: engine.running + engine.waiting == 3)
            engine.fail_at = engine.steps + 2
            async with asyncio.timeout(10):
                answers = await asyncio.gather(*held)
            for answer in answers:
                assert answer.status_code == (200 if stream else 500)
                assert "RuntimeError: the device is on fire" in answer.text
            health, ready, more = [await client.get("/health"), await client.get("/ready"), await complete(client)]
            assert (health.status_code, ready.status_code, more.status_code) == (503, 503, 503)
            assert health.json()["error"] == "RuntimeError: the device is on fire"
            async with asyncio.timeout(10):
                await service.loop.drain()

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_hangs_turns_red_and_leaves_nobody_waiting(scripted, stream):
    async def run():
        service, engine = scripted(slots=1, limits=Limits(step_seconds=0.05))
        async with running(service) as client:
            now = 0.0
            service.loop.clock = lambda: now
            assert (await complete(client)).status_code == 200
            await until(lambda: service.loop._since is None)
            now += 1  # Nothing to do is no step.
            await asyncio.sleep(0.1)
            assert (await client.get("/health")).status_code == 200
            engine.hold = True
            held = [asyncio.create_task(complete(client, stream=stream)) for _ in range(3)]
            await until(lambda: engine.running + engine.waiting == 3)
            engine.hang = threading.Event()
            await until(lambda: engine.hangs)
            now += 1
            async with asyncio.timeout(10):
                answers = await asyncio.gather(*held)
            said = "a step has not come to an end within 0.05 seconds"
            for answer in answers:
                assert answer.status_code == (200 if stream else 500)
                assert said in answer.text
            health, ready, more = [await client.get("/health"), await client.get("/ready"), await complete(client)]
            assert (health.status_code, ready.status_code, more.status_code) == (503, 503, 503)
            assert health.json()["error"] == said
            # It comes to an end after all, too late: the thread ends, and nothing else changes.
            engine.hang.set()
            await until(lambda: not service.loop._thread.is_alive())
            assert (await client.get("/health")).json()["error"] == said

    asyncio.run(run())


def test_an_engine_that_cannot_be_made_is_said(scripted):
    async def run():
        service, _ = scripted()
        service.loop._make = lambda: 1 / 0
        async with running(service) as client:
            assert (await client.get("/health")).json()["error"] == "ZeroDivisionError: division by zero"
            assert (await complete(client)).status_code == 503

    asyncio.run(run())


def test_what_the_engine_refuses_is_a_bad_request(scripted):
    async def run():
        service, engine = scripted()
        async with running(service) as client:
            with pytest.raises(ApiError) as caught, service.loop.enter(1) as group:
                group.submit([Request(prompt=[1] * 1001, max_new_tokens=4)])
                await group.tickets[0].accepted()
            assert caught.value.status == 400 and "too long" in caught.value.message
            assert (await complete(client)).status_code == 200
            await until(lambda: service.loop.taken == 0)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_at_the_next_step(scripted, stream):
    async def run():
        service, engine = scripted(slots=1)
        async with running(service) as client:
            engine.hold = True
            task = asyncio.create_task(complete(client, stream=stream))
            await until(lambda: engine.running == 1)
            other = asyncio.create_task(complete(client))
            await until(lambda: engine.waiting == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: engine.canceled == [0])
            steps = engine.steps
            await until(lambda: engine.steps > steps + 1)
            assert (engine.running, engine.waiting) == (1, 0)
            engine.hold = False
            assert (await other).status_code == 200
            assert service.loop.taken == 0

    asyncio.run(run())


def test_draining_takes_no_more_and_finishes_what_was_begun(scripted):
    async def run():
        service, engine = scripted(slots=1)
        async with running(service) as client:
            engine.hold = True
            begun = [asyncio.create_task(complete(client)) for _ in range(2)]
            await until(lambda: engine.running + engine.waiting == 2)
            service.draining = True
            refused, ready, health = await complete(client), await client.get("/ready"), await client.get("/health")
            assert (refused.status_code, ready.status_code, health.status_code) == (503, 503, 200)
            assert ready.json() == {"status": "draining"}
            drained = asyncio.create_task(service.loop.drain())
            await asyncio.sleep(0.02)
            assert not drained.done()
            engine.hold = False
            assert [answer.status_code for answer in await asyncio.gather(*begun)] == [200, 200]
            await asyncio.wait_for(drained, 10)

    asyncio.run(run())


def test_a_server_is_not_ready_before_its_engine_is(scripted):
    async def run():
        service, _ = scripted(limits=Limits())
        import httpx

        from twotower_jax.serving.app import make_app

        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(make_app(service)), base_url="http://test"
        ) as client:
            assert (await client.get("/ready")).json() == {"status": "starting"}
            assert (await complete(client)).headers["retry-after"] == "1"
            assert (await client.get("/health")).status_code == 200

    asyncio.run(run())
