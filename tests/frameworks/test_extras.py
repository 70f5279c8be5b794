"""Frameworks are extras: the package loads none of them, and says how to get one."""

import importlib
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("lightning", "lightning.pytorch"),
        ("timm", "timm.optim.lookahead"),
        ("transformers", "transformers"),
    ],
)
def test_without_a_framework_the_message_says_how_to_get_it(monkeypatch, name, needs):
    module = f"transfer_surgery.frameworks.{name}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, needs, None)
    with pytest.raises(ImportError, match=rf"pip install 'transfer-surgery\[{name}\]'"):
        importlib.import_module(module)


def test_the_package_loads_nothing_that_is_an_extra():
    code = """if True:
        import sys
        import transfer_surgery.frameworks.records
        from transfer_surgery.reports import history, plots
        extras = {"lightning", "transformers", "timm", "accelerate", "safetensors"}
        extras |= {"matplotlib", "pandas", "rich"}
        loaded = extras & sys.modules.keys()
        assert not loaded, loaded
    """
    subprocess.run([sys.executable, "-c", code], check=True)
