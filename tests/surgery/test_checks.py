"""Models that cannot be converted are refused with the fix, and stay as they were."""

import threading

import pytest
import torch
from torch import nn

from tests.helpers.promises import Body, X, assert_every_promise, assert_refused
from transfer_surgery import convert, find_activations


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_scripted_children_are_refused_by_path(script):
    model = nn.Sequential(nn.ReLU(), nn.Sequential(script(nn.Sequential(nn.Linear(4, 4)))))
    assert_refused(model, TypeError, r"^1\.0 is a .*: convert the model before torch\.jit\.script")


def test_compiled_models_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert_refused(torch.compile(model), TypeError, r"the model is a .* before torch\.compile")
    assert_refused(nn.Sequential(torch.compile(model)), TypeError, r"^0 is a .*torch\.compile")
    model[0].compile()
    assert_refused(model, TypeError, r"^0 is compiled in place: .* before calling compile\(\)")


def test_models_wrapped_for_several_devices_are_refused():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def model():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        for wrapped, message in (
            (nn.parallel.DistributedDataParallel(model()), "before wrapping it in Distributed"),
            (nn.DataParallel(model()), "before wrapping it in DataParallel"),
            (nn.Sequential(fully_shard(model())), "^0 is a .* before fully_shard"),
        ):
            assert_refused(wrapped, TypeError, message)
        sharded = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
        nn.Module.__init__(sharded)  # a real one needs a GPU
        assert_refused(sharded, TypeError, "before wrapping it in FSDP")
    finally:
        destroy_process_group()


def test_models_without_values_are_refused():
    lazy = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LazyLinear(3))
    assert_refused(lazy, ValueError, "^2: weight has no shape yet. Run the model once")
    lazy(X)
    assert_every_promise(lazy, X)
    meta = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to("meta")
    assert_refused(meta, ValueError, "^0: weight is on the meta device .* Materialise")
    assert len(find_activations(meta, X.to("meta"))) == 1


def test_models_without_activations_are_refused():
    assert_refused(nn.Linear(4, 4), ValueError, "called no known activation")


def test_a_model_that_cannot_be_copied_is_refused():
    model = Body()
    model.lock = threading.Lock()
    assert_refused(model, TypeError, r"^Body cannot be deep-copied .* Make it deep-copyable")


@pytest.mark.parametrize("other", [nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Identity()])
def test_a_plan_of_another_model_is_refused(other):
    plan = find_activations(nn.Sequential(nn.Linear(4, 4), nn.SiLU()), X)
    before = list(other.children())
    with pytest.raises(ValueError, match=r"the plan is of another model: it has a \w+ at '1?'"):
        convert(other, plan=plan)
    assert list(other.children()) == before


def test_gates_that_are_made_in_inference_mode_can_be_trained():
    model = Body()
    with torch.inference_mode():
        convert(model, example_input=X)
    model.train()(X).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
