"""How Pallas's forms in place find the live chunks; the same code counts inside the kernel."""

import jax.numpy as jnp
import numpy as np
import pytest
from implementations import strictly

from esper_kernels.graft.pallas_mosaic_gpu_parts import _count_ones, _position, live_words


@pytest.mark.parametrize("chunks", [1, 5, 32, 33, 64, 100])
def test_live_chunks_are_found_among_the_bits(chunks):
    live = np.random.default_rng(chunks).random(chunks) < 0.4
    with strictly():
        words = np.asarray(live_words(jnp.asarray(live)))
        places = []
        for w, word in enumerate(words):
            count = int(_count_ones(jnp.int32(word)))
            places += [32 * w + int(_position(jnp.int32(word), jnp.int32(k))) for k in range(count)]
    assert places == np.flatnonzero(live).tolist()


def test_all_of_a_word():
    with strictly():
        (word,) = live_words(jnp.ones((32,), bool))
        assert (int(word), int(_count_ones(word))) == (-1, 32)
        assert [int(_position(word, jnp.int32(k))) for k in (0, 15, 31)] == [0, 15, 31]
