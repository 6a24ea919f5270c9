"""What is measured? The shapes, sizes and values that every contestant is set to; imports nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

N_FEATURES, CONTEXT, PATCH, STRIDE = 25, 60, 10, 5
N_PATCHES = (CONTEXT - PATCH) // STRIDE + 1
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 3e-4, 0.01, 1.0


@dataclass(frozen=True)
class Case:
    """One model, one way of training it."""

    name: str
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    batch_size: int
    dropout: float = 0.1
    n_windows: int = 2048
    """Samples; of a whole trial, 8,000: 6,600 to train on and 1,400 to validate on."""
    n_validation: int = 0
    steps: int = 4
    """In a turn: about what a trial's dispatch takes, 1.5 s (`train.pace`), or less."""
    dtype: str = "float32"
    """bfloat16: operands of the matmuls (PyTorch: autocast); parameters stay float32."""

    @property
    def n_params(self) -> int:
        """As fintx counts."""
        d, f = self.d_model, self.d_ff
        block = 4 * d * d + 2 * d * f + 9 * d + f
        return (PATCH * N_FEATURES + 1) * d + N_PATCHES * d + self.n_layers * block + 2 * d + N_PATCHES * d + 1

    @property
    def step_flops(self) -> float:
        """Matmuls of a train step, a multiply-add as 2; what is done again to save memory is not counted."""
        n, d = N_PATCHES, self.d_model
        block = n * (4 * d * d + 2 * d * self.d_ff) + 2 * n * n * d
        return 6.0 * self.batch_size * (n * PATCH * N_FEATURES * d + self.n_layers * block + n * d)

    def to_json(self) -> dict[str, object]:
        """`Case(**value)` is the same again."""
        return asdict(self)


STEPS = (
    Case("2M", 64, 48, 2, 256, 32, steps=16),
    Case("20M", 256, 32, 2, 512, 64, steps=2),
    Case("200M", 768, 24, 16, 3072, 32, steps=1),
)
"""The train step with AdamW and dropout."""

TRIALS = (
    Case("2M trial", 64, 48, 2, 256, 32, n_windows=8000, n_validation=1400),
    Case("2M trial at 160 layers", 32, 160, 2, 64, 32, n_windows=8000, n_validation=1400),
)
"""A whole trial over 8,000 windows, loader and validation included; a turn is an epoch."""

POPULATION = Case("0.3M", 64, 6, 2, 256, 32, steps=64)
POPULATIONS = (
    Case("3K", 8, 2, 1, 16, 32, n_windows=16384, steps=512),
    Case("0.1M", 48, 4, 2, 192, 32, n_windows=4096, steps=128),
    POPULATION,
)
"""Eight seeds together against eight runs one after the other."""

TINY = Case("tiny", 16, 2, 2, 32, 8, n_windows=256, steps=2)
"""To see that everything runs."""


def tiny(case: Case) -> Case:
    """The same question, asked of a model that takes no time."""
    n_validation = 64 if case.n_validation else 0
    same = {"name": case.name, "n_validation": n_validation, "dtype": case.dtype, "dropout": case.dropout}
    return replace(TINY, **same)
