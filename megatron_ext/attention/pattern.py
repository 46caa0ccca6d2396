"""Who may attend to whom."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A description without a tensor: what a backend makes of it, a mask or something less, is the backend's affair.

    causal: a token attends to itself and what comes before it. window: only to what is nearer than so many tokens.
    slopes: of ALiBi, one for each of this rank's heads; the distance times this is taken off the scores. documents:
    only to its own document; which tokens those are, a batch says (`document_ids`).
    """

    causal: bool = True
    window: int | None = None
    slopes: tuple[float, ...] | None = None
    documents: bool = False

    @property
    def masks(self) -> tuple[str, ...]:
        """What is more than the causal order, each with the flag it comes from."""
        found = [] if self.window is None else [f"a window of {self.window} tokens (--window-size)"]
        if self.slopes is not None:
            found.append("ALiBi (--position-embedding-type alibi)")
        return (*found, "documents (--reset-attention-mask)") if self.documents else tuple(found)
