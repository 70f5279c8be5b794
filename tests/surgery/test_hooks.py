"""Hooks go on running where sites are converted, baked and reverted."""

import collections
import copy
import functools

from torch import nn

from tests.helpers.promises import Body, X, assert_every_promise
from transfer_surgery import bake, convert, revert


def test_hooks_of_every_kind_go_on_running_on_callers_and_activations_until_removed():
    model, seen = nn.Sequential(Body(), nn.Linear(4, 4), nn.ReLU()), collections.Counter()
    handles = []
    for name, module in (("caller", model[0]), ("activation", model[2])):

        def count(kind, *_, name=name):
            seen[name, kind] += 1

        handles += [
            module.register_forward_pre_hook(functools.partial(count, "pre")),
            module.register_forward_pre_hook(functools.partial(count, "pre kw"), with_kwargs=True),
            module.register_forward_hook(functools.partial(count, "post")),
            module.register_forward_hook(functools.partial(count, "post kw"), with_kwargs=True),
            module.register_forward_hook(functools.partial(count, "always"), always_call=True),
            module.register_full_backward_pre_hook(functools.partial(count, "backward pre")),
            module.register_full_backward_hook(functools.partial(count, "backward")),
        ]
    convert(model, example_input=X)
    assert not seen
    for step in (convert, bake):
        seen.clear()
        model(X.clone().requires_grad_()).sum().backward()
        assert len(seen) == len(handles), step
        assert set(seen.values()) == {1}
        if step is convert:
            bake(model)
    for handle in handles:
        handle.remove()
    model(X.clone().requires_grad_()).sum().backward()
    assert set(seen.values()) == {1}


def test_what_hooks_change_still_counts():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    model[1].register_forward_hook(lambda _, args, output: output * 3)
    assert_every_promise(model, X, copies=(copy.deepcopy,))


def test_hooks_of_an_activation_that_two_places_call_run_at_both():
    model = Body()
    model.act.register_forward_hook(lambda _, args, output: output * 3)
    assert_every_promise(model, X, copies=(copy.deepcopy,))


def test_hooks_registered_on_a_gated_activation_stay_when_it_is_reverted():
    model, seen = convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), example_input=X), []
    model[1].register_full_backward_hook(lambda *_: seen.append(1))
    revert(model)(X).sum().backward()
    assert seen == [1]


def test_hooks_that_keep_tensors_of_the_graph_do_not_keep_a_model_from_being_copied():
    class Recorder:
        def hook(self, module, args, output):
            self.output = output

    model, recorder = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Recorder()
    model[1].register_forward_hook(recorder.hook)
    model(X)
    kept = recorder.output
    convert(model, example_input=X)
    assert recorder.output is kept
    model(X)
    assert recorder.output is not kept


def test_global_hooks_see_no_module_while_a_model_is_converted():
    seen = []
    handles = [
        nn.modules.module.register_module_forward_pre_hook(lambda *_: seen.append("pre")),
        nn.modules.module.register_module_forward_hook(lambda *_: seen.append("post")),
    ]
    try:
        model = convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), example_input=X)
        assert not seen
        model[0](X)
        assert seen == ["pre", "post"]
    finally:
        for handle in handles:
            handle.remove()
