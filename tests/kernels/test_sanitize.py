"""What `make gpu-sanitize` makes of a tool's report: nothing passes that is not listed, nor a report that stops half-way."""

import pytest

from tests.gpu.sanitize import FALSE, KERNELS, Race, kernel_names, races, wrong

HOPPER = KERNELS / "mla_decode_hopper.py"
END = "hopper: answers are right\nlaunched: _attend_kernel\n========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(HOPPER.read_text().splitlines(), 1) if line.strip() == text)


def report(*pairs: tuple[str, str]) -> str:
    """As racecheck prints it, of accesses at lines of the Hopper kernel."""
    lines = []
    for first, second in pairs:
        lines += [
            f"========= Error: Race reported between Write access at _attend_kernel+0x3dd0 in mla_decode_hopper.py:{line_of(first)}",
            f"=========     and Read access at _attend_kernel+0xdf30 in mla_decode_hopper.py:{line_of(second)} [736 hazards]",
            "========= ",
        ]
    return "\n".join(lines) + "\n" + END.format(len(pairs), len(pairs))


def test_listed_pairs_pass_in_either_order_and_are_counted() -> None:
    pairs = [(race.first, race.second) for race in sorted(FALSE) if race.file == HOPPER.name]
    text = report(*pairs, *[(second, first) for first, second in pairs])
    assert wrong("racecheck", text) == []
    assert sum(races(text).values()) == 2 * 736 * len(pairs)


def test_any_other_pair_fails() -> None:
    """Two lines that are listed, but not with each other; a kernel without lines; a form that nobody knows."""
    text = report(("totals0.store(total)", "total += totals0.load(ROW)"), ("totals0.store(total)", "top = tops1.load(ROW)"))
    assert len(wrong("racecheck", text)) == 1 and "tops1" in wrong("racecheck", text)[0]
    nameless = report().replace("hopper: answers", (
        "========= Error: Race reported between Read access at _merge_kernel+0x2f0\n"
        "=========     and Write access at _merge_kernel+0x4330 [32 hazards]\nhopper: answers"
    )).replace("0 hazards displayed", "1 hazards displayed")  # fmt: skip
    assert wrong("racecheck", nameless) == [f"32 hazards: {Race('_merge_kernel', '', '')}"]
    assert wrong("racecheck", END.format(1, 1)) == ["1 hazards in a form that is not understood"]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_report_that_stops_half_way_fails(tool: str) -> None:
    """Killed, wrong answers, no summary."""
    assert wrong(tool, "") and wrong(tool, report().splitlines()[0]) and wrong(tool, "========= ERROR SUMMARY: 0 errors")


def test_memcheck_passes_without_errors_alone() -> None:
    text = "hopper: answers are right\n========= ERROR SUMMARY: {}\n"
    assert wrong("memcheck", text.format("0 errors")) == []
    assert wrong("memcheck", text.format("1 error")) == ["1 errors"]


def test_list_names_lines_that_there_are() -> None:
    """A pair whose line was changed would excuse nothing, and stay."""
    for race in FALSE:
        lines = {line.strip() for line in (KERNELS / race.file).read_text().splitlines()}
        assert {race.first, race.second} <= lines


def test_every_kernel_has_a_name_to_be_checked_by() -> None:
    assert {"_attend_kernel", "_write_latent_kernel", "_merge_in_order_kernel", "_pull_pages_kernel"} <= kernel_names()
