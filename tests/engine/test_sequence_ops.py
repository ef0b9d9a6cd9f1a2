"""Forked, truncated and partly cached sequences compute the same text as sequences that never were: a real model, pages and copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch

from kvmanager import KVManager, ManagerConfig, Open, PoolConfig, Replica
from kvmanager.attention import MLABackend, PageMemory
from kvmanager.examples.engine.checkpoint import make_checkpoint
from kvmanager.examples.engine.model import LatentModel
from kvmanager.examples.engine.oracle import SingleProcess

PAGE = 16
VOCAB = 512


class Engine:
    """A manager and one worker in this process: what is asked of the manager is run on real pages at once."""

    def __init__(self, model: LatentModel, num_pages: int = 48, partial_match: int = 0) -> None:
        config = ManagerConfig(pools=(PoolConfig("A", num_pages, page_size=PAGE, partial_match=partial_match),))
        self.model, self.kv, self.replica = model, KVManager(config, checked=True), Replica("A")
        self.memory = PageMemory(model.layout(PAGE), num_pages, model.device)
        self.memory.pages.fill_(float("nan"))  # whatever is read without having been written or copied
        self.backend = MLABackend(self.memory, model.num_heads, model.softmax_scale, 512, 64, max_pages=64 * num_pages)
        self.replica.load(self.kv.tables_snapshot())
        self.kv.subscribe(lambda batch, data: self.replica.feed(data))
        self.worker = self.kv.join("A0", "A", self.memory.layout.fingerprint)
        self.copied = 0

    def copy(self) -> None:
        while (copies := self.replica.copies()) is not None:
            self.memory.copy_pages(copies.source_pages, copies.target_pages, copies.tokens)
            self.copied += int(copies.tokens.sum())
            self.replica.copied(copies.version)

    def run(self, version: int, work: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """Run a step that writes these tokens; logits after each of them, and what is finished acknowledged."""
        self.copy()
        ids = sorted(work, key=lambda each: len(work[each]) != 1)
        tables = self.replica.batch(version, ids)
        plan = self.backend.plan(tables, [len(work[each]) for each in ids])
        ends = tables.lengths.tolist()
        positions = np.concatenate([np.arange(end - len(work[each]), end) for each, end in zip(ids, ends, strict=True)])
        logits = self.model.forward(np.concatenate([work[each] for each in ids]).astype(np.int64), positions, self.backend, plan)
        self.replica.finish(version, ids)
        self.acknowledge()
        return dict(zip(ids, logits, strict=True))

    def acknowledge(self) -> None:
        self.copy()
        while (content := self.replica.ack()) is not None:
            self.kv.ack(self.worker, content.version, ids=content.ids, tokens=content.tokens, as_of=content.as_of)

    def prefill(self, prompt: list[int]) -> tuple[int, int, torch.Tensor]:
        """(sequence, cached tokens, logits after the prompt)"""
        reply = self.kv.step(opens=[Open(prompt, "A", chunk=len(prompt))])
        opened = reply.opened[0]
        assert opened is not None
        return (
            opened.sequence,
            opened.cached_tokens,
            self.run(reply.version, {opened.sequence: prompt[opened.cached_tokens :]})[opened.sequence],
        )

    def decode(self, tokens: dict[int, int]) -> dict[int, torch.Tensor]:
        """One more token for each of these sequences: told to the manager, written, and the logits after it."""
        reply = self.kv.step(grow=list(tokens), tokens=[(each, [token]) for each, token in tokens.items()])
        assert not reply.refused
        return self.run(reply.version, {each: [token] for each, token in tokens.items()})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LatentModel:
    directory: Path = make_checkpoint(tmp_path_factory.mktemp("model"), seed=5)
    return LatentModel.load(directory, "cpu", torch.float32)


@pytest.fixture(scope="module")
def alone(model: LatentModel) -> Iterator[SingleProcess]:
    process = SingleProcess(model, PAGE, 48)
    yield process
    process.close()


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


@pytest.mark.parametrize("length", [2 * PAGE, 2 * PAGE + 5], ids=["at-a-page-border", "inside-a-page"])
def test_forked_sequences_equal_unforked_ones(model: LatentModel, alone: SingleProcess, length: int) -> None:
    """Two samples of one prompt begin with different words, and one of them is forked again on its way."""
    engine = Engine(model)
    text = prompt(length, length)
    parent, _, logits = engine.prefill(text)
    [child] = engine.kv.fork(parent)
    first, second = (int(token) for token in logits.topk(2).indices)
    texts = {parent: [first], child: [second]}
    for turn in range(20):
        logits_of = engine.decode({each: words[-1] for each, words in texts.items()})
        if turn == 9:
            [grandchild] = engine.kv.fork(child)
            texts[grandchild] = [*texts[child], int(logits_of[child].topk(2).indices[1])]
        for each, row in logits_of.items():
            texts[each].append(int(row.argmax()))
    assert engine.copied == 2 * ((length + 10) % PAGE) - (length + 10) % PAGE + length % PAGE
    for words in texts.values():
        forced = alone.generate(text, len(words), forced=words)
        told = [int(row.argmax()) for row in forced.logits]
        sampled = 1 if words is texts[parent] or words is texts[child] else 11
        assert told[sampled:] == words[sampled:]


def test_speculative_decoding_equals_plain_decoding(model: LatentModel, alone: SingleProcess) -> None:
    """A drafter that is right for a while, then wrong: rejected slots are given back, and written again with the right tokens."""
    engine, text = Engine(model), prompt(2 * PAGE - 3, 77)
    expected, rng = alone.generate(text, 60).tokens, np.random.default_rng(0)
    sequence, _, logits = engine.prefill(text)
    words, length, accepted = [int(logits.argmax())], len(text), []
    while len(words) < 40:
        draft = expected[len(words) : len(words) + 4]
        draft[rng.integers(1, 4)] ^= int(rng.integers(0, 2))  # wrong there, or right to the end
        reply = engine.kv.step(grow=[sequence], grow_counts=[5])
        engine.run(reply.version, {sequence: [words[-1], *draft]})
        good = next((place for place in range(4) if draft[place] != expected[len(words) + place]), 4)
        accepted.append(good)
        news = [words[-1], *draft[:good]]
        words += expected[len(words) : len(words) + good + 1]
        length += len(news)
        assert not engine.kv.step(truncate=[(sequence, length)], tokens=[(sequence, news)]).refused
    assert len(set(accepted)) > 1 and words == expected[: len(words)]
    # What is in the pages is what was accepted and nothing of what was rejected: the next word and a second user's hit show it.
    assert int(engine.decode({sequence: words[-1]})[sequence].argmax()) == expected[len(words)]
    engine.kv.close(sequence)
    full = [*text, *words]
    _, cached, logits = engine.prefill(full)
    assert cached == (len(full) - 1) // PAGE * PAGE > 3 * PAGE
    assert int(logits.argmax()) == expected[len(words)]


def test_conversation_taken_back_goes_on_differently(model: LatentModel, alone: SingleProcess) -> None:
    """Truncated into a page that the index holds: the page stays for others, the sequence goes on in a copy."""
    engine, text = Engine(model), prompt(3 * PAGE, 9)
    sequence, _, _ = engine.prefill(text)
    back = PAGE + 7
    assert not engine.kv.step(truncate=[(sequence, back)]).refused
    other = prompt(20, 10)
    reply = engine.kv.step(grow=[sequence], grow_counts=[len(other)], tokens=[(sequence, other)])
    logits = engine.run(reply.version, {sequence: other})[sequence]
    assert engine.copied == 7
    assert int(logits.argmax()) == alone.generate(text[:back] + other, 1).tokens[0]
    _, cached, logits = engine.prefill(text)
    assert cached == 2 * PAGE
    assert int(logits.argmax()) == alone.generate(text, 1).tokens[0]


def test_hit_below_a_page_gives_the_same_text(model: LatentModel, alone: SingleProcess) -> None:
    """The other prompt turns off inside the first page, and inside the third."""
    engine, first = Engine(model, partial_match=1), prompt(3 * PAGE, 20)
    engine.kv.close(engine.prefill(first)[0])
    copied = 0
    for common in (9, 2 * PAGE + 5):
        text = first[:common] + prompt(11, 21)
        sequence, cached, logits = engine.prefill(text)
        copied += common % PAGE
        assert (cached, engine.copied) == (common, copied)
        words = [int(logits.argmax())]
        for _ in range(10):
            words.append(int(engine.decode({sequence: words[-1]})[sequence].argmax()))
        assert words == alone.generate(text, 11).tokens
