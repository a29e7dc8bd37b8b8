"""The generation engine: rows that do not depend on each other, ends, counts, scores, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import call_of

from twotower_jax import memory
from twotower_jax.config import ModelConfig
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import (
    DenoiserRow,
    Engine,
    Request,
    Settings,
    generate,
    positions,
    scheduling,
    score_ar,
    score_denoiser,
)
from twotower_jax.generation import engine as engine_module
from twotower_jax.generation.blocks import block
from twotower_jax.generation.engine import in_order, iter_steps, start
from twotower_jax.generation.scheduling import bucket, piece_width, reads_narrow
from twotower_jax.generation.slots import Piece, allocate, cache_bytes, end_token_array, prefill
from twotower_jax.generation.stops import cut
from twotower_jax.parameters import bind, flatten, unflatten
from twotower_jax.two_tower import TwoTower

# Whatever their prompts and limits, tests share what is compiled for a batch: caches have few sizes.
PROMPTS = [[5], [9, 8, 7], list(range(10, 42)), [306, 158, 215, 23, 496]]
SAMPLING = SamplingConfig(block_size=8, steps_per_block=4, confidence_threshold=0.3)
DIFFUSION = Settings(max_new_tokens=20, sampling=SAMPLING, ignore_eos=True, batch_size=4)
SAMPLED = dataclasses.replace(SAMPLING, temperature=1.0, top_p=0.9)


@pytest.fixture(scope="module")
def tiny(small_config, random_params):
    """A layer of each kind that has a cache is enough here, and compiles fast."""
    model = TwoTower(small_config("M*", vocab_size=512))
    return model, random_params(model)


def run(tiny, prompts, settings, **options):
    return list(generate(*tiny, prompts, settings, **options))


@pytest.fixture(scope="module")
def together(tiny):
    return run(tiny, PROMPTS, DIFFUSION)


@pytest.mark.whole
def test_lengths_counts_and_masks(tiny, together):
    mask = tiny[0].config.mask_token_id
    for result, prompt in zip(together, PROMPTS, strict=True):
        assert result.prompt_ids == prompt
        assert len(result.tokens) == 20
        assert mask not in result.tokens
        assert 3 <= result.denoiser_evaluations <= 3 * 4
        assert result.context_evaluations == 3  # The prompt and two of three blocks.


@pytest.mark.whole
def test_a_row_gets_what_it_gets_alone(tiny, together):
    """Batches of one have other shapes, so other matrix products: only the tokens can be equal, and must be."""
    alone = [run(tiny, [prompt], dataclasses.replace(DIFFUSION, batch_size=1))[0] for prompt in PROMPTS]
    assert alone == together


def test_order_and_neighbors_do_not_matter(tiny, together):
    backwards = run(tiny, PROMPTS[::-1], DIFFUSION)
    assert backwards[::-1] == together


@pytest.mark.whole
def test_rows_that_finish_make_room_and_nobody_notices(tiny, together):
    """Rows of many lengths through two slots: each gets what it gets alone, in no more blocks than there is work."""
    limits = [20, 3, 1, 20, 12, 5, 20, 8]
    rows = [PROMPTS[i % 4] for i in range(8)]
    settings = dataclasses.replace(DIFFUSION, sampling=SAMPLED, batch_size=4)
    engine = Engine(*tiny, settings, capacity=64, slots=2)
    assert [engine.submit(row, limit) for row, limit in zip(rows, limits, strict=True)] == list(range(8))
    # The same row numbers, and so the same random numbers, in a table of another size.
    expected = run(tiny, rows, settings)
    results, calls, blocks = {}, 0, 0
    while engine.busy:
        calls += 1
        for progress in engine.step():
            blocks += 1
            if progress.result is not None:
                results[progress.number] = progress.result
    for number, limit in enumerate(limits):
        assert results[number].tokens == expected[number].tokens[:limit]
    needed = sum(-(-limit // 8) for limit in limits)
    assert blocks == needed
    assert calls == -(-needed // 2)  # Both slots were in use from the first call to the last.


def test_neighbors_change_no_bit(tiny):
    """A table of the confidences of every step, in a table of one size."""
    first = run(tiny, [PROMPTS[3], PROMPTS[1], PROMPTS[2], PROMPTS[1]], DIFFUSION, record_trace=True)[0]
    other = run(tiny, [PROMPTS[3], PROMPTS[2], PROMPTS[0], PROMPTS[0]], DIFFUSION, record_trace=True)[0]
    assert first == other
    assert first.trace[0].confidence != [0.0] * 8
    assert [s.tokens for s in first.trace[:-1]] != [s.xt for s in first.trace[1:]]
    assert sum(len(s.committed) for s in first.trace) == 24


@pytest.mark.whole
def test_routing_is_that_of_the_forward_pass(small_config, random_params):
    """At every step, layer by layer: the router's choice on what enters the experts; recording it changes no token."""
    model = TwoTower(small_config("E", vocab_size=512))
    params = random_params(model)
    plain = run((model, params), PROMPTS, DIFFUSION, record_trace=True)[3]
    assert plain.trace[0].experts is None
    engine = start(model, params, PROMPTS, DIFFUSION, record_trace=True, record_routing=True)
    result = list(in_order(progress for steps in iter_steps(engine) for progress in steps))[3]
    assert result.tokens == plain.tokens
    step = result.trace[1]

    @jax.jit
    def evaluate(params, prompt, xt, t):
        bound = bind(model, params)
        _, cache = bound.prefill(prompt, jnp.array([5]), 8)
        return bound.denoise_with_routing(xt, t, cache)[1]

    # In the first block the context is the prompt.
    experts = evaluate(params, np.array([PROMPTS[3]]), np.array([step.xt]), np.float32([step.t]))
    assert experts.shape == (1, 1, 8, 3)
    assert experts[:, 0].tolist() == step.experts


