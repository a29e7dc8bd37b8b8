"""Log-probabilities of given tokens under a checkpoint.

    python launch/score.py --checkpoint=DIR --objective=ar --input=rows.jsonl --output=scores.jsonl

Rows give tokens as "ids": [...], or as "text": "...", which the checkpoint's tokenizer encodes.
Rows for --objective=ar: {"ids": [...]}; log-probability i is of ids[i + 1] given ids[..i], under the context tower.
Rows for --objective=denoiser: {"ids": [...], "masked": [true, ...], "t": 0.5, "block_size": 16}; log-probability i is
of ids[i] itself in the training-time forward pass, and "loss" the mean of their negatives over masked positions.
Rows for --objective=nll_bound: {"ids": [...]}; an upper bound of the negative log-likelihood a token under block
diffusion, by Monte Carlo, with its standard error.
Rows for --objective=generations: as launch/generate.py writes them; how likely the new tokens are under the context
tower, and how much they repeat themselves. With --eos=ID,ID only as far as the first of these tokens.
Every objective but denoiser also prints a line about all rows together.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import sys
from collections.abc import Callable

from absl import flags

from twotower_jax import adapter_flags, command_line, model_flags

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(adapter_flags)
_INPUT = command_line.DEFINE_path("input", None, "JSON Lines file of rows to score.", required=True)
_OUTPUT = command_line.DEFINE_path("output", None, "JSON Lines file for the scores.", required=True)
# What rows need beside their tokens.
_FIELDS = {
    "ar": set(),
    "denoiser": {"masked", "t", "block_size"},
    "nll_bound": set(),
    "generations": {"prompt_ids", "tokens"},
}
_OBJECTIVE = flags.DEFINE_enum("objective", "ar", list(_FIELDS), "What is scored, and by which tower.")
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 16, "Of objective nll_bound.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 16, "Of objective nll_bound: draws of noise per row.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Of objective nll_bound.", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows computed together.", lower_bound=1)

if __name__ == "__main__":
    command_line.read_flags()

from twotower_jax import model_from_flags
from twotower_jax.data import load_tokenizer
from twotower_jax.generation import quality
from twotower_jax.generation.placement import in_force
from twotower_jax.generation.prompts import check_prompts, prompt_ids
from twotower_jax.generation.score import DenoiserRow, score_ar, score_denoiser
from twotower_jax.generation.stops import cut
from twotower_jax.jsonl import read_rows, row_writer
from twotower_jax.outputs import check_apart
from twotower_jax.parameters import Params
from twotower_jax.two_tower import TwoTower


def _read() -> list[dict]:
    objective = _OBJECTIVE.value
    rows = read_rows(_INPUT.value)
    if objective != "generations":
        # Where both stand there, as in what generate.py writes, the ids are what was computed with.
        rows = [{k: v for k, v in row.items() if k != "text"} if "ids" in row else row for row in rows]
        check_prompts(rows, _INPUT.value)
    for number, row in enumerate(rows, 1):
        missing = sorted(_FIELDS[objective] - row.keys())
        if missing:
            raise ValueError(f"{_INPUT.value}, row {number}: {', '.join(missing)} missing")
        if objective == "generations":
            fields = row["prompt_ids"], row["tokens"]
            lists = all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in fields)
            if not lists or not row["prompt_ids"]:
                what = "prompt_ids and tokens must be lists of token ids, with a prompt"
                raise ValueError(f"{_INPUT.value}, row {number}: {what}")
    return rows


def _cut(rows: list[dict]) -> list[dict]:
    """Generated rows as far as the end tokens of --eos let them go."""
    eos = model_from_flags.end_tokens()
    if eos is None:
        return rows
    if _OBJECTIVE.value != "generations":
        raise ValueError(
            f"--eos changes nothing with --objective={_OBJECTIVE.value}: rows are scored as they are given"
        )

    return [row | {"tokens": cut(row["tokens"], len(row["tokens"]), eos=eos).tokens} for row in rows]


def main() -> None:
    if _OBJECTIVE.value != "nll_bound":
        given = _BLOCK_SIZE, _SAMPLES, _SEED
        command_line.refuse_given(given, f"with --objective={_OBJECTIVE.value}: it is of --objective=nll_bound")
    check_apart({"--output": _OUTPUT.value}, {"--input": _INPUT.value})
    rows = _cut(_read())
    with row_writer(_OUTPUT.value) as write:
        model, params, folder, placement = model_from_flags.load_model(**adapter_flags.given())
        if _OBJECTIVE.value in ("denoiser", "nll_bound"):
            remedy = "--objective=ar scores with the backbone itself"
            model_from_flags.warn_if_untrained(folder, f"--objective={_OBJECTIVE.value}", remedy)
        if any("text" in row for row in rows) and _OBJECTIVE.value != "generations":
            tokens = prompt_ids(rows, load_tokenizer(folder))
            rows = [row | {"ids": [int(i) for i in ids]} for row, ids in zip(rows, tokens, strict=True)]
        with in_force(placement.context):
            params = placement.context_params(model, params)
            try:
                _SCORERS[_OBJECTIVE.value](model, params, rows, write)
            except ValueError as error:
                # The functions know rows, and not where they come from.
                where = f"{_INPUT.value}, " if str(error).startswith("row ") else ""
                raise ValueError(f"{where}{error}") from None


Write = Callable[[dict], None]


def _ar(model: TwoTower, params: Params, rows: list[dict], write: Write) -> None:
    total = []
    for logprobs in score_ar(model, params, [row["ids"] for row in rows], _BATCH_SIZE.value):
        loglikelihood = float(logprobs.sum(dtype="float64"))
        write({"logprobs": logprobs.tolist(), "loglikelihood": loglikelihood})
        total.append(quality.Likelihood(loglikelihood, len(logprobs)))
    _print_perplexity(total)


def _denoiser(model: TwoTower, params: Params, rows: list[dict], write: Write) -> None:
    rows = [DenoiserRow(row["ids"], row["masked"], row["t"], row["block_size"]) for row in rows]
    for row, logprobs in zip(rows, score_denoiser(model, params, rows, _BATCH_SIZE.value), strict=True):
        masked = [float(-p) for p, m in zip(logprobs, row.masked, strict=True) if m]
        loss = sum(masked) / len(masked) if masked else 0.0
        write({"logprobs": logprobs.tolist(), "loglikelihood": -sum(masked), "loss": loss})


def _nll_bound(model: TwoTower, params: Params, rows: list[dict], write: Write) -> None:
    estimates = quality.nll_bound(
        model,
        params,
        [row["ids"] for row in rows],
        block_size=_BLOCK_SIZE.value,
        samples=_SAMPLES.value,
        seed=_SEED.value,
        batch_size=_BATCH_SIZE.value,
    )
    for estimate in estimates:
        write({"nll_bound": estimate.mean, "standard_error": estimate.standard_error, "tokens": estimate.tokens})
    whole = quality.mean_estimate(estimates)
    print(f"bound {whole.mean:.4f} ± {whole.standard_error:.4f} nats a token, {whole.tokens} tokens", file=sys.stderr)


def _generations(model: TwoTower, params: Params, rows: list[dict], write: Write) -> None:
    pairs = [(row["prompt_ids"], row["tokens"]) for row in rows]
    likelihoods = quality.generated_likelihoods(model, params, pairs, _BATCH_SIZE.value)
    collapsed = 0
    for (_, tokens), likelihood in zip(pairs, likelihoods, strict=True):
        found = quality.repetition(tokens)
        collapsed += found.collapsed
        perplexity = likelihood.perplexity if likelihood.tokens else None
        about = {"loglikelihood": likelihood.log_likelihood, "perplexity": perplexity}
        write(about | found._asdict())
    _print_perplexity(likelihoods)
    print(f"collapsed: {collapsed} of {len(rows)} rows", file=sys.stderr)


def _print_perplexity(likelihoods: list[quality.Likelihood]) -> None:
    whole = quality.Likelihood(sum(v.log_likelihood for v in likelihoods), sum(v.tokens for v in likelihoods))
    if whole.tokens:
        print(f"perplexity {whole.perplexity:.4f} under the context tower, {whole.tokens} tokens", file=sys.stderr)


_SCORERS = {"ar": _ar, "denoiser": _denoiser, "nll_bound": _nll_bound, "generations": _generations}


if __name__ == "__main__":
    command_line.run(main)
