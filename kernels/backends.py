"""Which implementation each op runs as: one value, handed down to whatever calls ops."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Backends:
    """The name of an implementation for each op, or None to let the op choose by platform and shapes.

    Raises:
      ValueError: at construction, for a name that an op does not have.
    """

    ssd: str | None = None
    two_tower_ssd: str | None = None
    block_scan: str | None = None
    causal_conv: str | None = None  # And `block_causal_conv`.
    attention: str | None = None
    expert_mlp: str | None = None

    def __post_init__(self):
        # Ops are described in the package, which imports this module.
        from twotower_jax.kernels import implementations

        for op, name in dataclasses.asdict(self).items():
            known = implementations(op) or ("xla",)
            if name is not None and name not in known:
                raise ValueError(f"kernels: {op} has no implementation {name!r}; there are {', '.join(known)}")

    @classmethod
    def parse(cls, pairs: list[str]) -> "Backends":
        """From the words of a flag, such as ["ssd=xla", "attention=reference"].

        Raises:
          ValueError: for a word that is not of this form, an unknown op or an unknown name.
        """
        names = {}
        for pair in pairs:
            op, _, name = pair.partition("=")
            if not name:
                raise ValueError(f"kernels: {pair!r} is not of the form OP=IMPLEMENTATION")
            names[op] = name
        if unknown := sorted(set(names) - {field.name for field in dataclasses.fields(cls)}):
            ops = ", ".join(field.name for field in dataclasses.fields(cls))
            raise ValueError(f"kernels: there is no op {unknown[0]!r}; there are {ops}")
        return cls(**names)
