"""A ``python`` with the libraries imported before it starts, which saves each process of a test two seconds.

``python -m MODULE`` and ``python FILE`` become forks of a server that has imported jax, flax, orbax and others, but not
the package itself. Other command lines, and processes that would start with other settings than the server, run in a
new interpreter.
"""

import atexit
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

SERVER = pathlib.Path(__file__).parent / "warm_python_server.py"
DEADLINE = 120  # seconds for the server's start

# Starts in 15 ms, since it imports next to nothing. It passes signals on to the fork and ends as the fork ends. Every
# answer of the server is a number of 8 bytes.
CLIENT = """#!{python} -SI
import json, os, signal, socket, sys

connection = socket.socket(socket.AF_UNIX)

def answer():
    return int.from_bytes(connection.recv(8, socket.MSG_WAITALL).rjust(8, b"\\0"), "big")

def pass_on(number, frame):
    try:
        os.killpg(process, number)
    except ProcessLookupError:
        pass

try:
    request = json.dumps([os.getcwd(), sys.argv[1:], dict(os.environ)]).encode()
    connection.connect("{address}")
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(request)
    process = answer()
except OSError:
    process = 0
if not process:
    os.execv("{python}", ["{python}", *sys.argv[1:]])
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, pass_on)
if not (ending := answer()):
    sys.exit("the server of warm_python has ended")
status = ending - 1
if os.WIFSIGNALED(status):
    if os.WTERMSIG(status) != signal.SIGKILL:
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
sys.exit(os.WEXITSTATUS(status))
"""


@functools.cache
def warm_python() -> str:
    """The path of the program; the server that it asks is started by the first call and ends with this process."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="clip_jax_python_"))
    address, program = folder / "socket", folder / "python"
    program.write_text(CLIENT.format(python=sys.executable, address=address))
    program.chmod(0o755)
    settings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    server = subprocess.Popen(
        [sys.executable, "-P", SERVER, address, program],
        stdin=subprocess.PIPE,
        env=settings,
        start_new_session=True,  # a Ctrl-C for the tests must not end it before it has ended its forks
    )
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.communicate)  # closes its input, at which it ends
    deadline = time.monotonic() + DEADLINE
    while not address.exists():
        assert server.poll() is None and time.monotonic() < deadline, "the server of warm_python has not started"
        time.sleep(0.01)
    return str(program)
