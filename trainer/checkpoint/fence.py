"""Which attempt a run's checkpoints belong to: the one whose token stands in its fence. Who comes with another may save no more."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from manta.trainer.checkpoint.errors import CheckpointError, FencedError

FENCE = "fence.json"


@dataclass(frozen=True, slots=True)
class Fence:
    attempt: int = 0
    token: str = ""  # of nobody: anyone may save

    @classmethod
    def read(cls, content: Callable[[], bytes], at: object) -> "Fence":
        """Nobody's, where there is none yet. Raises CheckpointError where it is not as it was written."""
        try:
            return cls(**json.loads(content()))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{at}/{FENCE}: {error}; it is not as it was written: delete it once no other attempt runs") from None

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def next(self, attempt: int, token: str, at: object) -> "Fence":
        """Raises FencedError where a later attempt has been here. attempt: 0 is one that nobody supervises."""
        if attempt and self.attempt > attempt:
            raise FencedError(f"{at}: attempt {self.attempt} has begun since; this is attempt {attempt}, and it may save no more")
        return Fence(max(attempt, self.attempt), token)

    def is_held_by(self, token: str) -> bool:
        return self.token in {token, ""}

    def refuse(self, token: str, at: str) -> None:
        """Raises FencedError where it is not this token's."""
        if not self.is_held_by(token):
            raise FencedError(f"{at}: attempt {self.attempt} has begun since; this one may save no more")
