"""What a generation draws its tokens from: a generator of its own, made from a seed or from a client's generator."""

from __future__ import annotations

import torch

from ..proto.v1 import generator_state


class Draws:
    """seed: as torch.manual_seed takes it. state: of the client's generator, in its place; neither: at random.

    On a CPU a client's state is taken as it is, and left as a local generation would leave it. Other devices have
    generators of another kind, which torch.manual_seed seeds alike: they get the seed that the client's began with, or,
    where that one has been drawn from, a number drawn from it.
    """

    def __init__(self, device: torch.device, *, seed: int | None, state: bytes = b"") -> None:
        self.generator = torch.Generator(device=device)
        self._given: torch.Generator | None = None
        if state:
            self._given = self.generator if device.type == "cpu" else torch.Generator()
            generator_state.put_into(self._given, state)
            if self._given is not self.generator:
                self.generator.manual_seed(_seed_from(self._given, state))
        elif seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    @property
    def state(self) -> bytes:
        """The client's generator as it is by now; nothing where none was given."""
        return b"" if self._given is None else generator_state.taken_from(self._given)

    def draw(self, probabilities: torch.Tensor) -> torch.Tensor:
        """An index for each row of `probabilities` [B, V]: int64 [B]."""
        return torch.multinomial(probabilities, num_samples=1, generator=self.generator).squeeze(1)


def _seed_from(given: torch.Generator, state: bytes) -> int:
    """Moves `given` on, so that the next generation draws otherwise."""
    seed = generator_state.seed_of(state)
    is_fresh = generator_state.taken_from(torch.Generator().manual_seed(seed)) == state
    drawn = int(torch.randint(0, 2**63 - 1, (), generator=given).item())
    return seed if is_fresh else drawn
