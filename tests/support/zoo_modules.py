"""Small hand-written modules for the zoo: one architectural habit each, written the way people write it."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

WIDTH = 32
HEADS = 4
VOCAB = 61


def split_heads(x: Tensor, heads: int = HEADS) -> Tensor:
    batch, length, width = x.shape
    return x.view(batch, length, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def causal_mask(length: int, like: Tensor) -> Tensor:
    return torch.full((length, length), -math.inf, dtype=like.dtype, device=like.device).triu(1)


# ---------------------------------------------------------------------------------------------------------------------
# Attention, written in different ways
# ---------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention, causal by default; subclasses differ in how they write the two products."""

    def __init__(self, width: int = WIDTH, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(merge_heads(self.attend(q, k, v)))


class OperatorAttention(Attention):
    """Scores and values with the ``@`` operator."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return (scores + causal_mask(q.shape[-2], q)).softmax(dim=-1) @ v


class EinsumAttention(nn.Module):
    """Every product an einsum, the projections included."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, width, heads, width // heads) * width**-0.5)
        self.out = nn.Parameter(torch.randn(heads, width // heads, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("btd,cdhe->cbhte", x, self.qkv)
        scores = torch.einsum("bhqe,bhke->bhqk", q * q.shape[-1] ** -0.5, k)
        weights = (scores + causal_mask(x.shape[1], x)).softmax(dim=-1)
        values = torch.einsum("bhqk,bhke->bhqe", weights, v)
        return torch.einsum("bhqe,hed->bqd", values, self.out)


class PackedAttention(nn.Module):
    """``nn.MultiheadAttention``: packed ``in_proj_weight``, one call of ``F.multi_head_attention_forward``."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = causal_mask(x.shape[1], x)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Feed-forward layers, mixtures of experts
# ---------------------------------------------------------------------------------------------------------------------


class FeedForward(nn.Sequential):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Router(nn.Module):
    """Top-1 routing. As in DeepSeek-V3 a buffer shifts the choice only; here it starves the last expert."""

    def __init__(self, experts: int, width: int = WIDTH) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.register_buffer("correction", torch.zeros(experts))
        self.correction[-1] = -math.inf

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(tokens).softmax(dim=-1)
        chosen = (scores + self.correction).argmax(dim=-1)
        return scores.gather(1, chosen[:, None]), chosen


class LoopExperts(nn.Module):
    """Mixture of experts as a loop over modules; an expert without tokens is not called."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = Router(experts)
        self.experts = nn.ModuleList(FeedForward() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        gate, chosen = self.router(tokens)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(1)
            if len(rows):
                out.index_add_(0, rows, gate[rows] * expert(tokens[rows]))
        return out.view_as(x)


class StackedExperts(nn.Module):
    """3-D weights ``[expert, in, out]``; subclasses differ in how they multiply them."""

    def __init__(self, experts: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.router = Router(experts)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) * (2 * width) ** -0.5)


class IndexedExperts(StackedExperts):
    """Expert ``i`` reads the slices ``up[i]`` and ``down[i]``."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        gate, chosen = self.router(tokens)
        out = torch.zeros_like(tokens)
        for index in chosen.unique().tolist():
            rows = (chosen == index).nonzero().squeeze(1)
            out[rows] = gate[rows] * (F.silu(tokens[rows] @ self.up[index]) @ self.down[index])
        return out.view_as(x)


class GroupedExperts(StackedExperts):
    """Tokens sorted by expert and one ``torch._grouped_mm`` per layer (no float64 kernel)."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        gate, chosen = self.router(tokens)
        order = chosen.argsort()
        ends = chosen.bincount(minlength=len(self.up)).cumsum(0).to(torch.int32)
        hidden = F.silu(torch._grouped_mm(tokens[order], self.up, offs=ends))
        out = torch._grouped_mm(hidden, self.down, offs=ends)
        return (gate * out[order.argsort()]).view_as(x)


# ---------------------------------------------------------------------------------------------------------------------
# Residual blocks
# ---------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm block of two residual branches."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = attention
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ParallelBlock(Block):
    """One skip and two branches in one expression (GPT-J, GPT-NeoX, Phi, Cohere)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm1(x)) + self.mlp(self.norm2(x))


class LayerScaleBlock(Block):
    """Branches multiplied by small learned gains (CaiT, DINOv2, ConvNeXt)."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, width: int = WIDTH) -> None:
        super().__init__(attention, mlp, width)
        self.scale1 = nn.Parameter(torch.full((width,), 1e-2))
        self.scale2 = nn.Parameter(torch.full((width,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale1 * self.attention(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


def transformer(
    depth: int = 2,
    block: type[Block] = Block,
    attention: Callable[[], nn.Module] = Attention,
    mlp: Callable[[], nn.Module] = FeedForward,
) -> nn.Sequential:
    return nn.Sequential(*(block(attention(), mlp()) for _ in range(depth)))


class Repeat(nn.Module):
    """One block called many times (ALBERT, Universal Transformer)."""

    def __init__(self, block: nn.Module, times: int) -> None:
        super().__init__()
        self.block = block
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.block(x)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# Language models: token ids [batch, length] -> logits [batch, length, vocab]
# ---------------------------------------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = blocks
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(ids))))


class TiedLanguageModel(nn.Module):
    """No head module: the logits are ``F.linear(x, embedding.weight)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = transformer()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.norm(self.blocks(self.embedding(ids))), self.embedding.weight)


class RecurrentLanguageModel(nn.Module):
    """``nn.LSTM`` or ``nn.GRU``, two layers: one call, all weights inside."""

    def __init__(self, recurrent: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.recurrent = recurrent(WIDTH, 2 * WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(2 * WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embedding(ids))[0])


class TorchEncoderModel(nn.Module):
    """``nn.TransformerEncoder`` over tokens with learned positions."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Parameter(torch.randn(32, WIDTH) * 0.02)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.embedding(ids) + self.position[:length]
        return self.head(self.encoder(x, mask=causal_mask(length, x), is_causal=True))


def language_model(
    block: type[Block] = Block,
    attention: Callable[[], nn.Module] = Attention,
    mlp: Callable[[], nn.Module] = FeedForward,
) -> LanguageModel:
    return LanguageModel(transformer(block=block, attention=attention, mlp=mlp))


def frozen_language_model() -> LanguageModel:
    """Embedding and first block frozen, the rest trains."""
    model = language_model()
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    return model


def repeated_language_model() -> LanguageModel:
    return LanguageModel(Repeat(Block(Attention(), FeedForward()), times=4))


def shared_language_model() -> LanguageModel:
    """Layers 0 and 2 are the same module under two names."""
    first, second = transformer(depth=2)
    return LanguageModel(nn.Sequential(first, second, first))


class LoRALinear(nn.Module):
    """Frozen linear layer plus a low-rank update whose second factor starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scaling


def lora_language_model() -> LanguageModel:
    """All frozen but the LoRA factors on each attention's two projections."""
    model = language_model().requires_grad_(False)
    for block in model.blocks:
        block.attention.qkv = LoRALinear(block.attention.qkv)
        block.attention.out = LoRALinear(block.attention.out)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Images [batch, 3, 16, 16] -> class logits [batch, 5]
# ---------------------------------------------------------------------------------------------------------------------

CLASSES = 5


class ResidualConvBlock(nn.Module):
    """As in torchvision: BatchNorm, in-place ReLU, in-place residual add, projection shortcut where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Four blocks: identity, projection, identity, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.stages = nn.Sequential(
            ResidualConvBlock(16, 16, stride=1),
            ResidualConvBlock(16, 32, stride=2),
            ResidualConvBlock(32, 32, stride=1),
            ResidualConvBlock(32, 64, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.pool(self.stages(self.stem(image))).flatten(1))


class ClassTokenModel(nn.Module):
    """Patches as one linear layer, class token, register token and position parameters (own ViT)."""

    def __init__(self, patch: int = 4) -> None:
        super().__init__()
        self.unfold = nn.Unfold(patch, stride=patch)
        self.patches = nn.Linear(3 * patch**2, WIDTH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.register_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.02)
        self.blocks = transformer(attention=partial(Attention, causal=False))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(self.unfold(image).transpose(1, 2))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        x = torch.cat([x, self.register_token.expand(len(x), -1, -1)], dim=1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class ConvTransformer(nn.Module):
    """Convolution stem, then transformer blocks on the feature map, then mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.GELU(),
            nn.Conv2d(16, WIDTH, 3, stride=2, padding=1),
        )
        self.blocks = transformer(attention=partial(Attention, causal=False))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class WeightNormNet(nn.Module):
    """Weight-norm parametrization on a convolution and a linear layer: the weight is computed, not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(3, 16, 3, stride=2, padding=1))
        self.hidden = weight_norm(nn.Linear(16 * 8 * 8, WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(self.conv(image)).flatten(1))))


# ---------------------------------------------------------------------------------------------------------------------
# Images to images, vectors
# ---------------------------------------------------------------------------------------------------------------------


def conv_stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(4, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.SiLU(),
    )


class UNet(nn.Module):
    """Two downsamplings, transposed convolutions up, skip connections by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = conv_stage(3, 8), conv_stage(8, 16), conv_stage(16, 32)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.merge2 = conv_stage(32, 16)
        self.up1 = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge1 = conv_stage(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.down1(image)
        coarse = self.down2(F.max_pool2d(fine, 2))
        x = self.middle(F.max_pool2d(coarse, 2))
        x = self.merge2(torch.cat([self.up2(x), coarse], dim=1))
        x = self.merge1(torch.cat([self.up1(x), fine], dim=1))
        return self.out(x)


class DiTBlock(nn.Module):
    """adaLN-zero: shift, scale and gate of both branches come from a zero-initialised linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention = Attention(causal=False)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = FeedForward()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Diffusion transformer: patches, time condition, zero-initialised output layer."""

    def __init__(self, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, 16, WIDTH) * 0.02)
        self.time = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 3 * patch**2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.fold = nn.Fold(16, patch, stride=patch)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * 2.0 ** torch.arange(8, dtype=time.dtype, device=time.device)
        condition = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        x = self.patches(image).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition)
        return self.fold(self.out(self.norm(x)).transpose(1, 2))


class Autoencoder(nn.Module):
    """Computes in ``encode`` and ``decode``; nobody calls ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(48, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8))
        self.decoder_weight = nn.Parameter(torch.randn(48, 8) * 8**-0.5)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, code: Tensor) -> Tensor:
        return torch.tanh(code) @ self.decoder_weight.t()
