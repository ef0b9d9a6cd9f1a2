"""What the text that workers join with says of their pages. The manager compares such texts; it knows no format by itself.

    content [ ":" format ] [ "/" rest ] [ "<" format "," format ... ]        9f0c...:fp8_ds_mla/p64<bfloat16

content  what the values are: dimensions, layers, the order of k_pe. Nothing moves between pools that differ in it
format   how they are stored. Where that differs, the target's workers have to convert what they pull
rest     what may differ where page sizes do: between pools of one page size it must agree
<        formats of a source that these workers convert on the way
"""

from __future__ import annotations

from typing import NamedTuple

from kvmanager.errors import KVError, LayoutMismatch, NoConversion

__all__ = ["LayoutText", "why_not"]


class LayoutText(NamedTuple):
    content: str
    format: str
    rest: str
    converts: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> LayoutText:
        kept, _, converts = text.partition("<")
        front, _, rest = kept.partition("/")
        content, _, form = front.partition(":")
        return cls(content, form, rest, tuple(converts.split(",")) if converts else ())


def why_not(what: str, source: str, target: str, same_page_size: bool) -> KVError | None:
    """Why pages of one layout cannot become pages of another; None if they can, or if one of the two is not known yet."""
    if source == target or not source or not target:
        return None
    one, other = LayoutText.of(source), LayoutText.of(target)
    if one.content != other.content or (same_page_size and one.rest != other.rest):
        return LayoutMismatch(what, source, target)
    if one.format != other.format and one.format not in other.converts:
        return NoConversion(what, one.format, other.format)
    return None