@pytest.mark.whole
def test_routing_is_in_the_order_of_the_layers(small_config, random_params):
    """Stacked ones included: each layer is made to prefer the expert of its number."""
    model = TwoTower(small_config("EEMEEM*E"))
    flat = flatten(random_params(model))
    for path, value in flat.items():
        if path[0] == "denoiser_tower" and path[-1] == "bias":
            layers = {("segment_0", "layer_0"): [0, 2], ("segment_0", "layer_1"): [1, 3]}.get(path[1:3], 4)
            flat[path] = jnp.zeros_like(value) + 100.0 * jax.nn.one_hot(jnp.array(layers), 8)

    @jax.jit
    def evaluate(params):
        bound = bind(model, params)
        _, cache = bound.prefill(jnp.full((2, 3), 5), jnp.array([3, 2]), 8)
        return bound.denoise_with_routing(jnp.full((2, 4), 3), jnp.ones(2), cache)[1]

    experts = evaluate(unflatten(flat))
    assert experts.shape == (5, 2, 4, 3)
    assert (experts[..., 0] == jnp.arange(5)[:, None, None]).all()


@pytest.mark.whole(but=["diffusion"])
@pytest.mark.parametrize("mode", ["diffusion", "ar", "mock_ar"])
def test_prompts_may_be_read_in_pieces(tiny, mode):
    settings = dataclasses.replace(DIFFUSION, mode=mode, max_new_tokens=6)
    whole = run(tiny, PROMPTS, settings)
    assert run(tiny, PROMPTS, dataclasses.replace(settings, prefill_chunk=7)) == whole


@pytest.mark.parametrize(
    "left, chunk, widths",
    [(0, 512, (64, 16)), (16, 512, (64, 16)), (17, 512, (64, 32)), (32, 512, (64, 32)), (33, 512, (64, 64))]
    + [(64, 512, (64, 64)), (65, 512, (256, 256)), (300, 512, (512, 512)), (9, 8, (8, 8)), (20, 24, (24, 24))],
)
def test_widths_of_pieces(left, chunk, widths):
    assert tuple(piece_width(left, chunk, narrow) for narrow in (False, True)) == widths


