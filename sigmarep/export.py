"""A trained model for other programs: folded weights under their names, or the whole model as StableHLO.

Folded weights are those of a plain model with the same outputs (`sigmarep.nn.fold`), so whoever opens them needs to know
nothing of σReparam.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from sigmarep.errors import BadInput, SigmarepError
from sigmarep.files import write_atomically
from sigmarep.inference import Run
from sigmarep.nn.positions import sincos_2d
from sigmarep.training.mesh import path_name
from sigmarep.weights import canonical, files
from sigmarep.weights.names import NAMES

FORMATS = ("safetensors", "stablehlo")
WORDS = ("sigmarep", *NAMES)
# Platforms that a StableHLO artefact runs on.
PLATFORMS = ("cpu", "cuda", "tpu")

# Fields of config.model, and the values with which a model is the function that each project's ViT is.
SAME_FUNCTION: dict[str, dict[str, tuple[Any, ...]]] = {
    "timm": {"norm": ("pre", "none"), "qk_norm": ("none", "layer"), "branch_scale": ("none", "layer_scale")},
    "huggingface": {"norm": ("pre",), "qk_norm": ("none",), "branch_scale": ("none",), "pool": ("token",)},
    "big_vision": {"norm": ("pre",), "qk_norm": ("none",), "branch_scale": ("none",), "activation": ("gelu_tanh",)},
}
COMMON: dict[str, tuple[Any, ...]] = {
    "token_mixing": ("attention",),
    "norm_type": ("layer",),
    "attention_weights": ("softmax",),
    "attention_temperature": (1.0,),
    "logit_cap": (0.0,),
    "process_heads": ("none",),
    "activation": ("gelu", "gelu_tanh", "relu", "silu"),
}
# The words of transformers for activations.
HUGGINGFACE_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}


class Exported(NamedTuple):
    """Arrays by name; texts about them; other files by name; and lines that tell how to open them."""

    arrays: dict[str, np.ndarray]
    about: dict[str, str]
    others: dict[str, bytes]
    lines: list[str]


def save_weights(run: Run, output: str, *, names: str) -> list[str]:
    """Writes the folded weights of a run as safetensors.

    Args:
      output: a file; under the names of transformers also a folder for `from_pretrained`, unless it ends in .safetensors.
      names: "sigmarep", the paths of the plain model of `Run.plain`, or one of `sigmarep.weights.names.NAMES`.

    Returns:
      Lines that tell how to open it.

    Raises:
      BadInput: the model is not the function that models of these names are.
      SigmarepError: the file cannot be written.
    """
    exported = weights(run, names=names)
    folder = exported.others and not output.endswith(".safetensors")
    try:
        if folder:
            os.makedirs(output, exist_ok=True)
            for name, content in exported.others.items():
                write_atomically(os.path.join(output, name), content)
        path = os.path.join(output, files.SAVED) if folder else output
        # The library writes the memory of an array as it lies, a transposed one's too.
        arrays = {name: np.asarray(x, order="C") for name, x in exported.arrays.items()}
        write_atomically(path, safetensors.numpy.save(arrays, exported.about))
    except OSError as error:
        raise SigmarepError(f"--output {output}: cannot be written ({error.strerror})") from error
    return [f"{path}: {len(exported.arrays)} arrays", *exported.lines]


def weights(run: Run, *, names: str) -> Exported:
    """The folded weights of a run under the names of a project. See `save_weights`."""
    if names not in WORDS:
        raise BadInput(f"--names {names}: expected one of {', '.join(WORDS)}")
    leaves = jax.tree_util.tree_leaves_with_path(run.plain().variables["params"])
    params = {path_name(path): np.asarray(jax.device_get(leaf)) for path, leaf in leaves}
    about = {"sigmarep_step": str(run.step), "sigmarep_names": names, "format": "np" if names == "sigmarep" else "pt"}
    if names == "sigmarep":
        line = "sigmarep.inference.open_run(workdir).plain().module takes them as {'params': …}, nested at each '/'"
        return Exported(params, about, {}, [line])
    ours = canonical.split(params)
    root = canonical.root(ours)
    if root is None:
        raise BadInput(f"--names {names}: are those of a ViT, which a run of {run.config.task} is not; use sigmarep")
    _check_function(run.config.model, names)
    vit = {name.removeprefix(root): x for name, x in ours.items() if name.startswith(root)}
    about |= {f"sigmarep_{name}": str(tuple(run.config.data[name])) for name in ("mean", "std")}
    try:
        arrays = NAMES[names].save(_completed(vit, run.config, names))
    except KeyError as error:
        raise BadInput(f"--names {names}: the model's {error.args[0]} has no name there; use sigmarep") from None
    others, lines = _opening(run, names, vit)
    mean, std = run.config.data.mean, run.config.data.std
    lines.append(f"pictures: values of 0 to 1, minus {tuple(mean)}, divided by {tuple(std)}")
    return Exported(arrays, {**about, "sigmarep_open": lines[0]}, others, lines)


def save_stablehlo(run: Run, output: str) -> list[str]:
    """Writes a run's model as a StableHLO artefact of `jax.export`, with its weights inside and a batch of any size.

    Returns:
      Lines that tell how to call it.

    Raises:
      BadInput: its task has no single call (`serving` in `sigmarep.tasks.protocol.TaskModel`), or flatbuffers is missing.
      SigmarepError: the file cannot be written.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise BadInput('--format stablehlo: needs the extra "export"; pip install "sigmarep[export]"')
    content, shape = stablehlo(run)
    try:
        write_atomically(output, content)
    except OSError as error:
        raise SigmarepError(f"--output {output}: cannot be written ({error.strerror})") from error
    return [
        f"{output}: {len(content):,} bytes, for {', '.join(PLATFORMS)}",
        f"jax.export.deserialize(bytearray(open({output!r}, 'rb').read())).call(x), x {shape.dtype} "
        f"(batch, {', '.join(map(str, shape.shape))})",
    ]


