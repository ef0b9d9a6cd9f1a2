"""Request: one prompt on its way through the engine.

waiting ──▶ prefilling ──▶ prefilled ──▶ moving ──▶ decoding ──▶ (dumping) ──▶ finished | failed
   ▲             │              │            │           │
   └─────────────┴──────────────┴────────────┴───────────┘   preempted, or its pool's memory is gone: computed again
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

__all__ = ["Request", "Stage"]


class Stage(Enum):
    WAITING = "waiting"
    PREFILLING = "prefilling"
    PREFILLED = "prefilled"
    MOVING = "moving"
    DECODING = "decoding"
    DUMPING = "dumping"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Request:
    """prompt and what has been generated; where its latents are; and what it cost.

    resume    the stage that it is in again if its handoff comes to nothing
    going     the pool that it is to decode on in
    streamed  its handoff was asked for while it was computed
    shuns     the prefill pool that got on with nothing of it
    moves     times that its pages have gone to another pool
    length    slots reserved and given to a worker to write, of prompt + generated
    told      token ids that the manager knows
    token_times  when each generated token came, monotonic seconds
    logits    float32 bytes of each generated token's logits, if kept
    latents   (shape, float32 bytes) of its pages at the end, if asked for
    """

    number: int
    prompt: list[int]
    max_new_tokens: int
    tenant: bytes = b""
    generated: list[int] = field(default_factory=list)
    stage: Stage = Stage.WAITING
    pool: str = ""
    target: str = ""
    resume: Stage = Stage.WAITING
    going: str = ""
    streamed: bool = False
    shuns: str = ""
    sequence: int = 0
    handoff: int = 0
    length: int = 0
    told: int = 0
    cached_tokens: int = 0
    pages_moved: int = 0
    pages_shared: int = 0
    preempted: int = 0
    lost: int = 0
    pull_failures: int = 0
    moves: int = 0
    error: str = ""
    submitted: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    token_times: list[float] = field(default_factory=list)
    logits: list[bytes] = field(default_factory=list)
    latents: tuple[list[int], bytes] | None = None

    @property
    def tokens(self) -> list[int]:
        """Everything known so far; the last one's latent is written by the step that follows it."""
        return self.prompt + self.generated

    @property
    def over(self) -> bool:
        return self.stage in (Stage.FINISHED, Stage.FAILED)

    def restart(self) -> None:
        """Its pages are gone or given up: what was generated stays, and is computed again with the prompt."""
        self.stage, self.pool, self.target, self.sequence, self.handoff, self.length, self.told = Stage.WAITING, "", "", 0, 0, 0, 0
        self.streamed = False
