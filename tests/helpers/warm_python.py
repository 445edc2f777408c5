"""A ``python`` with the libraries imported before it starts, which saves each process of a test two seconds.

``python -m MODULE`` and ``python FILE`` become forks of a server that has imported jax, flax, orbax and others, but not
the package itself. All else, and what sets JAX up in another way than the server was, runs in a new interpreter.
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

# Starts in 15 ms, since it imports next to nothing. It passes signals on to the fork and ends as the fork ends.
CLIENT = """#!{python} -SI
import os, signal, socket, sys

def ask(connection):
    variables = "\\0".join(name + "=" + value for name, value in os.environ.items())
    parts = [os.getcwd(), "\\0".join(sys.argv), variables]
    message = "\\1".join(parts).encode("utf-8", "surrogateescape")
    connection.connect("{address}")
    socket.send_fds(connection, [len(message).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(message)
    return int(connection.recv(16))

connection = socket.socket(socket.AF_UNIX)
try:
    process = ask(connection)
except OSError:
    process = 0
if not process:
    os.execv("{python}", ["{python}", *sys.argv[1:]])
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.killpg(process, number))
status = int(connection.recv(16))
if os.WIFSIGNALED(status):
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
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    server = subprocess.Popen([sys.executable, "-P", SERVER, address, program], stdin=subprocess.PIPE, env=inherited)
    assert server.stdin is not None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.communicate)  # closes its input, at which it ends
    while not address.exists() and server.poll() is None:
        time.sleep(0.01)
    return str(program)
