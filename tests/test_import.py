"""Importing changes nothing and is cheap; names are what they say."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from capotune.device import collector_at_rest

WATCH = """
import json, logging, os, sys, warnings, signal, threading
def state():
    named = logging.root.manager.loggerDict
    loggers = {name: len(getattr(one, "handlers", [])) for name, one in named.items()}
    return {
        "environment": dict(os.environ), "filters": repr(warnings.filters), "handlers": repr(logging.root.handlers),
        "level": logging.root.level, "loggers": {name: count for name, count in loggers.items() if count},
        "signals": repr([signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]),
        "threads": threading.active_count(), "path": sys.path[:], "cwd": os.getcwd(), "files": os.listdir("."),
        "excepthook": repr(sys.excepthook),
    }
before = state()
exec(sys.argv[1])
after = state()
heavy = sorted({"torch", "transformers", "datasets", "sklearn", "numpy", "tyro", "rich", "yaml"} & set(sys.modules))
print(json.dumps({"changed": [name for name in before if before[name] != after[name]], "heavy": heavy}))
"""


def in_a_new_process(statement: str, cwd: Path) -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCH, statement], capture_output=True, text=True, check=True, cwd=cwd
    )
    assert done.stderr == ""
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("statement", ["import capotune", "import capotune; capotune.CapotuneError, capotune.train"])
def test_import_is_light_and_changes_nothing(statement: str, tmp_path: Path) -> None:
    assert in_a_new_process(statement, tmp_path) == {"changed": [], "heavy": []}


def test_importing_the_functions_and_the_command_line_changes_nothing(tmp_path: Path) -> None:
    found = in_a_new_process("import capotune.api, capotune.cli, capotune.runs.compare, capotune.report", tmp_path)
    assert found["changed"] == []
    assert not {"torch", "transformers", "datasets", "sklearn"} & set(found["heavy"])


@pytest.mark.parametrize("at_work", [True, False])
def test_the_collector_rests_and_is_then_as_it_was(at_work: bool) -> None:
    """Also after an error, and one inside the other."""
    was_at_work = gc.isenabled()
    try:
        (gc.enable if at_work else gc.disable)()
        with pytest.raises(KeyError), collector_at_rest():  # noqa: PT012 - what is asked inside is the test
            with collector_at_rest():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == at_work
    finally:
        (gc.enable if was_at_work else gc.disable)()


def test_all_resolves() -> None:
    import capotune

    assert len(set(capotune.__all__)) == len(capotune.__all__)
    for name in capotune.__all__:
        assert getattr(capotune, name) is not None
    namespace: dict[str, object] = {}
    exec("from capotune import *", namespace)
    assert set(capotune.__all__) <= set(namespace)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import capotune

    with pytest.raises(AttributeError, match="'capotune' has no attribute 'trian'"):
        capotune.trian  # noqa: B018


def test_functions_stay_functions_after_every_submodule_was_imported(tmp_path: Path) -> None:
    statement = (
        "import importlib, pkgutil, capotune\n"
        "names = [one.name for one in pkgutil.walk_packages(capotune.__path__, 'capotune.')]\n"
        "assert len(names) > 25, names\n"
        "[importlib.import_module(name) for name in names]\n"
        "functions = 'compare evaluate info load load_base predict train'.split()\n"
        "assert set(functions) < set(capotune.__all__)\n"
        "print([name for name in functions if not callable(getattr(capotune, name))])"
    )
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "[]\n"