def stablehlo(run: Run) -> tuple[bytes, jax.ShapeDtypeStruct]:
    """The artefact, and the shape of one example of its input. See `save_stablehlo`."""
    from jax import export

    function, example = run.serving()
    variables = jax.device_get(run.plain().variables)
    (batch,) = export.symbolic_shape("batch")
    inputs = jax.ShapeDtypeStruct((batch, *example.shape), example.dtype)
    exported = export.export(jax.jit(lambda x: function(variables, x)), platforms=PLATFORMS)(inputs)
    return bytes(exported.serialize()), example


def _check_function(model: Any, names: str) -> None:
    """Raises BadInput where the model computes what a model of these names does not."""
    accepted = COMMON | SAME_FUNCTION[names]
    for field, values in accepted.items():
        if model[field] not in values:
            raise BadInput(
                f"--names {names}: config.model.{field} = {model[field]!r} is not the function of such a model; it has "
                f"{' or '.join(map(repr, values))}"
            )


def _completed(vit: Mapping[str, np.ndarray], config: Any, names: str) -> dict[str, np.ndarray]:
    """The parameters with those that theirs has and ours computes without: zero biases, fixed positions."""
    whole = dict(vit)
    for row in NAMES[names].rows:
        for name in [each for each in vit if canonical.numbered(each)[0] == row.ours]:
            module, _, leaf = name.rpartition("/")
            if leaf in ("kernel", "scale") and not module.endswith("_branch"):
                makes_heads = module.rpartition("/")[2] in canonical.SLOTS["qkv"]
                outputs = vit[name].shape[1:] if makes_heads else vit[name].shape[-1:]
                whole.setdefault(f"{module}/bias", np.zeros(outputs, np.float32))
    width = config.model.width
    if "positions/embedding" not in whole:
        side = config.data.image_size // config.model.patch_size
        fixed = config.model.positions == "sincos"
        grid = sincos_2d(side, side, width) if fixed else np.zeros((side * side, width), np.float32)
        token = np.zeros((int("class_token" in whole), width), np.float32)
        whole["positions/embedding"] = np.concatenate([token, grid])[None]
    if names == "big_vision" and "class_token" in whole:
        # It adds positions before the class token, which therefore takes its own along.
        positions = whole["positions/embedding"]
        whole["class_token"] = whole["class_token"] + positions[:, :1]
        whole["positions/embedding"] = positions[:, 1:]
    return whole


def _opening(run: Run, names: str, vit: Mapping[str, np.ndarray]) -> tuple[dict[str, bytes], list[str]]:
    """Files beside the weights, and a line of Python that makes the model."""
    model, data = run.config.model, run.config.data
    classes = vit["head/kernel"].shape[-1] if "head/kernel" in vit else 0
    channels = len(data.mean)
    if names == "timm":
        norm = f"functools.partial(torch.nn.LayerNorm, eps={model.norm_epsilon})"
        arguments = {
            "img_size": data.image_size,
            "patch_size": model.patch_size,
            "in_chans": channels,
            "num_classes": classes,
            "embed_dim": model.width,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "mlp_ratio": model.mlp_dim / model.width,
            "global_pool": "token" if model.pool == "token" else "avg",
            "class_token": model.pool == "token",
            "fc_norm": False,
            **({"qk_norm": True} if model.qk_norm == "layer" else {}),
            **({"init_values": 1.0} if model.branch_scale == "layer_scale" else {}),
            "act_layer": model.activation,
        }
        listed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        identity = "torch.nn.Identity" if model.norm == "none" else norm
        return {}, [f"timm.models.VisionTransformer({listed}, norm_layer={identity})"]
    if names == "huggingface":
        labels = dict(enumerate(getattr(run.task, "class_names", ())))
        config = {
            "architectures": ["ViTForImageClassification" if classes else "ViTModel"],
            "model_type": "vit",
            "hidden_size": model.width,
            "num_hidden_layers": model.depth,
            "num_attention_heads": model.num_heads,
            "intermediate_size": model.mlp_dim,
            "hidden_act": HUGGINGFACE_ACTIVATIONS.get(model.activation, model.activation),
            "layer_norm_eps": model.norm_epsilon,
            "image_size": data.image_size,
            "patch_size": model.patch_size,
            "num_channels": channels,
            "qkv_bias": True,
            "id2label": {str(number): label for number, label in labels.items()},
            "label2id": {label: number for number, label in labels.items()},
        }
        kind = config["architectures"][0]
        content = json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
        return {"config.json": content}, [f"transformers.{kind}.from_pretrained(the folder that --output names)"]
    line = f"big_vision.models.vit.Model(num_classes={classes}, patch_size=({model.patch_size},) * 2, width={model.width}, "
    pool = "tok" if model.pool == "token" else "gap"
    return {}, [
        line + f"depth={model.depth}, mlp_dim={model.mlp_dim}, num_heads={model.num_heads}, pool_type='{pool}')"
    ]