class Asked:
    """A table that notes what it is to read, up to the first block."""

    apart = False

    def __init__(self, *_, **__):
        self.pieces = []

    def read(self, piece, *, first, state, alternatives, adapter):
        self.pieces.append((*piece.ids.shape, first, state))

    def block(self, *_):
        raise StopIteration


@pytest.mark.parametrize(
    "slots, request_, asked",
    [
        (1, {"mode": "diffusion"}, [(1, 32, False, False)]),
        (1, {"mode": "diffusion", "context_logprobs": True}, [(1, 32, False, True)]),
        (1, {"mode": "ar"}, [(1, 32, True, True)]),
        (2, {"mode": "diffusion"}, [(2, 32, False, False)]),
    ],
)
def test_a_prompt_is_read_in_a_piece_that_suits_it(tiny, slots, request_, asked):
    """In a narrow one, and no further up than somebody looks."""
    engine = Engine(*tiny, DIFFUSION, capacity=64, slots=slots, table=Asked)
    for _ in range(slots):
        engine.submit(Request(prompt=[5] * 20, max_new_tokens=8, sampling=SAMPLING, **request_))
    with pytest.raises(StopIteration):
        engine.step()
    assert engine._rows.pieces == asked
    assert not reads_narrow("gpu")


@pytest.mark.parametrize(
    "lengths, asked",
    [((10, 20), [(2, 32)]), ((10, 40), [(2, 64)]), ((5, 9), [(2, 16)]), ((10, 90), [(2, 16), (2, 256)])],
)
def test_prompts_read_together_share_the_width_that_the_longest_needs(tiny, lengths, asked):
    """Those that need more than 64 are read apart from the others."""
    engine = Engine(*tiny, DIFFUSION, capacity=256, slots=2, table=Asked)
    for length in lengths:
        engine.submit(Request(prompt=[5] * (length + 1), max_new_tokens=8, sampling=SAMPLING))
    with pytest.raises(StopIteration):
        engine.step()
    assert [piece[:2] for piece in engine._rows.pieces] == asked


def test_a_state_that_nobody_looks_at_is_not_computed(tiny):
    """And the cache is the same to the last bit."""
    model, params = tiny
    rows = [None]
    piece = Piece(
        ids=np.arange(5, 21, dtype=np.int32)[None],
        lengths=np.array([13], np.int32),
        slot=np.zeros(1, np.int32),
        first=np.ones(1, bool),
        last=np.ones(1, bool),
        limit=np.full(1, 8, np.int32),
        unread=np.full(1, 17, np.int32),
        draws=scheduling.draws(rows),
        eos=scheduling.end_tokens(rows, 4),
        given=scheduling.given(rows, [0], 1, model.config),
    )
    caches, flops = [], []
    for state in (True, False):
        slots = allocate(model=model, batch=1, capacity=64)
        compiled = prefill.lower(params, slots, piece, model=model, first=False, state=state).compile()
        flops.append(compiled.cost_analysis()["flops"])
        caches.append(compiled(params, slots, piece)[0].cache)
    assert all(map(np.array_equal, *map(jax.tree.leaves, caches)))
    queries = 2 * (2 * 16 * 16 * 24)  # The products that give the last layer's queries and its output.
    assert flops[0] - flops[1] > queries


@pytest.mark.whole
def test_a_long_prompt_does_not_hold_up_the_others(tiny):
    """While a row is generated, a prompt is read one piece a block."""
    settings = dataclasses.replace(DIFFUSION, prefill_chunk=7)
    engine = Engine(*tiny, settings, capacity=64, slots=2)
    engine.submit(PROMPTS[0])
    assert [p.number for p in engine.step()] == [0]
    engine.submit(PROMPTS[2])  # 32 tokens, five pieces.
    assert [p.number for p in engine.step()] == [0]
    last = engine.step()
    assert [p.number for p in last] == [0]
    assert last[0].result is not None
    results = [p.result for _ in range(3) for p in engine.step()]
    assert results[-1].tokens == run(tiny, [PROMPTS[0], PROMPTS[2]], settings)[1].tokens


