"""Names and layouts that other projects give to the parameters of a ViT, both ways.

    timm            VisionTransformer of timm, whose names DeiT and MAE have too (facebookresearch/deit, …/mae)
    huggingface     ViTForImageClassification and ViTModel of transformers
    big_vision      the npz files of google-research's big_vision and vision_transformer, Flax's own layout

A row of a table has the canonical name (`sigmarep.weights.canonical`), the other one, and the form of the array there. {}
is the number of a block.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from sigmarep.weights import canonical

Arrays = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


class Form(NamedTuple):
    """`load(x, shape)` brings an array of theirs to ours, of this shape if its size allows it; `save` is the reverse."""

    load: Callable[[np.ndarray, Shape], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]


def _shaped(x: np.ndarray, shape: Shape) -> np.ndarray:
    """`x` in `shape` if it has as many elements; else as it is, for the message on shapes that differ."""
    return x.reshape(shape) if x.size == math.prod(shape) else x


def _load_conv(x: np.ndarray, shape: Shape) -> np.ndarray:
    # The paper's vision code keeps the convolution's kernel as a matrix (out, in · height · width).
    if x.ndim == 2 and len(shape) == 4:
        x = _shaped(x, (len(x), shape[2], *shape[:2]))
    return np.transpose(x, (2, 3, 1, 0)) if x.ndim == 4 else x


FORMS = {
    "same": Form(lambda x, shape: x, lambda x: x),
    "vector": Form(_shaped, lambda x: x.reshape(-1)),
    "conv": Form(_load_conv, lambda x: np.transpose(x, (3, 2, 0, 1))),
    # Torch's matrices are (out, in). Ours may have heads and their features as outputs, or as inputs.
    "outputs": Form(
        lambda x, shape: _shaped(x.T, shape) if len(x.T) == shape[0] else x.T, lambda x: x.reshape(len(x), -1).T
    ),
    "inputs": Form(
        lambda x, shape: _shaped(x.T, shape) if x.T.shape[-1] == shape[-1] else x.T,
        lambda x: x.reshape(-1, x.shape[-1]).T,
    ),
}


Parted = dict[str, tuple[str, np.ndarray]]


def _whole(arrays: Arrays) -> Parted:
    return {name: (name, x) for name, x in arrays.items()}


class Row(NamedTuple):
    """A parameter: canonical name, theirs, and the word of the form there."""

    ours: str
    theirs: str
    form: str


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of one project.

    Attributes:
      rows: every parameter.
      anchor: the name of the patch embedding's kernel, by which a file of the project is known.
      parted: the arrays by the names of the rows, each with its name in the file: takes apart what the rows have in
        parts, called "name[part]", and renames what has older names.
      joined: puts the parts together again.
    """

    rows: tuple[Row, ...]
    anchor: str
    parted: Callable[[Arrays], Parted] = _whole
    joined: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict

    def root(self, arrays: Arrays) -> str | None:
        """The beginning of the names in a file of this project, None if it is none."""
        return canonical.root(arrays, self.anchor)

    def load(self, arrays: Arrays, shapes: Mapping[str, Shape]) -> dict[str, tuple[str, np.ndarray]]:
        """The file's own name and the array in our layout by canonical name.

        Args:
          arrays: of a file of this project, effective kernels among them.
          shapes: of the model's parameters by canonical name without the model's own root.
        """
        root, parted = self.root(arrays) or "", self.parted(arrays)
        loaded = {}
        for name, shape in shapes.items():
            for theirs, form in self._of(name):
                # A model's head has no root in files of transformers.
                key = next((each for each in (root + theirs, theirs) if each in parted), None)
                if key is not None:
                    own, x = parted[key]
                    loaded[name] = (own, FORMS[form].load(np.asarray(x), shape))
        # Blocks that the model does not have, so that a wrong depth is seen.
        for row in self.rows:
            pattern = re.compile(re.escape(root + row.theirs).replace(r"\{\}", r"(\d+)"))
            for match in filter(None, map(pattern.fullmatch, parted)):
                loaded.setdefault(row.ours.format(*match.groups()), parted[match[0]])
        return loaded

    def save(self, params: Arrays) -> dict[str, np.ndarray]:
        """Parameters by canonical name under the names of this project.

        Raises:
          KeyError: one has no name there.
        """
        saved = {}
        for name, x in params.items():
            for theirs, form in self._of(name):
                saved[theirs] = FORMS[form].save(np.asarray(x))
                break
            else:
                raise KeyError(name)
        return self.joined(saved)

    def _of(self, name: str) -> list[tuple[str, str]]:
        """Their names, and the forms, of a canonical name."""
        general, number = canonical.numbered(name)
        return [(row.theirs.format(number), row.form) for row in self.rows if row.ours == general]


