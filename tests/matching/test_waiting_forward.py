"""Forward passes that wait in threads: the state of torch goes with them, and Ctrl-C ends them."""

import contextvars
import copy
import signal
import threading

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import convert, match_targets
from transfer_surgery.matching.two_networks.thread_state import ThreadState
from transfer_surgery.matching.two_networks.waiting_forward import WaitingForward


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        seen.append("function")
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.append("dispatch")
        return func(*args, **(kwargs or {}))


seen: list[str] = []
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def look() -> tuple:
    seen.clear()
    x = torch.ones(2, requires_grad=True) @ torch.ones(2, 2)
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return x.device, *autocast, x.requires_grad, variable.get(), sorted(set(seen))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_forward_pass_sees_the_state_of_the_thread_that_made_it(gradients):
    variable.set("set")
    with (
        torch.set_grad_enabled(gradients),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        Functions(),
        Dispatches(),
    ):
        expected, state = look(), ThreadState()
    assert expected[:3] == (torch.device("meta"), True, torch.bfloat16)
    forward = WaitingForward(lambda: forward.stop(look()), state)
    assert forward.advance() == expected
    assert look() != expected  # this thread has its own state back
    forward.close()


def test_a_model_is_matched_under_the_modes_of_its_user():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x, types = torch.randn(64, 4), set()
    convert(model, example_input=x)
    model[2].register_forward_hook(lambda _, args, output: types.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        match_targets(model, [x])
    assert types == {torch.bfloat16}


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also in a worker of pytest, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_all_threads_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x, calls = torch.randn(300, 4), []
    convert(model, example_input=x)
    before = copy.deepcopy(model)

    def interrupt(*args) -> None:
        if threading.current_thread() is not threading.main_thread():
            calls.append(1)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGINT)  # Python tells the main thread

    model[2].register_forward_pre_hook(interrupt)
    now = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        match_targets(model, x.split(50))
    assert threading.active_count() == now
    assert_same_bits(model, before)
