"""Bits that are written in pieces and read in chunks, against NumPy's packbits."""

import numpy as np
import pytest
from targets import BIT_CHUNK

from mmgraph.data.bits import BitWriter, unpacked


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 64, 1000, 1001])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_give_the_bits_of_the_whole_array(length: int, seed: int) -> None:
    generator = np.random.default_rng([length, seed])
    values = generator.random(length) < 0.3
    cuts = np.sort(generator.integers(0, length + 1, generator.integers(0, 20)))  # equal cuts give empty pieces
    writer = BitWriter()
    for piece in np.split(values, cuts):
        writer.add(piece)
    bits = writer.finish()
    assert bits.dtype == np.uint8 and bits.tolist() == np.packbits(values).tolist()


@pytest.mark.parametrize("chunk", [8, 16, 1 << 23])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 15, 16, 17, 33, 160])
def test_unpacked_bits_are_the_values(monkeypatch: pytest.MonkeyPatch, chunk: int, length: int) -> None:
    """Each chunk but the last is full. The caller may change a chunk without changing the bits."""
    monkeypatch.setattr(BIT_CHUNK, chunk)
    values = np.random.default_rng(length).random(length) < 0.5
    bits = np.packbits(values)
    for source, expected in ((bits, values), (None, np.ones(length, bool))):
        chunks = list(unpacked(source, length))
        assert [len(part) for part in chunks] == [min(chunk, length - start) for start in range(0, length, chunk)]
        assert all(part.dtype == bool for part in chunks)
        assert [value for part in chunks for value in part] == expected.tolist()
        for part in chunks:
            part[:] = False
    assert np.array_equal(bits, np.packbits(values))
