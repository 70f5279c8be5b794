"""torch's own recurrent, attention and transformer layers, whose kernels hide activations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import assert_every_promise, same, tensors, units
from transfer_surgery import bake, convert, find_activations, revert

X = torch.linspace(-3, 3, 3 * 5 * 8).reshape(3, 5, 8)


def my_gelu(x):
    return F.gelu(x)


ACTIVATIONS = {
    "'relu'": lambda: "relu",
    "'gelu'": lambda: "gelu",
    "F.relu": lambda: F.relu,
    "nn.ReLU": nn.ReLU,
    "nn.GELU": nn.GELU,
    "my_gelu": lambda: my_gelu,
}


def layer(activation, norm_first=False, batch_first=True):
    return nn.TransformerEncoderLayer(
        *(8, 2, 16),
        activation=ACTIVATIONS[activation](),
        norm_first=norm_first,
        batch_first=batch_first,
    )


def encoder(*args):
    one = layer(*args)
    fused = bool(one.activation_relu_or_gelu) and not one.norm_first
    return nn.TransformerEncoder(one, 2, enable_nested_tensor=fused)


def slowly(model, *args, **kwargs):
    """Outputs without torch's fused inference kernels."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return tensors(model(*args, **kwargs))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def assert_gates_count_in_fused_inference(model, *args, **kwargs):
    """In eval mode without gradients, where torch would take its fused path, as anywhere else."""
    reference = copy.deepcopy(model.eval())
    convert(model, example_input=args)
    before = tensors(model(*args, **kwargs))
    assert same(slowly(model, *args, **kwargs), slowly(reference, *args, **kwargs))
    torch.testing.assert_close(before, slowly(reference, *args, **kwargs))
    for path, unit in units(model).items():
        start = unit.log_alpha.clone()
        unit.log_alpha.fill_(-8.0)
        assert not same(tensors(model(*args, **kwargs)), before), path
        unit.log_alpha.copy_(start)
    moved = copy.deepcopy(model)
    for unit in units(moved).values():
        unit.log_alpha.fill_(-8.0)
    expected = tensors(moved(*args, **kwargs))
    assert same(tensors(bake(moved)(*args, **kwargs)), expected)
    assert same(tensors(bake(copy.deepcopy(model))(*args, **kwargs)), before)
    assert same(tensors(revert(model)(*args, **kwargs)), tensors(reference(*args, **kwargs)))
    for module, original in zip(model.modules(), reference.modules(), strict=True):
        assert vars(module).keys() == vars(original).keys()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("make", [layer, encoder])
@torch.no_grad()
def test_transformer_encoders_use_their_gates_in_fused_inference(make, activation, norm_first):
    assert_gates_count_in_fused_inference(make(activation, norm_first), X)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("activation", ["'relu'", "nn.GELU"])
@torch.no_grad()
def test_padded_batches_that_torch_would_pack_into_nested_tensors_use_the_gates(activation):
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]).bool()
    model = encoder(activation).eval()
    reference = copy.deepcopy(model)
    convert(model, example_input=X)
    expected = reference(X, src_key_padding_mask=padding)
    output = model(X, src_key_padding_mask=padding)
    # The nested path fills padding with zeros, the other one computes it, as in training mode.
    torch.testing.assert_close(output[~padding], expected[~padding])
    assert same(
        slowly(model, X, src_key_padding_mask=padding),
        slowly(reference, X, src_key_padding_mask=padding),
    )
    units(model).popitem()[1].log_alpha.fill_(-8.0)
    assert not torch.allclose(model(X, src_key_padding_mask=padding)[~padding], output[~padding])
    again = revert(model)(X, src_key_padding_mask=padding)
    assert torch.equal(again, expected)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("activation", ["'relu'", "nn.GELU", "my_gelu"])
@torch.no_grad()
def test_decoders_and_whole_transformers_use_their_gates(activation):
    def build(cls, *args, **kwargs):
        return cls(*args, activation=ACTIVATIONS[activation](), batch_first=True, **kwargs)

    decoder = nn.TransformerDecoder(build(nn.TransformerDecoderLayer, 8, 2, 16), 2)
    assert_gates_count_in_fused_inference(decoder, X, X)
    assert_gates_count_in_fused_inference(build(nn.Transformer, 8, 2, 1, 1, 16), X, X)


@torch.no_grad()
def test_layers_that_never_took_the_fused_path_stay_bit_for_bit():
    assert_every_promise(layer("'relu'", batch_first=False), X)


def test_transformer_encoders_train_with_a_gradient_for_every_gate():
    model = convert(encoder("nn.ReLU").train(), example_input=X)
    model(X).square().mean().backward()
    assert all(unit.log_alpha.grad.isfinite().all() for unit in units(model).values())


class Recurrent(nn.Module):
    """A recurrent layer and a head of its own."""

    def __init__(self, cls, **options):
        super().__init__()
        self.layer, self.head = cls(8, 8, **options), nn.Linear(8, 4)

    def forward(self, x):
        if isinstance(self.layer, nn.RNNBase):
            output = self.layer(x)[0]
        else:
            state = None
            for step in x.unbind(1):
                state = self.layer(step, state)
            output = state[0] if isinstance(state, tuple) else state
        return F.gelu(self.head(output))


@pytest.mark.parametrize(
    ("cls", "options", "name"),
    [
        (nn.LSTM, {}, "lstm"),
        (nn.GRU, {}, "gru"),
        (nn.RNN, {}, "rnn_tanh"),
        (nn.RNN, {"nonlinearity": "relu"}, "rnn_relu"),
        (nn.LSTMCell, {}, "lstm_cell"),
        (nn.GRUCell, {}, "gru_cell"),
        (nn.RNNCell, {}, "rnn_tanh_cell"),
    ],
)
def test_activations_inside_recurrent_kernels_are_listed_and_the_others_converted(
    cls, options, name
):
    hidden, head = find_activations(Recurrent(cls, **options), X)
    assert (hidden.caller, hidden.source.name) == ("layer", name)
    assert hidden.reason == "it is inside a fused kernel, which takes no other activation"
    assert (str(head.source), head.reason) == ("gelu", None)
    model = assert_every_promise(Recurrent(cls, **options), X)
    assert list(units(model)) == ["gelu_0"]


@pytest.mark.parametrize("batch", [1, 3])
def test_recurrent_layers_may_be_given_their_state(batch):
    class WithState(Recurrent):
        def forward(self, x, state):
            return F.gelu(self.head(self.layer(x, state)[0]))

    x, state = torch.randn(5, batch, 8), torch.randn(1, batch, 8)
    assert_every_promise(WithState(nn.GRU), x, state, copies=(copy.deepcopy,))


def test_attention_has_no_activation_of_its_own_and_stays():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.act = nn.SiLU()

        def forward(self, x):
            return self.act(self.attention(x, x, x, need_weights=False)[0])

    model = assert_every_promise(Attention(), X, copies=(copy.deepcopy,))
    assert list(units(model)) == ["act"]
