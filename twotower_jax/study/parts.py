"""The study of launch/study.py: the paper's ablations (arXiv 2606.26493) on a model that a processor can train.

The parts that need no training of their own come first, and then what says most.
"""

from twotower_jax.study.cells import AR, Cell, Curve, Part, Study
from twotower_jax.train.config import shipped

_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_SCHEDULES = ("linear", "cosine", "exponential")
_BLOCKS = (4, 8, 16, 32)
_TOKENS = (0.01, 0.03, 0.1, 1.0)
_STEPS = 8  # Evaluations of a block of 16, of strategies that follow a schedule.

# What all others differ from: the published recipe.
_BASE = "base"
_ASKED = ("accuracy", "words", "retained", "tokens_per_evaluation")  # where losses are of different noise


def _on_schedule(strategy: str, schedule: str) -> str:
    return f"diffusion:strategy={strategy}:schedule={schedule}:steps_per_block={_STEPS}"


_ASKED_EVERY_WAY = Cell(
    _BASE,
    ways=(
        "diffusion",
        f"diffusion:confidence_threshold=1:steps_per_block={_STEPS}",
        *(_on_schedule("posterior", schedule) for schedule in _SCHEDULES),
        *(_on_schedule("predict_and_noise", schedule) for schedule in _SCHEDULES),
        "diffusion:strategy=entropy_bounded",
        "diffusion:strategy=remasking",
        "diffusion:strategy=factor",
    ),
)  # fmt: skip

PARTS = (
    Part(
        "thresholds",
        "How much does the threshold give away, and what does it gain?",
        "98.7 % of AR's quality at 2.42 times its tokens per second with a threshold of 0.8, on two H100.",
        (Cell(_BASE, ways=(AR, *(f"diffusion:confidence_threshold={value}" for value in _THRESHOLDS))),),
        ("accuracy", "words", "retained", "tokens_per_evaluation", "speed"),
        (Curve("speed", "retained"), Curve("tokens_per_evaluation", "retained")),
        timed=True,
    ),
    Part(
        "towers",
        "One tower or two, the context frozen or trained?",
        "Separate towers with the context frozen beat tied ones and a context that is trained along.",
        (
            Cell(_BASE),
            Cell("context trained along", {"variant.context": "trained", "variant.context_loss": True}),
            Cell("tied", {"variant.context": "tied", "variant.context_loss": True}),
        ),
    ),
    Part(
        "tokens",
        "How many tokens does the denoiser need?",
        "2.1 T, 8.4 % of the 25 T of the backbone.",
        (Cell(_BASE), *(Cell(f"{part:.0%} of the backbone's", tokens=part) for part in _TOKENS)),
        ("tokens", "validation_loss", "accuracy", "words", "retained", "tokens_per_evaluation"),
        (Curve("tokens", "retained", log=True),),
    ),
    Part(
        "time",
        "Is the denoiser to be told how much is masked?",
        "Generation, code, math: 74.12, 69.61, 81.30 with time conditioning; 72.94, 68.64, 80.57 without.",
        (Cell(_BASE), Cell("without time conditioning", {"variant.time_conditioning": False})),
    ),
    Part(
        "strategies",
        "Which positions are to be committed?",
        "",
        (_ASKED_EVERY_WAY,),
        _ASKED,
    ),
    Part(
        "speculative",
        "Are more drafts accepted after distillation?",
        "",
        tuple(
            Cell(name, changes, ways=("diffusion", "speculative", "speculative:steps_per_block=1"))
            for name, changes in (
                (_BASE, {}),
                ("distilled, weight 1", {"distillation.weight": 1.0}),
            )
        ),
        ("validation_loss", "accuracy", "accepted", "tokens_per_evaluation"),
    ),
    Part(
        "bidirectional",
        "Should the denoiser's Mamba read the block from its end as well?",
        "Published as an option of the training code, and off in the release.",
        (Cell(_BASE), Cell("bidirectional", {"variant.bidirectional_mamba": True})),
    ),
    Part(
        "blocks",
        "How long may a block be, trained and sampled?",
        "Trained with 32, 32 and 16 in thirds. Sampling with larger blocks than trained collapses.",
        tuple(
            Cell(
                _BASE if trained == 16 else f"trained with {trained}",
                {"block_size": trained} if trained != 16 else {},
                ways=(AR, *(f"diffusion:block_size={size}" if size != trained else "diffusion" for size in _BLOCKS)),
            )
            for trained in (16, 4, 8, 32)
        ),
        _ASKED,
    ),
    Part(
        "schedules",
        "Which noise schedule, in training and in sampling?",
        "Linear is what was trained with; cosine and exponential are in the published code.",
        tuple(
            Cell(
                _BASE if name == "linear" else f"trained with {name}",
                {"diffusion.schedule": name} if name != "linear" else {},
                ways=("diffusion", _on_schedule("posterior", name), _on_schedule("predict_and_noise", name)),
            )
            for name in _SCHEDULES
        ),
        _ASKED,
    ),
)


def default_study() -> Study:
    """On configs/study.py. A denoiser starts from weights that are trained, and so at a smaller rate."""
    return Study(shipped("study"), PARTS, {"learning_rate": 2e-3}, tokens=0.3)
