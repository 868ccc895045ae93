"""The transformer: what it computes, and that its large preset is the paper's model."""
import copy
import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

import model

TINY = model.Shape(layers=2, heads=2, width=32, window=16, vocab=50, rotary=.5, shift=.5)


def tokens(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(TINY.vocab, (rows, TINY.window + 1), generator=generator)
    return x[:, :-1], x[:, 1:]


def test_a_token_never_sees_its_future():
    net = model.Transformer(TINY)
    x, y = tokens()
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % TINY.vocab
    before, after = net(x, y, per_token=True), net(changed, y, per_token=True)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_loss_is_one_number_per_sequence_the_mean_over_its_tokens():
    net = model.Transformer(TINY)
    x, y = tokens()
    assert net(x, y).shape == (3,)
    torch.testing.assert_close(net(x, y), net(x, y, per_token=True).mean(1))
    torch.testing.assert_close(net(x, y)[1:2], net(x[1:2], y[1:2]))     # no sequence sees another


def test_attention_knows_positions_only_relative_to_each_other():
    """<rotate(q, t), rotate(k, s)> depends on t - s alone; channels past the rotary share know no
    position at all."""
    cos, sin = (table.double() for table in model.rotary_tables(20, 8))
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    q, k = (torch.randn(16, generator=g).double().expand(1, 1, 20, 16) for g in generators)
    rq, rk = model.rotate(q, cos, sin)[0, 0], model.rotate(k, cos, sin)[0, 0]
    scores = rq @ rk.T                                                         # (20, 20)
    for lag in (0, 3, 11):
        along = scores.diagonal(-lag)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-6, atol=1e-6)
    assert abs(scores[0, 0] - scores[5, 0]) > 1e-3
    torch.testing.assert_close(rq[:, 8:], q[0, 0, :, 8:])


def test_the_first_channels_are_read_one_token_late():
    x = torch.arange(24.).view(1, 3, 8)
    late = model.read_late(x, 4)
    assert late[0, 0].tolist() == [0, 0, 0, 0, 4, 5, 6, 7]
    assert late[0, 2].tolist() == [8, 9, 10, 11, 20, 21, 22, 23]


def test_equal_generators_give_equal_models():
    a, b, c = (model.Transformer(TINY, torch.Generator().manual_seed(s)) for s in (4, 4, 5))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_a_new_model_knows_nothing_yet_its_loss_is_near_that_of_guessing():
    net = model.Transformer(dataclasses.replace(TINY, vocab=1024))
    x, y = tokens(64)
    assert abs(net(x, y).mean() - torch.tensor(1024.).log()) < .5


def test_pythia_160m_has_the_shapes_and_the_parameters_of_pythia_160m():
    shape = model.PRESETS["pythia-160m"]
    with torch.device("meta"):
        net = model.Transformer(shape)
    parameters = sum(w.numel() for w in net.parameters())
    assert parameters == 162_322_944                        # EleutherAI's count, both embeddings
    assert (shape.layers, shape.heads, shape.width, shape.vocab) == (12, 12, 768, 50304)
    assert net.cos.shape == (2048, 16)                      # a quarter of 64 channels per head


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 33 is not a multiple of heads 2"):
        dataclasses.replace(TINY, width=33)


def test_a_token_is_known_by_its_place_not_only_by_its_company():
    """Without positions one layer of attention would see the past as a set, in which two tokens may
    change places."""
    net = model.Transformer(dataclasses.replace(TINY, layers=1, shift=0.))
    x, y = tokens(1)
    swapped = x.clone()
    swapped[:, [0, 1]] = x[:, [1, 0]]
    assert (net(x, y, per_token=True) - net(swapped, y, per_token=True))[:, 2:].abs().max() > 1e-4


def test_attention_and_mlp_read_the_same_x_and_add_up():
    block = model.Block(dataclasses.replace(TINY, shift=0.))
    x, tables = torch.randn(2, 16, 32), model.rotary_tables(16, 8)
    whole, parts = block(x, *tables) - x, 0
    for out in (block.attn_out, block.mlp_out):
        kept = copy.deepcopy(out.state_dict())
        for w in out.parameters():
            torch.nn.init.zeros_(w)
        parts = parts + block(x, *tables) - x
        out.load_state_dict(kept)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_with_a_shift_the_mlp_reads_the_token_before_too():
    tables = model.rotary_tables(16, 8)
    for shift, late in ((0., False), (.5, True)):
        block = model.Block(dataclasses.replace(TINY, shift=shift))
        x = torch.randn(1, 16, 32)
        torch.nn.init.zeros_(block.attn_out.weight)         # the MLP alone sees no other place
        other = x.clone()
        other[:, 5] = torch.randn(32)
        moved = (block(other, *tables) - block(x, *tables))[0].abs().sum(1)   # (T,)
        assert moved[5] > 1e-3 and (moved[6] > 1e-4) == late and moved[7:].max() < 1e-6


# --- Large vocabularies ---


