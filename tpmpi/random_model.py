"""A model of random weights that was never in a file: how fast would a model of this shape be on these machines?"""

from __future__ import annotations

import numpy as np

from tpmpi.config import ModelConfig
from tpmpi.sharding import target_kind, tensor_specs
from tpmpi.weights import Stored, encode, part_shapes

SHAPES = {  # the usual ones of 1, 8 and 70 billion parameters
    'tiny': ModelConfig(vocab_size=1024, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96,
                        max_positions=8192),
    '1b': ModelConfig(vocab_size=128256, hidden_size=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64,
                      ffn_size=8192, max_positions=8192, tie_embeddings=True),
    '8b': ModelConfig(vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
                      ffn_size=14336, max_positions=8192),
    '70b': ModelConfig(vocab_size=128256, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128,
                       ffn_size=28672, max_positions=8192)}
DRAWN = 1 << 22  # random numbers, which repeat: no kernel is faster for that
SPREAD = 0.02  # standard deviation of the weights


class RandomReader:
    """What load_model reads, in place of a file: matrices around 0, gains of 1, biases of 0; the same on every rank."""

    length = 0  # bytes of a file

    def __init__(self, config: ModelConfig, kind: str, tokenizer):
        """kind: of the matrices, one of weights.STORED_KINDS; tokenizer: any, a checkpoint's TokenizerData."""
        self.config, self.asked, self.tokenizer = config, kind, tokenizer
        self.specs, self.drawn = tensor_specs(config), {}

    def kind(self, name: str) -> str:
        """How a tensor is stored."""
        return target_kind(self.specs[name], 'float32', self.asked, float16=True)

    def read_rows(self, name: str, rows: range, verify: bool = False) -> Stored:
        """Some rows of a tensor, always the same.  verify: there is nothing to compare with."""
        spec, kind = self.specs[name], self.kind(name)
        shape = (len(rows), *spec.shape[1:])
        if not spec.is_matrix:
            return encode(np.full(shape, not name.endswith('bias'), np.float32), kind)
        drawn = self._drawn(kind)
        return Stored(kind, **{part: _first(drawn[part], size) for part, (size, _) in
                               part_shapes(shape, kind, spec.group_axis).items()}, group_axis=spec.group_axis)

    def _drawn(self, kind: str) -> dict[str, np.ndarray]:
        """The parts of random numbers of a kind, each as one run."""
        if kind not in self.drawn:
            values = np.random.default_rng(0).standard_normal((DRAWN // 1024, 1024)).astype(np.float32) * SPREAD
            self.drawn[kind] = {part: array.reshape(-1) for part, array in encode(values, kind).parts.items()}
        return self.drawn[kind]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.drawn.clear()


def _first(numbers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """As many of them as an array of a shape needs, again and again where there are not enough."""
    size = int(np.prod(shape))
    return (numbers[:size] if size <= len(numbers) else np.resize(numbers, size)).reshape(shape)
