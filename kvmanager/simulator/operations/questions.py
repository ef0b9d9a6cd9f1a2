"""Questions: whoever may ask something asks it now and then. An answer changes nothing, and what of it is determined is in the books.

Which pages would be evicted, and why a prompt is not found, is checked where it is made (tests/control/test_dry_run.py, test_explain.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmanager.machine.command_wire import command_from_wire, command_to_wire
from kvmanager.machine.commands import Open, Step
from kvmanager.simulator.books import Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.operations.opening import draw_prompt, stamps_of
from kvmanager.simulator.registry import DRAWS, action
from kvmanager.simulator.replies import check_reply

__all__ = ["check_answer"]

KINDS = ("stats", "pins", "tenants", "explain", "dry_run", "workers", "handoffs")


@action(0, 1, 3)
def ask(driver: Any) -> None:
    rng = driver.rng
    kind = rng.choice(KINDS)
    message: dict[str, Any] = {"t": kind}
    if kind == "pins" and rng.random() < 0.5:
        message["tenant"] = rng.choice((b"red", b"blue"))
    if kind == "explain":
        tokens = Open(draw_prompt(driver), "A").tokens.tobytes()
        extra = rng.choice((b"", b"", b"lora"))
        message |= {"tokens": tokens, "pool": rng.choice(driver.config.pools).name, "tenant": rng.choice((b"red", b"blue")), "extra": extra}
    if kind == "dry_run":
        fields: dict[str, Any] = {}
        for draw in DRAWS:
            fields.update(draw(driver))
        message["step"] = command_to_wire(Step(**fields))
    driver.ask(message)


def check_answer(model: Model, message: dict[str, Any], answer: dict[str, Any]) -> None:
    """What a naive reader of the books would have answered at this version, as far as that is determined."""
    check = _CHECKS.get(message["t"])
    if check is not None:
        model.seen[f"asked {message['t']}"] += 1
        check(model, message, answer)


def _stats(model: Model, message: dict[str, Any], answer: dict[str, Any]) -> None:
    demand(answer["version"] == model.version, f"stats: version {answer['version']}, the model is at {model.version}")
    for number, pool in enumerate(model.config.pools):
        got, owners = answer["pools"][pool.name], model.owners(number)
        cached = sum(not owners[page] for page, _ in model.index[number].values())
        expected = sum(count > 0 for count in owners.values()), cached, pool.num_pages
        demand((got["pages"]["used"], got["pages"]["cached"], got["pages"]["total"]) == expected, f"stats: {got}, the model has {expected}")
        names = [worker.name for worker in model.crew(number)]
        demand(list(got["workers"].values()) == names, f"stats: workers {got['workers']}, the model has {names}")
        pinned = {page for where, pages in model.pins.values() if where == number for page in pages}
        demand(got["pinned"] == len(pinned), f"stats: {got['pinned']} pages are pinned, the model has {pinned}")
        count = sum(text.pool == number for text in model.texts.values())
        demand(got["sequences"] == count, f"stats: {got['sequences']} sequences in pool {pool.name}, the model has {count}")
    moves = {str(handoff): move.state for handoff, move in model.moves.items()}
    demand(answer["handoffs"] == moves, f"stats: handoffs {answer['handoffs']}, the model has {moves}")


def _pins(model: Model, message: dict[str, Any], answer: dict[str, Any]) -> None:
    names = [pool.name for pool in model.config.pools]
    got = {row["pin"]: (row["pool"], row["pages"]) for row in answer["pins"]}
    expected = {pin: (names[pool], len(pages)) for pin, (pool, pages) in model.pins.items()}
    if "tenant" in message:
        demand(got.items() <= expected.items(), f"pins of {message['tenant']!r}: {got}, the model has {expected}")
        demand(all(row["tenant"] == message["tenant"] for row in answer["pins"]), f"pins of {message['tenant']!r}: {answer['pins']}")
    else:
        demand(got == expected, f"pins: {got}, the model has {expected}")


def _tenants(model: Model, message: dict[str, Any], answer: dict[str, Any]) -> None:
    names = [pool.name for pool in model.config.pools]
    rows = {(names.index(row["pool"]), row["tenant"]): row["quota"] for row in answer["tenants"]}
    for (pool, tenant), quota in model.quotas.items():
        demand(tenant is None or rows.get((pool, tenant)) == quota, f"tenants: {rows}, the model has {model.quotas}")
    for (pool, tenant), quota in rows.items():
        expected = model.quotas.get((pool, tenant), model.quotas.get((pool, None)))
        demand(quota in (None, expected), f"tenants: {tenant!r} has a quota of {quota} in pool {pool}, the model has {expected}")


def _explain(model: Model, message: dict[str, Any], answer: dict[str, Any]) -> None:
    number = [pool.name for pool in model.config.pools].index(message["pool"])
    asked = Open(message["tokens"], message["pool"], message["tenant"], message["extra"])
    stamps, size = stamps_of(model, asked), model.sizes[number]
    most = (len(asked.tokens) - 1) // size
    run = len(model.indexed_run(number, model.index[number], stamps, len(asked.tokens) - 1))
    [[pool, tokens, reason, details]] = answer["pools"]
    what = f"explain: {tokens} tokens of {len(asked.tokens)}, {reason} {details}"
    demand((pool, tokens) == (message["pool"], run * size), f"{what}, the model finds {run} pages")
    demand((reason == "cached") == (run == most), f"{what}, the model finds {run} pages")
    if reason == "in_flight":
        text = model.texts.get(details["sequence"])
        end = tokens + details["tokens"]
        demand(text is not None and text.pool == number and text.stamps[:end] == stamps[:end], f"{what}, the model has {text}")
    if reason == "diverges":
        demand(tokens <= details["at"] < tokens + size, what)
    model.seen[f"explained as {reason}"] += 1


def _dry_run(model: Model, message: dict[str, Any], answer: dict[str, Any]) -> None:
    command = command_from_wire({**message["step"], "t": "step"})
    check_reply(model, Turn(command, 0, {"refused": answer["refused"]}))


def _workers(model: Model, message: dict[str, Any], answer: dict[str, Any]) -> None:
    got = [row["worker"] for row in answer["workers"]]
    demand(sorted(got) == sorted(model.workers), f"workers {got}, the model has {list(model.workers)}")


def _handoffs(model: Model, message: dict[str, Any], answer: dict[str, Any]) -> None:
    got = {row["handoff"]: row["state"] for row in answer["handoffs"]}
    demand(got == {handoff: move.state for handoff, move in model.moves.items()}, f"handoffs {got}, the model has {model.moves}")


_CHECKS: dict[str, Callable[[Model, dict[str, Any], dict[str, Any]], None]] = {
    "stats": _stats,
    "pins": _pins,
    "tenants": _tenants,
    "explain": _explain,
    "dry_run": _dry_run,
    "workers": _workers,
    "handoffs": _handoffs,
}
