"""The transformer alone: a decoder in the GPT-NeoX / Pythia form that the Aioli paper trains.

Four things differ from GPT-2, and two more in the laptop preset. Positions are rotary and touch a
part of each head. Attention and MLP read the same residual stream side by side (one sum per block
instead of two). The output matrix is not tied to the embedding. The initialisation is Pythia's.
`forward` returns one loss per sequence, so the loss of a group of text is the mean over its rows,
and a method that weights groups needs one line.

How to read it: `Shape` and `PRESETS`, `Block` (the idea), `Transformer.forward` (the order).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGITS = 2 ** 26    # that are held at once, in float32 a quarter of a gigabyte


@dataclass(frozen=True)
class Shape:
    """Shapes of one model. `window` is the number of tokens it sees at once."""
    layers: int
    heads: int
    width: int
    window: int
    vocab: int
    rotary: float = 0.25     # share of each head's channels that carry position; Pythia: a quarter
    shift: float = 0.0       # share of a block's input read one token late; Pythia: none

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; "
                             "choose one that is")


PRESETS = {
    # A laptop core trains this on two million tokens in 75 seconds. At this size two things
    # matter more than all others: all channels of a head rotate, and half of a block's input comes
    # from the token before (RWKV's token shift): about a fifth lower perplexity at no cost in time,
    # and seeds that agree.
    "laptop": Shape(layers=2, heads=3, width=96, window=64, vocab=1024, rotary=1.0, shift=0.5),
    # The paper's model: EleutherAI/pythia-160m (vocabulary padded to a multiple of 128).
    "pythia-160m": Shape(layers=12, heads=12, width=768, window=2048, vocab=50304),
}


def rotary_tables(window, channels):
    """cos, sin (window, channels): position t turns pair c by the angle t / 10000^(2c / channels).

    The first half of sin is negated, so that turning is x cos + (x with its halves swapped) sin.
    """
    rate = 10000.0 ** (-torch.arange(0, channels, 2).float() / channels)      # (channels/2,)
    angle = torch.outer(torch.arange(window).float(), rate)                   # (T, channels/2)
    return angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)


def rotate(x, cos, sin):
    """Turn the first `cos.shape[-1]` channels of x (..., T, D) by position; keep the rest."""
    n = cos.shape[-1]
    turned, kept = x.split((n, x.shape[-1] - n), dim=-1)
    turned = torch.addcmul(turned * cos, turned.roll(n // 2, dims=-1), sin).to(x.dtype)
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def read_late(x, channels):
    """x (B, T, C) with its first channels taken from one token earlier (0 before the first)."""
    late, now = x.split((channels, x.shape[-1] - channels), dim=-1)
    return torch.cat((F.pad(late[:, :-1], (0, 0, 1, 0)), now), dim=-1)


class Block(nn.Module):
    """x + attention(norm(x)) + mlp(norm'(x)): both branches read the same x, as in GPT-NeoX."""

    def __init__(self, shape):
        super().__init__()
        self.heads = shape.heads
        self.late = round(shape.shift * shape.width)
        self.norm_attn = nn.LayerNorm(shape.width)
        self.norm_mlp = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.attn_out = nn.Linear(shape.width, shape.width)
        self.mlp_in = nn.Linear(shape.width, 4 * shape.width)
        self.mlp_out = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        to_attn, to_mlp = self.norm_attn(x), self.norm_mlp(x)
        if self.late:
            to_attn = read_late(to_attn, self.late)
            to_mlp = read_late(to_mlp, self.late)
        qkv = self.qkv(to_attn).view(B, T, 3, self.heads, C // self.heads)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split((2, 1))                      # (2 or 1, B, H, T, D)
        (q, k), v = rotate(qk, cos, sin), v.squeeze(0)
        attn = F.scaled_dot_product_attention(q, k, v, is_causal=True)        # (B, H, T, D)
        attn = self.attn_out(attn.transpose(1, 2).reshape(B, T, C))
        return x + attn + self.mlp_out(F.gelu(self.mlp_in(to_mlp)))


class Transformer(nn.Module):
    """Decoder-only language model. `generator` draws the weights: equal seeds give equal models."""

    def __init__(self, shape, generator=None):
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        channels = 2 * round(shape.rotary * shape.width / shape.heads / 2)
        cos, sin = rotary_tables(shape.window, channels)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator):
        """Pythia's initialisation, worth much at laptop size.

        Normal with std sqrt(2 / (5 width)) everywhere ("small init", Nguyen and Salazar 2019), but
        2 / (layers sqrt(width)) for the two matrices of a block that write to the residual stream
        (Wang and Komatsuzaki 2021). Biases 0.
        """
        width, layers = self.shape.width, self.shape.layers
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.dim() == 2:                                     # LayerNorm gains stay at 1
                writes = name.endswith(("attn_out.weight", "mlp_out.weight"))
                std = 2 / (layers * math.sqrt(width)) if writes else math.sqrt(2 / (5 * width))
                weight.normal_(0, std, generator=generator)

    def hidden(self, x):
        """Token ids (B, T) -> what the output matrix reads, (B, T, C)."""
        T = x.shape[1]
        h = self.embed(x)                                                     # (B, T, C)
        for block in self.blocks:
            h = block(h, self.cos[:T], self.sin[:T])
        return self.norm(h)

    def forward(self, x, y, per_token=False):
        """x, y (B, T) token ids, y the next token of each x -> cross-entropy in nats per token.

        (B,), the mean over each sequence; with per_token=True (B, T), which DoReMi clips.
        """
        h, target = self.hidden(x).flatten(0, 1), y.flatten()                 # (B T, C), (B T,)
        rows = max(1, LOGITS // self.shape.vocab)
        if len(h) <= rows or torch.compiler.is_compiling():     # which never writes them in float32
            loss = self.cross_entropy(h, target)
        else:                       # in parts, whose logits the backward pass makes again, in turn
            parts = zip(h.split(rows), target.split(rows), strict=True)
            loss = torch.cat([again_in_backward(self.cross_entropy, *part) for part in parts])
        loss = loss.view_as(y)
        return loss if per_token else loss.mean(1)

    def cross_entropy(self, h, target):
        """h (N, C), target (N,) -> loss (N,)."""
        return F.cross_entropy(self.head(h).float(), target, reduction="none")

    def flops_per_token(self):
        """Of a training step: 6 N + 12 L T C (Chowdhery et al. 2022, PaLM, appendix B).

        N leaves the embedding out, which multiplies nothing; attention counts as if not causal.
        """
        shape = self.shape
        N = sum(weight.numel() for weight in self.parameters()) - self.embed.weight.numel()
        return 6 * N + 12 * shape.layers * shape.window * shape.width


def again_in_backward(function, *inputs, **settings):
    """function(*inputs, **settings), of which only inputs and result are kept: what is between is
    computed again when its gradient is. Nothing here is random, so no random state is saved, which
    would make a GPU wait."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **settings)


# dense bfloat16 FLOP/s in NVIDIA's data sheets, by a part of the device's name; the first counts
PEAK_FLOPS = {"H100 PCIe": 756e12, "NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
              "RTX 4090": 165e12}


def mfu(net, speed, device):
    """Model FLOP utilisation: share of a device's peak that training at this speed, tokens per
    second, takes; None where the peak is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = [peak for part, peak in PEAK_FLOPS.items() if part in name]
    return speed * net.flops_per_token() / peaks[0] if peaks else None


# Pythia's names of our weights, in the form of Hugging Face's GPT-NeoX
PYTHIA = {"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out",
          "blocks": "gpt_neox.layers", "norm_attn": "input_layernorm",
          "norm_mlp": "post_attention_layernorm", "qkv": "attention.query_key_value",
          "attn_out": "attention.dense", "mlp_in": "mlp.dense_h_to_4h",
          "mlp_out": "mlp.dense_4h_to_h"}


@torch.no_grad()
def load_pythia(net, path):
    """Copy the weights of a Pythia, a file model.safetensors, into a Transformer of its shape.

    Raises ValueError if safetensors is not installed, or the file has not these weights.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError("--init reads safetensors; pip install safetensors") from None
    try:
        theirs = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--init {path} is no safetensors file ({error})") from None

    for name, weight in net.named_parameters():
        source = ".".join(PYTHIA.get(part, part) for part in name.split("."))
        found = theirs.get(source, torch.empty(0))
        if found.shape != weight.shape:
            raise ValueError(f"--init {path}: {source} is {tuple(found.shape)}, and this model "
                             f"wants {tuple(weight.shape)}; take its --preset and --encoding")
        if ".qkv." in name:                         # theirs: a head's q, k, v; ours: q of all heads
            by_head = found.unflatten(0, (net.shape.heads, 3, -1))
            found = by_head.transpose(0, 1).flatten(0, 2)
        weight.copy_(found)


def load(path):
    """The trained model that a run left as model.pt, on the CPU, in its evaluation form."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = Transformer(Shape(**saved["shape"]))
    model.load_state_dict(saved["weights"])
    return model.eval()
