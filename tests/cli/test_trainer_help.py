"""``taperlit fit --help``: one screen, at once, of options that are there."""

import inspect
import subprocess
import sys

import pytest
import yaml
from test_configs import parse

from taperlit.cli.slots import SLOTS
from taperlit.cli.trainer_help import ALL, GROUPS, run_or_explain, short_help

OPTIONS = [option for options in GROUPS.values() for option in options]


@pytest.fixture(scope="module")
def defaults():
    """The options of ``fit`` when none is given."""
    return parse("--model.preset=small_1m", "--model.taper=all")


@pytest.mark.parametrize("option", OPTIONS, ids=[option.name for option in OPTIONS])
def test_each_is_an_option_and_has_the_default_that_is_told(defaults, option):
    if option.name in ("config", "print_config"):  # of the parser itself
        return
    section, _, rest = option.name.partition(".")
    slot, _, argument = rest.partition(".")
    if section == "taper":
        spec = defaults.taper[slot]
        value = spec is not None
        if argument:
            value = spec.init_args.get(argument, inspect.signature(SLOTS[slot].kind).parameters[argument].default)
    else:
        value = defaults[option.name]
        if option.name == "model.taper":
            value = "none"  # given above
        elif option.name == "model.preset":
            value = None
    if option.value.isupper():
        assert value in (None, -1)  # max_steps is -1 where it is not given
    else:
        assert yaml.safe_load(option.value) == value


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_it_fits_a_screen_and_says_where_the_rest_is(command, capsys):
    run_or_explain(command, ["--config=nowhere.yaml", "--help"])
    printed = capsys.readouterr().out
    assert printed == short_help(command) + "\n"
    lines = printed.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 120
    assert f"taperlit {command} {ALL}" in lines[-1]
    shown = {line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")}
    assert shown == {option.name for option in OPTIONS if option.only in (None, command)}


def test_it_imports_nothing_heavy():
    program = """
import sys
from taperlit.cli import main
assert main(["fit", "--help"]) == 0
print([name for name in ("torch", "lightning", "jsonargparse") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_the_rest_is_there(capsys):
    with pytest.raises(SystemExit) as exit:
        run_or_explain("fit", [ALL])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 400
    assert all(f"--{option.name}" in printed for option in OPTIONS if option.name.count(".") < 2)