STRATEGIES = [
    {"strategy": "posterior", "schedule": "cosine", "confidence_threshold": 0.8},
    {"strategy": "predict_and_noise", "schedule": "exponential", "confidence_threshold": 0.8},
    {"strategy": "remasking", "strategy_options": {"doubt_threshold": 0.9}},
]


@pytest.mark.whole(but=["strategy2"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_is_reproducible_by_row(tiny, strategy):
    sampling = dataclasses.replace(SAMPLED, **strategy)
    settings = dataclasses.replace(DIFFUSION, sampling=sampling, max_new_tokens=12)
    results = run(tiny, PROMPTS, settings)
    for r in results:
        assert tiny[0].config.mask_token_id not in r.tokens
        assert r.blocks == 2
        assert 2 <= r.denoiser_evaluations <= 2 * 4
    assert run(tiny, [*PROMPTS[:3], PROMPTS[0]], settings)[:3] == results[:3]


def test_other_knobs_compile_nothing(tiny):
    """Every number of a strategy is an argument of the compiled block."""
    for name, options in [("remasking", {"doubt_threshold": 0.5}), ("factor", {"factor": 1.5})]:
        first = dataclasses.replace(DIFFUSION, sampling=SamplingConfig(8, 4, name), max_new_tokens=8)
        run(tiny, PROMPTS, first)
        compiled = block._cache_size()
        run(tiny, PROMPTS, dataclasses.replace(first, sampling=SamplingConfig(8, 4, name, strategy_options=options)))
        assert block._cache_size() == compiled


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_more_tokens_or_the_same_model_again_compile_nothing(tiny, mode):
    """What is compiled is for a size of caches that many lengths share, and for what a model is made of."""
    settings = dataclasses.replace(DIFFUSION, mode=mode)
    first = run(tiny, PROMPTS, settings)
    compiled = [function._cache_size() for function in (block, prefill)]
    longer = run(tiny, PROMPTS, dataclasses.replace(settings, max_new_tokens=60))
    assert [r.tokens for r in first] == [r.tokens[:20] for r in longer]
    again = TwoTower(tiny[0].config), tiny[1]
    assert [r.tokens for r in run(again, PROMPTS, settings)] == [r.tokens for r in first]
    assert [function._cache_size() for function in (block, prefill)] == compiled


@pytest.mark.parametrize("length, room", [(1, 256), (256, 256), (257, 384), (385, 512), (700, 768), (10**6, 2**20)])
def test_sizes_of_caches(length, room):
    assert bucket(length) == room


def test_little_memory_is_spent_on_fewer_sizes(tiny, monkeypatch):
    """The caches are as large as they have to be where rounding up would take much, or more than is allowed."""
    prompt = [[5] * 1025]
    assert start(*tiny, prompt, DIFFUSION).capacity == 1536
    tight = dataclasses.replace(DIFFUSION, max_cache_gb=cache_bytes(tiny[0], 1, 1100) / 1e9)
    assert start(*tiny, prompt, tight).capacity == 1088
    monkeypatch.setattr(
        engine_module, "_SPARE_BYTES", cache_bytes(tiny[0], 1, 1536) - cache_bytes(tiny[0], 1, 1088) - 1
    )
    assert start(*tiny, prompt, DIFFUSION).capacity == 1088


def _letters(tokens):
    return "".join(chr(ord("a") + t % 26) for t in tokens)


@pytest.mark.whole
@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_stop_texts(tiny, mode, together):
    """A stop text inside a block ends the row where it is complete; the text ends before it."""
    settings = dataclasses.replace(DIFFUSION, mode=mode)
    endless = together if mode == "diffusion" else run(tiny, PROMPTS, settings)
    texts = [_letters(r.tokens) for r in endless]
    stop = texts[2][9:11]
    results = run(tiny, PROMPTS, dataclasses.replace(settings, stop=("not there", stop)), decode=_letters)
    assert results[2].finish_reason == "stop"
    for result, text, full in zip(results, texts, endless, strict=True):
        place = text.find(stop)
        assert result.text == (text if place < 0 else text[:place])
        assert result.tokens == (full.tokens if place < 0 else full.tokens[: place + 2])
        assert result.finish_reason == ("length" if place < 0 else "stop")


@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        ("abcd", {"limit": 9}, ("abcd", None, None)),
        ("abcd", {"limit": 3}, ("abc", "length", None)),
        ("abcd", {"limit": 4}, ("abcd", "length", None)),
        ("abcd", {"limit": 3, "eos": "d"}, ("abc", "length", None)),
        ("abcb", {"limit": 4, "eos": "b"}, ("ab", "eos", None)),
        ("abcd", {"limit": 9, "eos": "dcx"}, ("abc", "eos", None)),
        ("abcd", {"limit": 9, "stop": ["cd", "bc"]}, ("abc", "stop", "a")),
        ("abcd", {"limit": 2, "stop": ["bc"]}, ("ab", "length", "ab")),
        ("abcd", {"limit": 9, "eos": "c", "stop": ["bc"]}, ("abc", "stop", "a")),
        ("abcd", {"limit": 9, "eos": "b", "stop": ["bc"]}, ("ab", "eos", "ab")),
        ("aXcd", {"limit": 9, "stop": ["yz"]}, ("aX", "stop", "ax")),  # X is a token of three letters.
        ("aXcd", {"limit": 9, "stop": ["zc"]}, ("aXc", "stop", "axy")),
    ],
)
def test_where_a_row_is_cut(tokens, options, expected):
    def decode(ids):
        return "".join(map(chr, ids)).replace("X", "xyz")

    if "eos" in options:
        options = options | {"eos": tuple(map(ord, options["eos"]))}
    found = cut([ord(t) for t in tokens], decode=decode if "stop" in options else None, **options)
    assert ("".join(map(chr, found.tokens)), found.reason, found.text) == expected


