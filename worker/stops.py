"""Stop strings, as the criterion that transformers has for them.

transformers makes it itself only where its own loop runs: `generate` hands a tokenizer to no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from transformers import GenerationConfig, StoppingCriteria, StopStringCriteria

from ..proto.v1.errors import InvalidRequestError, one_line

# transformers keeps what it makes of a vocabulary in one dictionary for all threads.
_making = threading.Lock()


def asked(fields: Mapping[str, Any], own: GenerationConfig) -> list[str]:
    """The stop strings of a request's `fields`; where it doesn't name them, those of the model's `own` config.

    Raises InvalidRequestError for what is no string.
    """
    given = fields.get("stop_strings", own.stop_strings)
    strings = [given] if isinstance(given, str) else given or []
    if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings):
        raise InvalidRequestError(f"stop_strings={given!r}: write strings of one character or more")
    return strings


def criterion(strings: list[str], tokenizer: Callable[[], Any] | None) -> StoppingCriteria:
    """Looks at the tokenizer's whole vocabulary: seconds for a large one, so not for a thread that others wait for.

    Raises InvalidRequestError where there is no tokenizer.
    """
    if tokenizer is None:
        raise InvalidRequestError("stop_strings need the checkpoint's tokenizer, which isn't at hand here")
    found = tokenizer()
    with _making:
        try:
            return StopStringCriteria(tokenizer=found, stop_strings=strings)
        except (ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            raise InvalidRequestError(f"stop_strings can't be looked for: {one_line(error)}") from error
