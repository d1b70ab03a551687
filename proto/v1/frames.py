"""Messages that carry nothing but bytes, put together and taken apart without protobuf, which would copy them thrice.

On the wire they are what protobuf makes of them: other languages notice nothing.
"""

from __future__ import annotations

_LENGTH_DELIMITED = 2


def bytes_message(field: int, data: bytes | memoryview) -> bytes:
    """The serialized message whose only field, number `field` (1 to 15), is `data`."""
    assert 0 < field < 16
    head = bytearray([field << 3 | _LENGTH_DELIMITED])
    size = len(data)
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return b"".join((head, data))


def only_bytes(field: int, message: bytes) -> memoryview | None:
    """The bytes of a message whose only field is number `field`, not copied; None for any other message."""
    if not message or message[0] != field << 3 | _LENGTH_DELIMITED:
        return None
    size = shift = 0
    for start, byte in enumerate(message[1:6], 2):
        size |= (byte & 0x7F) << shift
        if byte < 0x80:
            return memoryview(message)[start:] if start + size == len(message) else None
        shift += 7
    return None
