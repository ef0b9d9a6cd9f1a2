"""TokenIds stands for a bytearray: every operation gives what the bytearray would, wherever the shared prefix ends."""

from __future__ import annotations

import random

import pytest

from kvmanager.pages.token_ids import TokenIds


@pytest.mark.parametrize("seed", range(40))
def test_it_behaves_as_the_bytearray_it_stands_for(seed: int) -> None:
    rng = random.Random(seed)
    head = [rng.randbytes(rng.choice((4, 64))) for _ in range(rng.randrange(4))]
    tail = rng.randbytes(4 * rng.randrange(20))
    tokens, plain = TokenIds(head, tail), bytearray(b"".join([*head, tail]))
    for _ in range(60):
        start, stop = rng.randrange(len(plain) + 9), rng.randrange(len(plain) + 9)
        action = rng.randrange(5)
        if action == 0:
            assert tokens[start:stop] == plain[start:stop]
        elif action == 1:
            assert (tokens[start:], tokens[:stop]) == (plain[start:], plain[:stop])
        elif action == 2:
            more = rng.randbytes(4 * rng.randrange(5))
            tokens += more
            plain += more
        elif action == 3 and rng.random() < 0.3:
            del tokens[start:]
            del plain[start:]
        elif action == 4:
            copy = tokens.upto(min(stop, len(plain)))
            assert bytes(copy) == plain[:stop]
            copy += b"else"
        assert (bytes(tokens), len(tokens)) == (bytes(plain), len(plain))


def test_nothing_can_be_cut_out_of_the_middle() -> None:
    with pytest.raises(ValueError, match="up to the end"):
        del TokenIds([b"1234"], b"5678")[0:4]
