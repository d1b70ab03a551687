"""The `shardlift` command."""

import os


def _quiet_grpc() -> None:
    """Has gRPC write nothing on stderr, unless $GRPC_VERBOSITY is set: what fails is raised, and told in one line.

    It reads the variable once, when it is imported; processes that this one starts must not inherit it.
    """
    if "GRPC_VERBOSITY" in os.environ:
        return
    os.environ["GRPC_VERBOSITY"] = "NONE"
    try:
        import grpc  # noqa: F401
    finally:
        del os.environ["GRPC_VERBOSITY"]


_quiet_grpc()
