"""What a body says an answer has to be, as automata: a list of texts, a regular expression, or a JSON schema.

The package outlines-core (Apache 2.0) makes an expression of a schema, and an automaton over bytes of an expression,
whose table is all that is taken from it: other libraries of grammars give what may come next after some tokens, and the
positions of a block are decided in any order. It does so in a process of its own, which may take so much time and
memory and no more, since a short expression can make a very large automaton.
"""

import base64
import json
import subprocess
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from twotower_jax.config import ModelConfig
from twotower_jax.data import encode
from twotower_jax.data.tokenizer import id_range
from twotower_jax.generation.automaton import Automaton, Spellings, of_choices
from twotower_jax.serving.errors import ApiError
from twotower_jax.serving.text import TokenTexts

# What the process may take; characters of a schema or expression, and states of it over bytes; moves of all automata
# that are kept or in use.
_SECONDS, _MEMORY, _CHARACTERS, _STATES, _LIVE = 10, 2 << 30, 16 << 10, 1 << 14, 1 << 25
_MISSING = "needs the package outlines-core on the server: pip install outlines-core"

_PROGRAM = """
import base64, json, resource, sys
seconds, memory, most = (int(word) for word in sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
try:
    from outlines_core import Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema
except ImportError:
    sys.exit(3)
kind, text = json.load(sys.stdin)
try:
    if kind == "schema":
        text = build_regex_from_schema(text)
    index = Index(text, Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
except BaseException as error:  # Rust's too.
    print(json.dumps({"error": str(error)}))
    sys.exit(0)
moves = index.get_transitions()
number = {index.get_initial_state(): 0}
for state, targets in moves.items():
    for target in (state, *targets.values()):
        number.setdefault(target, len(number))
if len(number) > most:
    print(json.dumps({"error": f"it has {len(number)} states, and at most {most} are possible"}))
    sys.exit(0)
import array
table = array.array("i", [-1]) * (256 * len(number))
for state, targets in moves.items():
    for byte, target in targets.items():
        if byte < 256:
            table[256 * number[state] + byte] = number[target]
final = [number[state] for state in index.get_final_states() if state in number]
print(json.dumps({"table": base64.b64encode(table.tobytes()).decode(), "final": final}))
"""


class Grammars:
    """Makes automata for the tokens of one model, and keeps those that there is room for.

    Args:
      end_tokens: which end answers, and are no part of them.
    """

    def __init__(self, tokenizer: Tokenizer, texts: TokenTexts, config: ModelConfig, end_tokens: Sequence[int] = ()):
        self._tokenizer, self._texts, self._config, self._ends = tokenizer, texts, config, frozenset(end_tokens)
        self._kept: dict[tuple[str, str], Automaton] = {}
        self._live: weakref.WeakSet[Automaton] = weakref.WeakSet()
        self._spellings: Spellings | None = None

    def choices(self, texts: Sequence[str]) -> tuple[Automaton, int]:
        """Exactly one of the texts, in the tokens in which the tokenizer writes them, and the most tokens of one.

        Raises:
          ValueError: for a text that is empty, or not what its tokens say.
        """
        rows = [ids.tolist() for ids in encode(self._tokenizer, list(texts))]
        for text, ids in zip(texts, rows, strict=True):
            if not ids or self._texts.decode(ids) != text:
                raise ValueError(f"the tokenizer has no tokens that say {text[:100]!r} and nothing else")
        return of_choices(rows), max(map(len, rows))

    def regex(self, expression: str) -> Automaton:
        """The texts that an expression takes whole.

        Raises:
          ValueError: if it cannot be understood or becomes too large, or the tokenizer does not tell what bytes its
            tokens stand for; ModuleNotFoundError if there is no outlines-core.
        """
        return self._made("regex", expression)

    def schema(self, schema: dict[str, Any]) -> Automaton:
        """The JSON texts of a schema, as outlines-core understands it. Raises as `regex`."""
        return self._made("schema", json.dumps(schema))

    def _made(self, kind: str, text: str) -> Automaton:
        if (kind, text) in self._kept:
            return self._kept[kind, text]
        if len(text) > _CHARACTERS:
            raise ValueError(f"it has {len(text)} characters, and at most {_CHARACTERS} are possible")
        if self._spellings is None:
            self._spellings = Spellings(self._spelled())
        found = self._spellings.automaton(*_of_bytes(kind, text))
        self._live.add(found)
        if sum(automaton.moves for automaton in self._live) > _LIVE:
            self._kept.clear()
        if sum(automaton.moves for automaton in self._live) > _LIVE:
            message = "too many large forms are being answered at once: try again"
            raise ApiError(429, message, code="queue_full", headers={"retry-after": "1"})
        self._kept[kind, text] = found
        return found

    def _spelled(self) -> dict[int, bytes]:
        """The bytes of each token that is a part of texts."""
        if not self._texts.bytewise:
            raise ValueError("the tokenizer does not tell what bytes its tokens stand for")
        special = self._tokenizer.get_added_tokens_decoder().keys() | self._ends
        ids = range(min(id_range(self._tokenizer), self._config.vocab_size))
        found = {token: self._texts.bytes(token) for token in ids if token not in special}
        return {token: spelled for token, spelled in found.items() if spelled}


def _of_bytes(kind: str, text: str) -> tuple[np.ndarray, np.ndarray]:
    """A table (Q, 256) and the final states (Q,), see `Spellings.automaton`."""
    command = [sys.executable, "-I", "-c", _PROGRAM, str(_SECONDS), str(_MEMORY), str(_STATES)]
    try:
        ended = subprocess.run(
            command, input=json.dumps([kind, text]), capture_output=True, text=True, timeout=3 * _SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError("it takes too long to be understood") from None
    if ended.returncode == 3:
        raise ModuleNotFoundError(_MISSING)
    if ended.returncode:
        raise ValueError("it takes too much time or memory to be understood")
    found = json.loads(ended.stdout)
    if "error" in found:
        raise ValueError(found["error"])
    table = np.frombuffer(base64.b64decode(found["table"]), np.int32).reshape(-1, 256)
    final = np.zeros(len(table), bool)
    final[found["final"]] = True
    return table, final
