"""The cache of compiled steps, and what is reported when the compiler ends."""

import pytest
from plans import facts

from clip_jax.planning import compiling, searching
from clip_jax.planning.topologies import parse_topology


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            "noise\nERROR: Unknown command line flag 'xla_foo'\n",
            "LIBTPU_INIT_ARGS holds: Unknown command line flag 'xla_foo'",
        ),
        ("F0 1 parse.cc:2] Unknown flags in XLA_FLAGS: --xla_foo=1 \n", "XLA_FLAGS holds: --xla_foo=1"),
        ("Traceback\n  File x\nTypeError: no\n--------\nFor simplicity\n", "exit code 1: TypeError: no"),
        ("", "it said nothing"),
    ],
)
def test_a_compiler_that_ends_is_told_in_a_line(log, message):
    reason = compiling.why_it_ended(log, 1)
    assert message in reason and "\n" not in reason


def test_what_was_compiled_once_is_known(config, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: True)
    asked = []
    monkeypatch.setattr(compiling, "_ask_child", lambda *arguments: asked.append(1) or facts())
    topology = parse_topology("v5e:2x2")
    for change in ({}, {}, {"seed": 5}, {"data__source": "x"}, {"model__remat": "full"}, {"global_batch_size": 64}):
        assert compiling.compile_facts(searching.with_values(config, **change), topology) == facts()
    assert len(asked) == 3  # neither the data nor the seed is compiled
    compiling.compile_facts(config, parse_topology("v5e:4x4"))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_something")
    compiling.compile_facts(config, topology)
    assert len(asked) == 5


def test_what_was_compiled_is_known_again_after_a_change_of_words_and_not_after_one_of_the_program():
    program = 'def f(x):\n    """Doubles."""\n    return 2 * x\n'
    reworded = 'def f(x):  # not more\n    """Twice as much."""\n    return 2 * x\n'
    assert compiling._without_words(program) == compiling._without_words(reworded)
    assert compiling._without_words(program) != compiling._without_words(program.replace("2", "3"))
