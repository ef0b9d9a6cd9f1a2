"""Which rank of a source pool a rank of a target pool pulls from, when their tensor-parallel degrees differ.

Latents are replicated: every rank of a pool holds the same bytes, so any will do, and what matters is that none is asked more than others.
"""

from kvmanager.errors import InvalidValue

__all__ = ["source_rank"]


def source_rank(target_rank: int, target_ranks: int, source_ranks: int, turn: int = 0) -> int:
    """The rank of the source that `target_rank` of `target_ranks` pulls from.

    For one `turn` no source rank is pulled from by more than ceil(target_ranks / source_ranks) targets. `turn` (a handoff id) rotates
    who is first, so that over many handoffs a larger source is used evenly too. Every target computes it alone and all agree.
    """
    if source_ranks < 1 or target_ranks < 1:
        raise InvalidValue("source_ranks", "at least one rank on either side", f"{source_ranks} and {target_ranks}")
    if not 0 <= target_rank < target_ranks:
        raise InvalidValue("target_rank", f"0 to {target_ranks - 1}", target_rank)
    return (target_rank * source_ranks // target_ranks + turn) % source_ranks
