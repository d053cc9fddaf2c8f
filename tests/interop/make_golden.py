"""Writes tests/weights/golden/ with the real packages timm and transformers: run it where the extra `interop` is installed.

    PYTHONPATH=. python tests/interop/make_golden.py

<word>.npz      the arrays of a tiny ViT with random weights, by name, and `images` (channels last) with its `logits`
<word>.txt      the names and shapes of ViT-B/16 at 224 pixels with 1000 classes
positions.npz   position embeddings of 4 x 4 patches, and timm's own resampling of them to 7 x 7 and 3 x 3
"""

from pathlib import Path

import numpy as np
import timm
import torch
import transformers
from timm.layers import resample_abs_pos_embed

FOLDER = Path(__file__).parents[1] / "weights" / "golden"
SIZE, PATCH, CLASSES, WIDTH, DEPTH, HEADS, MLP = 8, 4, 3, 8, 2, 2, 16


def tiny(word):
    """A tiny ViT of a package with random weights, biases and scales of norms too."""
    torch.manual_seed(0)
    if word == "timm":
        model = timm.models.VisionTransformer(
            img_size=SIZE,
            patch_size=PATCH,
            num_classes=CLASSES,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=MLP / WIDTH,
        )
    else:
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=WIDTH,
                num_hidden_layers=DEPTH,
                num_attention_heads=HEADS,
                intermediate_size=MLP,
                image_size=SIZE,
                patch_size=PATCH,
                num_labels=CLASSES,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


def arrays(model, word, folder):
    """The arrays of a model by the names that its files have."""
    if word == "timm":
        return {name: x.numpy() for name, x in model.state_dict().items()}
    from safetensors.numpy import load_file

    model.save_pretrained(folder)
    return load_file(Path(folder) / "model.safetensors")


def logits(model, images):
    """Logits of images (B, height, width, channels)."""
    with torch.no_grad():
        output = model(torch.tensor(np.moveaxis(images, -1, 1)))
    return (output if isinstance(output, torch.Tensor) else output.logits).numpy()


def main():
    import tempfile

    FOLDER.mkdir(exist_ok=True)
    images = np.random.default_rng(0).standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    large = {
        "timm": lambda: timm.create_model("vit_base_patch16_224"),
        "huggingface": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)),
    }
    for word, make in large.items():
        with tempfile.TemporaryDirectory() as folder:
            model = tiny(word)
            np.savez(FOLDER / f"{word}.npz", images=images, logits=logits(model, images), **arrays(model, word, folder))
            of_large = arrays(make(), word, folder)
        lines = [f"{name} {' '.join(map(str, x.shape))}\n" for name, x in sorted(of_large.items())]
        (FOLDER / f"{word}.txt").write_text("".join(lines))
    positions = np.random.default_rng(1).standard_normal((1, 17, 6)).astype(np.float32)
    resampled = {
        f"to_{new}": resample_abs_pos_embed(torch.tensor(positions), [new, new], num_prefix_tokens=1).numpy()
        for new in (7, 3)
    }
    np.savez(FOLDER / "positions.npz", positions=positions, **resampled)


if __name__ == "__main__":
    main()
