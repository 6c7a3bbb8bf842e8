"""Networks of other projects, written anew from their published architectures with their own parameter names, so that
loading is compared with what they compute.  Not a test.  Each takes images of its size and gives pooled features.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock


def torchvision_resnet(width=8, norm=nn.BatchNorm2d, stem=(3, 1, 1)):
    """torchvision's ResNet, thin, of one block a stage, with a CIFAR stem, as most projects build theirs."""
    net = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=norm)
    kernel, stride, padding = stem
    net.inplanes = width
    net.conv1, net.bn1 = nn.Conv2d(3, width, kernel, stride, padding, bias=False), norm(width)
    if stem[0] == 3:
        net.maxpool = nn.Identity()
    for i in range(4):
        setattr(net, f"layer{i + 1}", net._make_layer(BasicBlock, width << i, 1, stride=2 if i else 1))
    net.fc = nn.Identity()
    return net


def numbered(net, without=()):
    """nn.Sequential(*list(resnet.children())[:-1]), which lightly's examples and PyTorch-BYOL have as backbone."""
    children = [m for name, m in net.named_children() if name not in ("fc", "linear", *without)]
    return nn.Sequential(*children, nn.Flatten())


class SwAV(nn.Module):
    """https://github.com/facebookresearch/swav, src/resnet50.py: a padding of 1 before a convolution of padding 2."""

    def __init__(self):
        super().__init__()
        inner = torchvision_resnet(stem=(7, 2, 2))
        for name, child in inner.named_children():
            if name != "fc":
                setattr(self, name, child)
        self.padding = nn.ConstantPad2d(1, 0.0)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.padding(x)))))
        return self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x))))).flatten(1)


