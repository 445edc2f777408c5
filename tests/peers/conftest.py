import contextlib

with contextlib.suppress(ImportError):  # without the peers installed, each test module skips itself
    import benchmarks.peers  # noqa: F401
