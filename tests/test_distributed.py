"""Two gloo processes train, save and match as one process does with the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import SGD, Optimizer

from tests.helpers import rank_programs as programs
from tests.helpers import ranks
from tests.helpers.ranks import GAMMA, OPTIMIZERS, SETTINGS, STEPS, on_ranks
from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import (
    load_gates,
    match_targets,
    report,
    revert,
    structural_risk,
    wrap_optimizer,
)
from transfer_surgery.units import gated_activations

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without distributed"
)


def one_process(optimizer: str, how: str) -> nn.Module:
    """The reference: the whole batch in one process, the risk by autograd."""
    model = ranks.network()
    opt = OPTIMIZERS[optimizer](model.parameters())
    if how != "gamma":
        wrap_optimizer(opt, model, **SETTINGS[how])
    whole_batch(model, opt, range(STEPS), explicit=how == "gamma")
    return model


def whole_batch(model: nn.Module, opt: Optimizer, steps: range, explicit: bool = False) -> None:
    for step in steps:
        loss = ranks.loss(model, step)
        (loss + GAMMA * structural_risk(model) if explicit else loss).backward()
        opt.step()
        opt.zero_grad()


CASES = [("momentum", "gamma"), ("adamw", "schedule"), ("momentum", "part by part")]
RESUMED = [("adamw", "part by part"), ("sgd", "schedule")]
KINDS = ("ddp", "fsdp")


def batches() -> list[torch.Tensor]:
    """To match targets with: three, of which the first rank gets two."""
    return list(torch.randn(480, 6, generator=torch.Generator().manual_seed(3)).split(160))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[ranks.Result]:
    """What two ranks made of every program, by rank."""
    bad = [batches()[0], batches()[1][:, :2], batches()[2]]  # rank 1 gets one that is no input
    calls: dict[Any, tuple[Any, ...]] = {
        "corners": (programs.corners,),
        "precision": (programs.low_precision, "schedule"),
        "gates": (programs.gates_only, folder / "gates"),
        "matched": (programs.matched, batches()),
        "not matched": (programs.matched, bad),
    }
    for kind, program in zip(KINDS, (programs.ddp, programs.fsdp), strict=True):
        calls |= {(kind, *case): (program, *case) for case in CASES}
        calls[kind, "nan"] = (programs.not_finite, kind)
    for baked in (False, True):
        calls["fsdp 1", baked] = (programs.flattened, baked)
    for case in RESUMED:
        calls["resumed", *case] = (programs.checkpoint, *case, folder / case[0])
    return on_ranks(programs.in_turn, folder, calls)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("optimizer", "how"), CASES)
def test_two_ranks_that_accumulate_equal_one_process_with_the_whole_batch(
    results: list[ranks.Result], kind: str, optimizer: str, how: str
) -> None:
    first, second = (result[kind, optimizer, how] for result in results)
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert first["report"] == second["report"]
    reference = one_process(optimizer, how)
    torch.testing.assert_close(first["state"], reference.state_dict(), rtol=1e-4, atol=1e-5)
    for row, expected in zip(
        first["report"]["rows"], report(reference).to_dict()["rows"], strict=True
    ):
        assert row["gates"] == expected["gates"]
        assert row["mean_gate"] == pytest.approx(expected["mean_gate"], abs=1e-5)
    if kind == "fsdp":
        assert (first["shards"], second["shards"]) == ([1, 4, 3], [0, 4, 2])
        risk = structural_risk(reference)
        gradient = torch.autograd.grad(risk, [reference[4].log_alpha])[0]
        torch.testing.assert_close(first["risk"], risk.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second["gradient"], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("baked", [False, True])
def test_a_step_under_fsdp_1_is_that_of_one_process(
    results: list[ranks.Result], baked: bool
) -> None:
    first, second = (result["fsdp 1", baked] for result in results)
    model = ranks.fitted_network(baked)
    opt = SGD(model.parameters(), lr=0.1)
    ranks.loss(model, 0).backward()
    opt.step()
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    expected = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(first["state"], expected, rtol=1e-4, atol=1e-6)
    assert ("FSDP 1 and ZeRO-3 flatten parameters" in first["refused"]) is not baked


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the one process
@pytest.mark.parametrize(("optimizer", "how"), RESUMED)
def test_a_sharded_checkpoint_continues_on_two_ranks_and_on_one(
    results: list[ranks.Result], folder: Path, optimizer: str, how: str
) -> None:
    first, second = (result["resumed", optimizer, how] for result in results)
    assert first["steps"] == second["steps"] == 2 * STEPS
    torch.testing.assert_close(first["resumed"], first["state"], rtol=0, atol=0)

    model = ranks.network()
    opt = ranks.wrapped(model, optimizer, how)
    model_state, optimizer_state = get_state_dict(model, opt)
    loaded = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(loaded, checkpoint_id=folder / optimizer, no_dist=True)
    set_state_dict(
        model, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    assert opt.param_groups[-1]["transfer_step"] == STEPS
    whole_batch(model, opt, range(STEPS, 2 * STEPS))
    torch.testing.assert_close(model.state_dict(), first["state"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_on_one_rank_stops_both(
    results: list[ranks.Result], kind: str
) -> None:
    for result in results:
        assert "is not finite (nothing was updated)" in result[kind, "nan"]["message"]
        assert result[kind, "nan"]["same"]


def test_ranks_decide_together_and_write_into_shards_only(results: list[ranks.Result]) -> None:
    budget = SETTINGS["schedule"]["transfer"].budget(STEPS)
    for result in (result["corners"] for result in results):
        assert result["warm-up from 0"].item() == pytest.approx(budget, abs=1e-3)
        assert "is not finite" in result["partly sharded"]
        assert result["evaluation"].item() == pytest.approx(budget, abs=1e-3)
        sizes, message = result["late wrap"]
        assert sizes == [8, 3]
        assert "call model.reshard() before you build the optimizer" in message


def test_gates_stay_float32_under_a_bfloat16_policy(results: list[ranks.Result]) -> None:
    first, second = (result["precision"] for result in results)
    assert first["dtype"] == torch.float32
    assert first["risk"] == second["risk"]
    budget = SETTINGS["schedule"]["transfer"].budget(STEPS)
    assert first["risk"].item() == pytest.approx(budget, abs=1e-3)


def test_gates_of_a_sharded_model_are_saved_whole_and_loaded_anywhere(
    results: list[ranks.Result], folder: Path
) -> None:
    first, second = (result["gates"] for result in results)
    base = revert(ranks.network())
    load_gates(base, folder / "gates", example_input=torch.zeros(2, 6))
    gates = {key: v for key, v in base.state_dict().items() if key.endswith("log_alpha")}
    assert len(gates) == 3
    for key, log_alpha in gates.items():
        for result in (first, second):
            assert torch.equal(result["saved"][key], log_alpha)
            assert torch.equal(result["loaded"][key], log_alpha)
    assert first["kept"]
    assert second["kept"]
    assert all("is sharded by fully_shard. Gather its state" in text for text in first["refused"])
    assert len(first["refused"]) == 2


def test_creating_the_state_of_an_optimizer_is_no_step_of_the_schedule() -> None:
    model = ranks.network()
    optimizer = ranks.wrapped(model, "adamw", "schedule")
    before = [unit.log_alpha.detach().clone() for _, unit in gated_activations(model)]
    get_state_dict(model, optimizer)  # takes a step with zero gradients and learning rates
    assert optimizer.param_groups[-1]["transfer_step"] == 0
    for (_, unit), start in zip(gated_activations(model), before, strict=True):
        assert torch.equal(unit.log_alpha, start)
        assert not optimizer.state[unit.log_alpha]["exp_avg"].any()


def test_two_ranks_match_what_one_process_matches_with_all_batches(
    results: list[ranks.Result],
) -> None:
    model = ranks.network()
    expected = match_targets(model, batches(), refit=True)
    first, second = (result["matched"] for result in results)
    for name, value in model.state_dict().items():
        assert torch.equal(first["state"][name], second["state"][name])
        torch.testing.assert_close(first["state"][name], value, rtol=1e-3, atol=1e-4)
    assert first["r2"] == pytest.approx([row.r2 for row in expected], rel=1e-4)


def test_an_error_of_matching_on_one_rank_is_one_on_all_and_changes_nothing(
    results: list[ranks.Result],
) -> None:
    found = [result["not matched"] for result in results]
    assert "another rank" in found[0]["error"]
    assert "shapes" in found[1]["error"]
    for result in found:
        assert_same_bits(result["state"], ranks.network())