class LightlyBlock(nn.Module):
    def __init__(self, inside, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != out:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class Lightly(nn.Module):
    """https://github.com/lightly-ai/lightly, models/resnet.py (ResNetGenerator): ReLU is a function, no module."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        for i in range(4):
            block = LightlyBlock(width << max(i - 1, 0), width << i, 2 if i else 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(block))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return F.avg_pool2d(self.layer4(self.layer3(self.layer2(self.layer1(x)))), 4).flatten(1)


def lightly_numbered():
    """Its CIFAR benchmarks: the children in an nn.Sequential, which has no ReLU after the stem's norm."""
    return nn.Sequential(*Lightly().children(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class MMBlock(nn.Module):
    def __init__(self, inside, out, stride):
        super().__init__()
        self.conv1, self.gn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.GroupNorm(out // 2, out)
        self.conv2, self.gn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.GroupNorm(out // 2, out)
        self.downsample = None
        if stride != 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.GroupNorm(out // 2, out))

    def forward(self, x):
        h = self.gn2(self.conv2(F.relu(self.gn1(self.conv1(x)))))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class MMResNet(nn.Module):
    """OpenMMLab's ResNet with norm_cfg of group norm, whose layers are then called gn1, gn2; two channels a group."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.gn1 = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(width // 2, width)
        for i in range(4):
            block = MMBlock(width << max(i - 1, 0), width << i, 2 if i else 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(block))

    def forward(self, x):
        x = F.relu(self.gn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


def attention(x, qkv, proj, heads):
    """Scaled dot products, one head after the other."""
    q, k, v = qkv(x).chunk(3, -1)
    size, out = x.shape[-1] // heads, []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / size**0.5).softmax(-1)
        out.append(weights @ v[..., part])
    return proj(torch.cat(out, -1))


class Holder(nn.Module):
    """Modules under given names."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class ViT(nn.Module):
    """The vision transformer of DINO, MAE, MoCo v3, VISSL and solo-learn: timm's names, norms of eps 1e-6, exact GELU,
    the class token's features after the last norm."""

    def __init__(self, dim=192, depth=2, heads=3, patch=16, size=32):
        super().__init__()
        self.heads = heads
        self.patch_embed = Holder(proj=nn.Conv2d(3, dim, patch, patch))
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, dim) * 0.5)
        self.blocks = nn.ModuleList(
            [
                Holder(
                    norm1=nn.LayerNorm(dim, eps=1e-6),
                    attn=Holder(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)),
                    norm2=nn.LayerNorm(dim, eps=1e-6),
                    mlp=Holder(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)),
                )
                for _ in range(depth)
            ]
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for b in self.blocks:
            x = x + attention(b.norm1(x), b.attn.qkv, b.attn.proj, self.heads)
            x = x + b.mlp.fc2(F.gelu(b.mlp.fc1(b.norm2(x))))
        return self.norm(x)[:, 0]


def sincos(rows, columns, dim):
    """MoCo v3's build_2d_sincos_position_embedding, with the class token's zeros."""
    omega = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    table = [torch.zeros(dim)]
    for row in range(rows):
        for column in range(columns):
            table.append(
                torch.cat([(row * omega).sin(), (row * omega).cos(), (column * omega).sin(), (column * omega).cos()])
            )
    return torch.stack(table)[None]


class MoCoV3(ViT):
    """https://github.com/facebookresearch/moco-v3, vits.py: 12 heads in ViT-S too, fixed positions; solo-learn's
    ViT-Ti and ViT-S for MoCo v3 and MAE, and MMSelfSup's mocov3-small, likewise."""

    def __init__(self):
        super().__init__(heads=12)
        self.pos_embed.data = sincos(2, 2, 192)


class MMViT(nn.Module):
    """https://github.com/open-mmlab/mmpretrain, models/backbones/vision_transformer.py"""

    def __init__(self, dim=192, depth=2, heads=3, patch=16, size=32):
        super().__init__()
        self.heads = heads
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, dim) * 0.5)
        self.patch_embed = Holder(projection=nn.Conv2d(3, dim, patch, patch))
        hidden = 4 * dim
        self.layers = nn.ModuleList(
            [
                Holder(
                    ln1=nn.LayerNorm(dim, eps=1e-6),
                    attn=Holder(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim)),
                    ln2=nn.LayerNorm(dim, eps=1e-6),
                    ffn=Holder(
                        layers=nn.Sequential(nn.Sequential(nn.Linear(dim, hidden), nn.GELU()), nn.Linear(hidden, dim))
                    ),
                )
                for _ in range(depth)
            ]
        )
        self.ln1 = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x):
        x = self.patch_embed.projection(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for layer in self.layers:
            x = x + attention(layer.ln1(x), layer.attn.qkv, layer.attn.proj, self.heads)
            x = x + layer.ffn.layers(layer.ln2(x))
        return self.ln1(x)[:, 0]


class MMMoCoV3(MMViT):
    def __init__(self):
        super().__init__(heads=12)
        self.pos_embed.data = sincos(2, 2, 192)


class TorchvisionViT(torchvision.models.VisionTransformer):
    def __init__(self):
        super().__init__(32, 16, 2, 3, 192, 768)
        nn.init.normal_(self.class_token)
        self.heads = nn.Identity()


RESNET = {"name": "resnet10", "width": 8, "stem": "cifar"}
VIT = {"name": "vit_tiny_patch16_224", "options": {"depth": 2, "img_size": 32}}
VIT12 = {"name": "vit_tiny_patch16_224", "options": {"depth": 2, "img_size": 32, "num_heads": 12}}
KINDS = {  # name: the peer's network, and what describes the same network here
    "resnet": (torchvision_resnet, RESNET),
    "resnet pad 2": (lambda: torchvision_resnet(stem=(3, 1, 2)), {**RESNET, "stem": "cifar_pad2"}),
    "resnet 7x7": (SwAV, {**RESNET, "stem": "imagenet"}),
    "numbered": (lambda: numbered(torchvision_resnet()), RESNET),
    "numbered, no pool": (lambda: numbered(torchvision_resnet(), without=("maxpool",)), RESNET),
    "lightly": (Lightly, RESNET),
    "lightly numbered": (lightly_numbered, {**RESNET, "stem": "cifar_norelu"}),
    "mmlab gn": (MMResNet, {**RESNET, "norm": "gn"}),
    "vit": (ViT, VIT),
    "mocov3": (MoCoV3, VIT12),
    "mmlab vit": (MMViT, VIT),
    "mmlab mocov3": (MMMoCoV3, VIT12),
    "torchvision vit": (TorchvisionViT, VIT),
}


def make(kind, seed):
    """The peer's network with values that show any mix-up."""
    torch.manual_seed(seed)
    net = KINDS[kind][0]().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            nn.init.normal_(m.weight, 1, 0.1)
            nn.init.normal_(m.bias, 0, 0.1)
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.08)
            nn.init.normal_(m.bias, std=0.5)
    return net.requires_grad_(False)
