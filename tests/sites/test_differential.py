"""Random networks with effects in their forward do after the conversion what they did before."""

import linecache
import random
import sys
import types

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.helpers.same_run import assert_same_runs, converted
from transfer_surgery import find_activations

HEAD = """
import contextlib
import functools
import random
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Mapping(dict):
    @property
    def logits(self):
        return self["logits"]


@dataclass
class Record:
    h: torch.Tensor


def helper(h, scale=1.0):
    return {helper} * scale


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.act = nn.Linear(4, 4), nn.Linear(4, 4), nn.SiLU()
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("running", torch.ones(4))
        self.cfg, self.table = SimpleNamespace(scale=0.9, slope=0.3), {"scale": 1.1}
        self.calls, self.log, self.feature, self.function = 0, [], None, F.celu

    def forward(self, h):
        self.calls += 1
        return {base}


class Net(Base):
    def step(self, h):
        self.log.append("step")
        return {step}

    def each(self, h):
        for scale in (0.5, 1.5):
            self.calls += 1
            yield {step} * scale

    def again(self, h, depth):
        return self.again({step}, depth - 1) if depth else h

    @contextlib.contextmanager
    def logged(self):
        self.log.append("begin")
        yield
        self.log.append("end")

    @staticmethod
    def fixed(h):
        return {fixed}

    @property
    def last(self):
        return {last}

    def forward(self, h):
        h = self.one(h)
"""
ACTIVATIONS = (
    *("F.relu(h)", "torch.tanh(h)", "h.sigmoid()", "F.gelu(h, approximate='tanh')", "self.act(h)"),
    *("h * torch.sigmoid(h)", "F.leaky_relu(h, negative_slope=0.2)", "F.relu(self.two(h)) ** 2"),
    *("torch.nn.functional.elu(input=h)", "self.function(h)", "F.relu(h * 1.0, inplace=True)"),
)
PLAIN = tuple(a for a in ACTIVATIONS if "self" not in a)
STATEMENTS = (
    "h = {act}",
    "h = {act} + {act}",
    "h = h - 0.1 if isinstance(h, torch.Tensor) else None",
    "self.calls, self.feature = self.calls + 1, {act}",
    "self.log.append(float(h.detach().sum()))",
    "self.count.add_(1)",
    "self.running.mul_(0.5).add_(h.detach().mean(0))",
    "h = {act} * self.cfg.scale * self.table['scale']",
    "self.table['scale'] *= 0.99",
    "h = h + 0.1 if random.random() < 0.5 else h - 0.1",
    "h = h * torch.rand(()) + torch.rand_like(h)",
    "h = F.dropout(h, 0.5, self.training)",
    "if self.training:\n    h = {act}",
    "with torch.no_grad():\n    g = {act}\nh = h + g",
    "with torch.autocast('cpu', torch.bfloat16):\n    h = self.two({act})\nh = h.float()",
    "h = Reverse.apply({act})",
    "h = h * 1.0\nv = h[:, :2]\nv *= 2",
    "h = h * 1.0\nh *= torch.sigmoid(h)",
    "h = sum([{act} for _ in range(2)])",
    "for i in range(2):\n    h = {act} - 0.1 * i",
    "h = self.step(h)",
    "h = self.step(h) + self.step(h)",
    "h = helper(h) - helper(h * 0.5, scale=2.0)",
    "h = checkpoint(self.step, h, use_reentrant=False)",
    "h = super().forward(h)",
    "h = self.fixed(h)",
    "self.feature = h\nh = self.last",
    "h = (lambda h: {act})(h)",
    "def inner(h):\n    return {act}\nh = inner(h)",
    "try:\n    h = {act}\nfinally:\n    self.calls += 1",
    "assert h.shape[-1] == 4, h.shape",
    "h = sum(self.each(h)) + sum(self.each(h * 0.5))",
    "for g in self.each(h):\n    h = h + g",
    "h = self.again(h, 2)",
    "with self.logged():\n    h = {act}",
    "h = F.leaky_relu(h, self.cfg.slope)",
    "h = (g := {act}) * 0.5 + g",
    "h = {act} if self.training else {act}",
    "h = functools.partial(helper, scale=0.5)(h) + helper(*[h], **{'scale': 0.1})",
)
RETURNS = ("h", "Mapping(logits=h)", "Record(h)", "(h, [h])", "{'h': h, 'scale': self.cfg.scale}")


@st.composite
def programs(draw):
    """The source of a module with a network."""
    act = st.sampled_from(ACTIVATIONS)
    plain = st.sampled_from(PLAIN)
    parts = {"helper": draw(plain), "base": draw(act), "step": draw(act)}
    parts |= {"fixed": draw(plain.filter(lambda a: "two" not in a))}
    parts |= {"last": "F.elu(self.feature)"}
    lines = HEAD
    for name, text in parts.items():
        lines = lines.replace("{" + name + "}", text)
    for statement in [*draw(st.lists(st.sampled_from(STATEMENTS), min_size=1, max_size=6))]:
        while "{act}" in statement:
            statement = statement.replace("{act}", draw(act), 1)
        lines += "".join(f"        {line}\n" for line in statement.splitlines())
    return lines + f"        return {draw(st.sampled_from(RETURNS))}\n"


def load(source):
    """Import source text as a module: its lines can be read as those of a file can."""
    name = f"written_{abs(hash(source)):x}"
    file = f"<{name}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, file, "exec"), vars(module))
    return module


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(programs())
def test_a_converted_network_does_what_the_original_does(source):
    module = load(source)
    torch.manual_seed(0)
    random.seed(0)
    model, x = module.Net(), torch.randn(3, 4)
    plan = find_activations(model, x)
    assume(any(site.role == "hidden" and site.reason is None for site in plan))
    assert {site.way for site in plan} <= {"child", "edit"}, plan
    try:
        assert_same_runs(model, converted(model, x), x)
    except RuntimeError as error:  # the original writes over what its own backward needs
        assume("modified by an inplace operation" not in str(error))
        raise


@pytest.mark.parametrize("statement", STATEMENTS)
def test_each_effect_alone(statement):
    source = HEAD + "".join(
        f"        {line}\n" for line in statement.replace("{act}", "F.mish(h)").splitlines()
    )
    for name in ("helper", "base", "step", "fixed"):
        source = source.replace("{" + name + "}", "F.hardswish(h)")
    source = source.replace("{last}", "F.elu(self.feature)")
    module = load(source + "        return F.softplus(h) * 2\n")
    model, x = module.Net(), torch.randn(3, 4)
    assert {site.way for site in find_activations(model, x)} <= {"child", "edit"}
    assert_same_runs(model, converted(model, x), x)