def test_stop_texts_need_a_tokenizer(tiny):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generate(*tiny, PROMPTS, dataclasses.replace(DIFFUSION, stop=("x",)))


def test_caches_that_do_not_fit_are_refused(tiny):
    # 32 + 24 + 8 positions at most, in multiples of 64: keys, values, states, convolutions, the newest token's final
    # state, and 17 bytes of counts.
    row = 64 * 2 * 2 * 4 * 4 + 6 * 4 * 5 * 4 + 4 * (24 + 2 * 15) * 4 + 16 * 4 + 17
    assert cache_bytes(tiny[0], 4, 64) == 4 * row
    settings = dataclasses.replace(DIFFUSION, max_cache_gb=3.5 * row / 1e9)
    with pytest.raises(ValueError, match=r"4 rows of 64 positions need .* GB.*max_cache_gb.*lower batch_size to 3,"):
        generate(*tiny, PROMPTS, settings)
    generate(*tiny, PROMPTS, dataclasses.replace(settings, batch_size=3))


def test_a_machine_that_cannot_hold_the_caches_is_asked_first(tiny, monkeypatch):
    """Processors too, which share their memory; their allocator would fail, or the system end the process."""
    with pytest.raises(ValueError, match=r"need .* GB, and this machine has free .* GB; .* max_new_tokens"):
        generate(*tiny, PROMPTS, dataclasses.replace(DIFFUSION, max_new_tokens=2**31 - 1))
    monkeypatch.setattr(memory, "room", lambda devices: pytest.fail("asked for very little"))
    generate(*tiny, PROMPTS, DIFFUSION)
    monkeypatch.setattr(engine_module, "_SPARE_BYTES", 0)
    monkeypatch.setattr(memory, "room", lambda devices: None)  # Nothing says.
    generate(*tiny, PROMPTS, DIFFUSION)


def test_rows_that_do_not_fit_their_slot_are_refused(tiny):
    engine = Engine(*tiny, DIFFUSION, capacity=positions(40, 20, DIFFUSION), slots=1)
    engine.submit(PROMPTS[2])
    with pytest.raises(ValueError, match="prompt 2 needs 256 cache positions, and a slot has 128"):
        engine.submit([4] * 150)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        engine.submit([4], 0)