def kept_by(net, x, y):
    """Numbers of the largest tensor that the loss keeps for the backward pass, and the gradient."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net(x, y, per_token=True)
        (loss * torch.linspace(0, 1, 48).view_as(loss)).mean().backward()
    return loss, max(sizes), torch.cat([weight.grad.flatten() for weight in net.parameters()])


@pytest.mark.parametrize("rows", [1, 7, 47])                    # of 48
def test_a_loss_in_parts_is_the_loss_and_holds_no_part_of_the_logits(monkeypatch, rows):
    shape = dataclasses.replace(TINY, vocab=1000)
    whole, parts = (model.Transformer(shape, torch.Generator().manual_seed(0)) for _ in range(2))
    loss, most, gradient = kept_by(whole, *tokens())
    monkeypatch.setattr(model, "LOGITS", rows * 1000 + 999)
    loss_in_parts, most_in_parts, gradient_in_parts = kept_by(parts, *tokens())
    torch.testing.assert_close(loss_in_parts, loss)
    torch.testing.assert_close(gradient_in_parts, gradient, rtol=1e-5, atol=1e-5)
    assert most == 48 * 1000 and most_in_parts == 48 * 4 * 32   # the logits; inside an MLP
    with torch.no_grad():
        torch.testing.assert_close(parts(*tokens()), whole(*tokens()))


def test_the_logits_of_the_laptop_model_are_never_cut_and_those_of_the_paper_are():
    laptop, paper = (model.PRESETS[name] for name in ("laptop", "pythia-160m"))
    assert 512 * laptop.window * laptop.vocab <= model.LOGITS < 8 * paper.window * paper.vocab


# --- Speed ---


def test_the_work_of_a_token_is_six_per_weight_and_attention():
    with torch.device("meta"):
        net = model.Transformer(model.PRESETS["pythia-160m"])
    multiplied = 162_322_944 - 50304 * 768
    assert net.flops_per_token() == 6 * multiplied + 12 * 12 * 2048 * 768


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA GeForce RTX 4090", 165e12), ("Tesla T4", None)])
def test_the_share_of_a_known_devices_peak_is_told(monkeypatch, name, peak):
    net = model.Transformer(TINY)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    share = model.mfu(net, 1e6, torch.device("cuda"))
    assert share == (peak and 1e6 * net.flops_per_token() / peak)
    assert model.mfu(net, 1e6, torch.device("cpu")) is None


# --- Pythia's weights ---


def pythia(net):
    """Random weights for a Transformer of this shape, in the form of a Pythia."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for name, weight in net.named_parameters():
        source = ".".join(model.PYTHIA.get(part, part) for part in name.split("."))
        weights[source] = torch.randn(weight.shape, generator=generator) / 5
    return weights


@pytest.fixture
def safetensors(monkeypatch):
    """A stand-in, so that the tests do not need it; `found` is what any file has in it."""
    def load_file(path):
        if not stub.found:
            raise OSError("no such file")
        return stub.found

    stub = SimpleNamespace(SafetensorError=KeyError, found={}, load_file=load_file)
    monkeypatch.setitem(sys.modules, "safetensors", stub)
    monkeypatch.setitem(sys.modules, "safetensors.torch", stub)
    return stub


def test_each_head_gets_its_query_key_and_value_of_a_pythia(safetensors):
    """A Pythia has them head by head, (heads, 3, D), and here come all queries first."""
    net = model.Transformer(TINY)
    theirs = safetensors.found = pythia(net)
    model.load_pythia(net, "model.safetensors")
    for part in ("weight", "bias"):
        by_head = theirs[f"gpt_neox.layers.1.attention.query_key_value.{part}"].split(16)
        ours = getattr(net.blocks[1].qkv, part).split(16)       # q, q, k, k, v, v
        assert all(map(torch.equal, ours, [by_head[i] for i in (0, 3, 1, 4, 2, 5)]))
    assert torch.equal(net.blocks[0].mlp_in.weight, theirs["gpt_neox.layers.0.mlp.dense_h_to_4h."
                                                           "weight"])


@pytest.mark.parametrize("change, says", [
    (lambda weights: weights.clear(), "x is no safetensors file .no such file"),
    (lambda weights: weights.pop("embed_out.weight"), "x: embed_out.weight is .0,., and this"),
    (lambda weights: weights.update({"gpt_neox.embed_in.weight": torch.zeros(99, 32)}),
     "embed_in.weight is .99, 32., and this model wants .50, 32.; take its --preset"),
])
def test_a_file_that_has_not_the_weights_is_refused_in_one_line(safetensors, change, says):
    net = model.Transformer(TINY)
    safetensors.found = pythia(net)
    change(safetensors.found)
    with pytest.raises(ValueError, match=f"^--init .*{says}"):
        model.load_pythia(net, "x")


def test_without_safetensors_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        model.load_pythia(model.Transformer(TINY), "x")


def test_with_the_weights_of_a_pythia_the_logits_are_those_of_hugging_face(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    shape = dataclasses.replace(TINY, shift=0., rotary=.25)
    config = transformers.GPTNeoXConfig(
        vocab_size=shape.vocab, hidden_size=shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=4 * shape.width, rotary_pct=.25,
        max_position_embeddings=shape.window)
    theirs, ours = transformers.GPTNeoXForCausalLM(config).eval(), model.Transformer(shape)
    generator = torch.Generator().manual_seed(3)
    for weight in theirs.parameters():                          # biases and gains, too
        torch.nn.init.normal_(weight, 0, .3, generator=generator)
    theirs.save_pretrained(tmp_path)
    model.load_pythia(ours, tmp_path / "model.safetensors")
    x, _ = tokens()
    with torch.no_grad():
        torch.testing.assert_close(ours.head(ours.hidden(x)), theirs(x).logits, rtol=0, atol=1e-4)
