"""Does the work of one device: bytes → tensors → resident layers → stage → server."""