@pytest.mark.whole(but=["speculative"])
@pytest.mark.parametrize("mode", ["ar", "mock_ar", "diffusion", "speculative"])
def test_the_cache_exists_once(small_config, random_params, mode):
    """It is given away to every call and written in place, stacked layers included, and loops copy none of it: no
    temporary is nearly as large. (Half a cache is for keys and values in the order that the products want.)"""
    model = TwoTower(small_config("****", vocab_size=8, num_attention_heads=2))
    slots = allocate(model=model, batch=2, capacity=8192)
    sampling = SamplingConfig(block_size=2, steps_per_block=2)
    request = Request(prompt=[5], max_new_tokens=4, mode=mode, sampling=sampling)
    blocks, call, recipe = call_of(model, request, 2)
    compiled = block.lower(random_params(model), slots, blocks, call, model=model, recipe=recipe).compile()
    memory = compiled.memory_analysis()
    size = cache_bytes(model, 2, 8192)
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.75 * size


@pytest.mark.whole(but=["diffusion"])
@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_sampling_depends_on_seed_and_row_only(tiny, mode):
    settings = dataclasses.replace(DIFFUSION, mode=mode, sampling=SAMPLED, max_new_tokens=8, seed=7)
    rows = run(tiny, PROMPTS, settings)
    assert run(tiny, PROMPTS, dataclasses.replace(settings, batch_size=1))[2] == rows[2]
    assert run(tiny, PROMPTS, dataclasses.replace(settings, seed=8)) != rows
    # The same prompt in another row draws other numbers.
    assert len({tuple(r.tokens) for r in run(tiny, [PROMPTS[1]] * 4, settings)}) > 1


def test_a_longer_run_begins_like_a_shorter_one(tiny, together):
    shorter = run(tiny, PROMPTS, dataclasses.replace(DIFFUSION, max_new_tokens=11))
    assert [r.tokens for r in shorter] == [r.tokens[:11] for r in together]


@pytest.mark.whole
def test_ar_follows_the_full_forward_pass(tiny):
    """Each greedy token is the argmax of the whole sequence read at once."""
    model, params = tiny
    results = run(tiny, PROMPTS, dataclasses.replace(DIFFUSION, mode="ar", max_new_tokens=8))
    rows = np.zeros((4, 48), np.int32)
    for i, r in enumerate(results):
        rows[i, : len(r.prompt_ids) + 8] = r.prompt_ids + r.tokens
    logits = np.asarray(jax.jit(lambda p, ids: bind(model, p).context_logits(ids))(params, rows))
    for i, r in enumerate(results):
        n = len(r.prompt_ids)
        assert logits[i, n - 1 : n + 7].argmax(-1).tolist() == r.tokens


@pytest.mark.whole(but=["diffusion", "[ar]"])
@pytest.mark.parametrize("mode", ["diffusion", "ar", "mock_ar", "speculative"])
def test_rows_end_with_their_first_end_of_text(tiny, mode, together):
    """Any tokens may play the end, the model's or the caller's: those before are of a run that never ends. Another set
    is no other program."""
    model, params = tiny
    settings = dataclasses.replace(DIFFUSION, mode=mode)
    endless = together if mode == "diffusion" else run(tiny, PROMPTS, settings)
    eos = (endless[3].tokens[9], endless[0].tokens[3], 7)
    ended = TwoTower(dataclasses.replace(model.config, eos_token_id=eos))
    results = run((ended, params), PROMPTS, dataclasses.replace(settings, ignore_eos=False))
    compiled = block._cache_size()
    assert run(tiny, PROMPTS, dataclasses.replace(settings, ignore_eos=False, eos=eos)) == results
    assert block._cache_size() == compiled
    for result, full in zip(results, endless, strict=True):
        if end := [i for i, token in enumerate(full.tokens) if token in eos]:
            assert result.tokens == full.tokens[: end[0] + 1]
            assert result.finish_reason == "eos"
        else:
            assert result.tokens == full.tokens
            assert result.finish_reason == "length"
        assert result.denoiser_evaluations <= full.denoiser_evaluations
        assert result.context_evaluations <= full.context_evaluations
    assert {results[0].finish_reason, results[3].finish_reason} == {"eos"}


