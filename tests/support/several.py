"""The same requests through an engine in one process and in several. As a command, one of several processes:

    several.py HOST:PORT PROCESSES NUMBER

The first one prints what the rows got, as JSON.
"""

import json
import sys

import jax
import numpy as np

from twotower_jax import parameters, randomness
from twotower_jax.config import ModelConfig
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Engine, Request, Settings, tower_meshes
from twotower_jax.generation.processes import Leader, follow
from twotower_jax.sharding import MeshShape
from twotower_jax.train import distributed
from twotower_jax.two_tower import TwoTower


def engine(placement=None) -> Engine:
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        hybrid_override_pattern="M*",
        mamba_num_heads=4,
        mamba_head_dim=4,
        ssm_state_size=5,
        n_groups=2,
        chunk_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        initializer_range=0.3,
    )
    model = TwoTower(config)
    params = parameters.initialize(parameters.parameter_table(model), randomness.key(0))
    params = jax.tree.map(np.asarray, params)
    settings = Settings(batch_size=4, prefill_chunk=16)
    options = {} if placement is None else {"placement": placement}
    return Engine(model, params, settings, capacity=128, **options)


def requests() -> list[Request]:
    draw = np.random.default_rng(0)
    out = []
    for i in range(9):
        mode = ("diffusion", "ar", "diffusion")[i % 3]
        blocks = {"block_size": 8, "steps_per_block": 4, "confidence_threshold": 0.1} if mode == "diffusion" else {}
        sampling = SamplingConfig(temperature=0.5 * (i % 4), **blocks)
        prompt = draw.integers(4, 64, 1 + 5 * i).tolist()
        new = 6 + 3 * i
        out.append(Request(prompt=prompt, max_new_tokens=new, mode=mode, sampling=sampling, seed=i, logprobs=0))
    # Longer than what is always sent.
    return [
        *out,
        Request(prompt=[5] * 3, max_new_tokens=8, pinned={i: 9 + i for i in range(8)}, allowed={1: range(64)}),
    ]


def lead(engine) -> dict[int, list]:
    """Some rows from the start, some later, one of them canceled; what each got."""
    told, (first, second) = {}, (requests()[:5], requests()[5:])
    for request in first:
        engine.submit(request)
    steps = 0
    while engine.busy:
        steps += 1
        if steps == 3:
            for request in second:
                engine.submit(request)
            engine.cancel(8)
        for progress in engine.step():
            if progress.result is not None:
                told[progress.number] = [progress.result.tokens, progress.result.denoiser_evaluations]
    return told


def main(coordinator: str, processes: str, number: str) -> None:
    distributed.initialize(coordinator, int(processes), int(number))
    one = engine(tower_meshes(MeshShape(data=int(processes))))
    if int(number):
        follow(one)
    else:
        leader = Leader(one)
        print(json.dumps(lead(leader)))
        leader.close()
    distributed.leave(0, together=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
