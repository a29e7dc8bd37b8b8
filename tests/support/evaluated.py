"""What the tests of evaluation share: questions, and requests as lm_eval makes them."""

from lm_eval.api.instance import Instance

QUESTIONS = ("The list", "items in", "order and so on", "café")
CHOICES = ("object", "holds items", "item by item", " naïve")
NEW = 10  # Tokens of each answer.


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    """Requests of one kind with these arguments."""
    return [Instance(kind, {}, one, i, ("", i, 1)) for i, one in enumerate(arguments)]