def test_end_tokens_as_an_argument():
    """One size of array for up to four tokens, then powers of two."""
    assert end_token_array(()).tolist() == [-1] * 4
    assert end_token_array((2, 11)).tolist() == [2, 11, -1, -1]
    assert len(end_token_array(range(5))) == 8
    with pytest.raises(ValueError, match="eos=512 lies outside vocab_size=512"):
        Settings(eos=(2, 512)).end_tokens(ModelConfig(512, 8, "-", 0, 0, 0, 0, intermediate_size=8))
    with pytest.raises(ValueError, match="eos must hold token ids, at least one"):
        Settings(eos=())
    with pytest.raises(ValueError, match="changes nothing with ignore_eos"):
        Settings(eos=(2,), ignore_eos=True)


def test_a_model_that_is_not_a_number_is_an_error(tiny):
    model, params = tiny
    flat = flatten(params)
    broken = unflatten(
        flat | {("denoiser_tower", "embeddings"): jnp.full_like(params["denoiser_tower"]["embeddings"], jnp.nan)}
    )
    with pytest.raises(FloatingPointError, match="prompt 1"):
        run((model, broken), PROMPTS, DIFFUSION)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 2 is empty"),
        ([[[1, 2]]], "prompt 1: expected one list of token ids, found lists in it"),
        ([[1], [[1], [1, 2]]], "prompt 2: expected one list of token ids, found lists in it"),
        ([[1, 512]], "prompt 1: id 512 at position 1"),
        ([[-1]], "id -1"),
        ([[1.5]], "whole numbers"),
    ],
)
def test_prompts_that_cannot_be_used(tiny, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(*tiny, prompts, DIFFUSION)


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "dream"},
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"prefill_chunk": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"max_cache_gb": 0.0},
        {"max_cache_gb": float("inf")},
        {"max_new_tokens": 2**31},
        {"batch_size": 2**31},
        {"stop": ("",)},
    ],
)
def test_settings_that_cannot_be_used(values):
    (name, value), *_ = values.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        Settings(**values)


def test_scores_do_not_depend_on_the_batch(tiny):
    rows = [[4, 5], list(range(4, 44)), [7], list(range(100, 117))]
    together = score_ar(*tiny, rows)
    assert [len(r) for r in together] == [1, 39, 0, 16]
    for row, scores in zip(rows, together, strict=True):
        np.testing.assert_allclose(score_ar(*tiny, [row], batch_size=1)[0], scores, rtol=0, atol=2e-5)


@pytest.mark.whole
def test_denoiser_scores_of_mixed_shapes_keep_their_order(tiny):
    rng = np.random.default_rng(0)

    def row(length, block_size):
        ids, masked = rng.integers(4, 512, length), rng.random(length) < 0.5
        return DenoiserRow(ids.tolist(), masked.tolist(), 0.5, block_size)

    rows = [row(32, 16), row(16, 16), row(32, 16), row(16, 16)]
    together = score_denoiser(*tiny, rows)
    assert [len(r) for r in together] == [32, 16, 32, 16]
    np.testing.assert_allclose(score_denoiser(*tiny, rows[2:3])[0], together[2], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (DenoiserRow([4] * 10, [True] * 10, 0.5, 4), "length 10 is not a multiple of block_size=4"),
        (DenoiserRow([4] * 8, [True] * 7, 0.5, 4), "8 true or false"),
        (DenoiserRow([4] * 8, [1] * 8, 0.5, 4), "true or false"),
        (DenoiserRow([4] * 8, [True] * 8, 1.5, 4), "t must be"),
        (DenoiserRow([4] * 8, [True] * 8, "x", 4), "t must be"),
        (DenoiserRow([4] * 8, [True] * 8, 0.5, 0), "block_size must be"),
        (DenoiserRow([4, 999], [True] * 2, 0.5, 2), "id 999"),
        (DenoiserRow([], [], 0.5, 2), "at least one"),
    ],
)
def test_rows_that_cannot_be_scored(tiny, row, message):
    with pytest.raises(ValueError, match=message):
        score_denoiser(*tiny, [row])