BLOCK = "encoder/block_{}/"


def _torch_layer(ours: str, theirs: str, kernel: str = "inputs") -> tuple[Row, Row]:
    return Row(f"{ours}/kernel", f"{theirs}.weight", kernel), Row(f"{ours}/bias", f"{theirs}.bias", "vector")


def _torch_norm(ours: str, theirs: str) -> tuple[Row, Row]:
    return Row(f"{ours}/scale", f"{theirs}.weight", "same"), Row(f"{ours}/bias", f"{theirs}.bias", "same")


def _timm_parted(arrays: Arrays) -> Parted:
    parted: Parted = {}
    for name, x in arrays.items():
        if re.search(r"\.attn\.qkv\.(weight|bias)$", name) and len(x) % 3 == 0:
            for slot, part in zip("qkv", np.split(np.asarray(x), 3), strict=True):
                parted[f"{name}[{slot}]"] = name, part
        else:
            parted[name] = name, x
    return parted


def _timm_joined(parted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, x in parted.items():
        whole, _, slot = name.partition("[")
        if slot == "q]":
            arrays[whole] = np.concatenate([parted[f"{whole}[{each}]"] for each in "qkv"])
        elif not slot:
            arrays[name] = x
    return arrays


def _timm_slots() -> tuple[Row, ...]:
    return tuple(
        row
        for word, slot in (("query", "q"), ("key", "k"), ("value", "v"))
        for row in (
            Row(f"{BLOCK}attention/{word}/kernel", f"blocks.{{}}.attn.qkv.weight[{slot}]", "outputs"),
            Row(f"{BLOCK}attention/{word}/bias", f"blocks.{{}}.attn.qkv.bias[{slot}]", "vector"),
        )
    )


TIMM = Names(
    rows=(
        *_torch_layer("patch_embedding", "patch_embed.proj", "conv"),
        Row("class_token", "cls_token", "same"),
        Row("positions/embedding", "pos_embed", "same"),
        *_torch_norm(f"{BLOCK}attention_norm", "blocks.{}.norm1"),
        *_timm_slots(),
        *_torch_norm(f"{BLOCK}attention/query_norm", "blocks.{}.attn.q_norm"),
        *_torch_norm(f"{BLOCK}attention/key_norm", "blocks.{}.attn.k_norm"),
        *_torch_layer(f"{BLOCK}attention/out", "blocks.{}.attn.proj"),
        Row(f"{BLOCK}attention_branch/scale", "blocks.{}.ls1.gamma", "same"),
        *_torch_norm(f"{BLOCK}mlp_norm", "blocks.{}.norm2"),
        *_torch_layer(f"{BLOCK}mlp/up", "blocks.{}.mlp.fc1"),
        *_torch_layer(f"{BLOCK}mlp/down", "blocks.{}.mlp.fc2"),
        Row(f"{BLOCK}mlp_branch/scale", "blocks.{}.ls2.gamma", "same"),
        *_torch_norm("encoder/norm", "norm"),
        *_torch_layer("head", "head"),
    ),
    anchor="patch_embed.proj.weight",
    parted=_timm_parted,
    joined=_timm_joined,
)


def _huggingface_blocks(block: str, attention: str, out: str, norms: tuple[str, str], mlp: tuple[str, str]):
    """Rows of the blocks, whose names are others in files than in the modules of transformers 5."""
    slots = {"query": "q", "key": "k", "value": "v"}
    return (
        *_torch_norm(f"{BLOCK}attention_norm", f"{block}.{norms[0]}"),
        *(
            row
            for word, short in slots.items()
            for row in _torch_layer(
                f"{BLOCK}attention/{word}", f"{block}.{attention.format(word=word, short=short)}", "outputs"
            )
        ),
        *_torch_layer(f"{BLOCK}attention/out", f"{block}.{out}"),
        *_torch_norm(f"{BLOCK}mlp_norm", f"{block}.{norms[1]}"),
        *_torch_layer(f"{BLOCK}mlp/up", f"{block}.{mlp[0]}"),
        *_torch_layer(f"{BLOCK}mlp/down", f"{block}.{mlp[1]}"),
    )


HUGGINGFACE_NORMS = ("layernorm_before", "layernorm_after")
HUGGINGFACE = Names(
    rows=(
        *_torch_layer("patch_embedding", "embeddings.patch_embeddings.projection", "conv"),
        Row("class_token", "embeddings.cls_token", "same"),
        Row("positions/embedding", "embeddings.position_embeddings", "same"),
        *_huggingface_blocks(
            "encoder.layer.{}",
            "attention.attention.{word}",
            "attention.output.dense",
            HUGGINGFACE_NORMS,
            ("intermediate.dense", "output.dense"),
        ),
        *_huggingface_blocks(
            "layers.{}", "attention.{short}_proj", "attention.o_proj", HUGGINGFACE_NORMS, ("mlp.fc1", "mlp.fc2")
        ),
        *_torch_norm("encoder/norm", "layernorm"),
        *_torch_layer("head", "classifier"),
    ),
    anchor="embeddings.patch_embeddings.projection.weight",
)


def _flax_layer(ours: str, theirs: str) -> tuple[Row, Row]:
    return Row(f"{ours}/kernel", f"{theirs}/kernel", "same"), Row(f"{ours}/bias", f"{theirs}/bias", "same")


def _flax_norm(ours: str, theirs: str) -> tuple[Row, Row]:
    return Row(f"{ours}/scale", f"{theirs}/scale", "same"), Row(f"{ours}/bias", f"{theirs}/bias", "same")


# Names that vision_transformer gave before big_vision; it counted the norms, the attention and the MLP of a block together.
RENAMED = {
    "Transformer/posembed_input/pos_embedding": "pos_embedding",
    "/MultiHeadDotProductAttention_1/": "/MultiHeadDotProductAttention_0/",
    "/MlpBlock_3/": "/MlpBlock_0/",
    "/LayerNorm_2/": "/LayerNorm_1/",
}


def _big_vision_parted(arrays: Arrays) -> Parted:
    """Blocks unrolled, under the present names."""
    parted: Parted = {}
    for own, x in arrays.items():
        name = own
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if "/encoderblock/" in name and np.ndim(x):
            for i, part in enumerate(np.asarray(x)):
                parted[name.replace("/encoderblock/", f"/encoderblock_{i}/")] = own, part
        else:
            parted[name] = own, x
    return parted


THEIR_BLOCK = "Transformer/encoderblock_{}/"
BIG_VISION = Names(
    rows=(
        *_flax_layer("patch_embedding", "embedding"),
        Row("class_token", "cls", "same"),
        Row("positions/embedding", "pos_embedding", "same"),
        *_flax_norm(f"{BLOCK}attention_norm", f"{THEIR_BLOCK}LayerNorm_0"),
        *(
            row
            for word in ("query", "key", "value", "out")
            for row in _flax_layer(f"{BLOCK}attention/{word}", f"{THEIR_BLOCK}MultiHeadDotProductAttention_0/{word}")
        ),
        *_flax_norm(f"{BLOCK}mlp_norm", f"{THEIR_BLOCK}LayerNorm_1"),
        *_flax_layer(f"{BLOCK}mlp/up", f"{THEIR_BLOCK}MlpBlock_0/Dense_0"),
        *_flax_layer(f"{BLOCK}mlp/down", f"{THEIR_BLOCK}MlpBlock_0/Dense_1"),
        *_flax_norm("encoder/norm", "Transformer/encoder_norm"),
        *_flax_layer("head", "head"),
    ),
    anchor="embedding/kernel",
    parted=_big_vision_parted,
)

NAMES: dict[str, Names] = {"timm": TIMM, "huggingface": HUGGINGFACE, "big_vision": BIG_VISION}


def detected(arrays: Arrays) -> str:
    """The word of the project whose names these are; "sigmarep" if of none of the tables."""
    return next((word for word, names in NAMES.items() if names.root(arrays) is not None), "sigmarep")
