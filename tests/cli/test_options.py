"""Options of several commands."""

from __future__ import annotations

from transfer_surgery.cli.options import model_spec


def test_yes_and_no_reach_the_model_also_in_small_letters() -> None:
    given = ["bias=false", "norm=true", "act=relu", "name='true'", "width=2"]
    expected = {"bias": False, "norm": True, "act": "relu", "name": "true", "width": 2}
    assert model_spec("net", given, None).arguments == expected
