"""Workers join, work, acknowledge, fall silent and die; time passes, and clients ask twice."""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.simulator.books import Turn, Worker, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import action, follows


@action(5, 15, 30, plays_workers=True)
def work(driver: Any) -> None:
    driver.work()


@action(12, 20, 35, plays_workers=True)
def ack(driver: Any) -> None:
    driver.work(3)
    workers = driver.model.workers
    for worker in driver.rng.sample(list(workers.values()), driver.rng.randint(0, len(workers))):
        if worker.worker in workers:
            driver.ack(worker)


@action(0, 0.3, 1, plays_workers=True)
def late(driver: Any) -> None:
    driver.tick(driver.rng.choice((600, 1500)))


@action(0, 0.2, 1, plays_workers=True)
def die(driver: Any) -> None:
    driver.die()


@action(3, plays_workers=True)
def bury(driver: Any) -> None:
    zombies = [worker for worker in driver.model.workers.values() if worker.fenced]
    if zombies:
        driver.die(driver.rng.choice(zombies))


@action(4, plays_workers=True)
def join(driver: Any) -> None:
    driver.join()


@action(2, plays_workers=True)
def repeat(driver: Any) -> None:
    driver.repeat()


@action(2, plays_workers=True)
def tick(driver: Any) -> None:
    driver.tick(driver.rng.choice((1, 1, 50, 300)))


@follows(ev.WorkerJoined)
def joined(model: Model, event: ev.WorkerJoined, turn: Turn) -> None:
    model.workers[event.worker] = Worker(event.worker, event.name, event.pool, model.memory(event.pool, event.name), model.version)


@follows(ev.WorkerAcked)
def acked(model: Model, event: ev.WorkerAcked, turn: Turn) -> None:
    worker = model.workers[event.worker]
    demand(not worker.fenced, f"{worker.name} is fenced and its word was taken")
    worker.acked = max(worker.acked, event.version)


@follows(ev.WorkerFenced)
def fenced(model: Model, event: ev.WorkerFenced, turn: Turn) -> None:
    model.workers[event.worker].fenced = True
    _check_lost(model, model.workers[event.worker].pool)


@follows(ev.WorkerDead)
def dead(model: Model, event: ev.WorkerDead, turn: Turn) -> None:
    worker = model.workers.pop(event.worker)
    if not model.crew(worker.pool, fenced=True):
        model.draining.pop(worker.pool, None)
        model.drained.pop(worker.pool, None)
    if not worker.fenced:
        _check_lost(model, worker.pool)


def _check_lost(model: Model, pool: int) -> None:
    demand(not model.index[pool], f"pool {pool} lost its memory and its index is not empty")
    demand(all(text.pool != pool for text in model.texts.values()), f"pool {pool} lost its memory and has open sequences")
