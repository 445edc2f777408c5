"""A host of a pod that trains nothing, for the tests of the watch alone: it is busy for some seconds and leaves.

    python tests/helpers/watched_host.py SECONDS FOLDER

A host is taken for gone after 4 seconds of silence.
"""

import os
import pathlib
import sys
import time

import jax

from clip_jax.training import pod

pod.SILENCE, pod.PAUSE = 4, 0.5

if __name__ == "__main__":
    processes, index = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
    jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], processes, index)
    watch = pod.Watch(sys.argv[2])
    pathlib.Path(sys.argv[2], f"host {index} is watched").touch()
    time.sleep(float(sys.argv[1]))
    sys.exit(watch.leave(0, together=True))
