"""The paper's reference code in NumPy float64: one layer after another, nothing of JAX, nothing of this project.

Vision (γ₀ = σ(W₀), exact GELU, fused qkv under one γ, class token) and speech (γ₀ = 1, ReLU, no biases, key padding,
post / pre / no LayerNorm). Every reparametrised product makes one power step from the stored u; training stores it.
"""

import math

import numpy as np


def unit(x):
    return x / np.linalg.norm(x)


class Model:
    """Parameters by path, spectral vectors by path; `training` says whether power steps are kept."""

    def __init__(self, params, u, *, reparam, training):
        self.params, self.u, self.sigma = params, dict(u), {}
        self.reparam, self.training = reparam, training

    def weight(self, path, outputs):
        kernel = self.params[f"{path}/kernel"].astype(np.float64)
        matrix = kernel.reshape(-1, outputs)
        if self.reparam == "none":
            return matrix
        if self.reparam == "weight":
            return matrix / np.linalg.norm(matrix, axis=0) * self.params[f"{path}/gamma"]
        v = unit(matrix @ self.u[path])
        u = unit(matrix.T @ v)
        sigma = v @ matrix @ u
        if self.training:
            self.u[path], self.sigma[path] = u, sigma
        gamma = self.params[f"{path}/gamma"] if self.reparam == "sigma" else 1.0
        return gamma / sigma * matrix

    def dense(self, x, path, outputs):
        y = x @ self.weight(path, outputs)
        bias = self.params.get(f"{path}/bias")
        return y if bias is None else y + bias.reshape(-1)

    def layer_norm(self, x, path, epsilon):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * self.params[f"{path}/scale"] + self.params[f"{path}/bias"]

    def attention(self, x, path, heads, qkv, lengths=None, context=None, visible=None):
        """Returns the output and the attention weights (batch, heads, queries, keys).

        `lengths` are those of the keys; `visible` (batch, queries, keys) hides further ones.
        """
        batch, queries, width = x.shape
        length = queries if context is None else context.shape[1]
        if qkv == "fused":
            fused = self.dense(x, f"{path}/qkv", 3 * width)
            q, k, v = np.split(fused, 3, axis=-1)
        elif qkv == "qk_v":
            q, k = np.split(self.dense(x, f"{path}/qk", 2 * width), 2, axis=-1)
            v = self.dense(x, f"{path}/value", width)
        else:
            seen = x if context is None else context
            q, k, v = (
                self.dense(y, f"{path}/{name}", width) for y, name in ((x, "query"), (seen, "key"), (seen, "value"))
            )
        out = np.zeros_like(x)
        weights = np.zeros((batch, heads, queries, length))
        size = width // heads
        for b in range(batch):
            keys = length if lengths is None else lengths[b]
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                logits = q[b, :, part] @ k[b, :keys, part].T / math.sqrt(size)
                if visible is not None:
                    logits = np.where(visible[b][:, :keys], logits, -np.inf)
                p = np.exp(logits - logits.max(-1, keepdims=True))
                p /= p.sum(-1, keepdims=True)
                weights[b, h, :, :keys] = p
                out[b, :, part] = p @ v[b, :keys, part]
        return self.dense(out, f"{path}/out", width), weights

    def mlp(self, x, path, hidden, activation):
        function = {
            "relu": lambda z: np.maximum(z, 0),
            "gelu": lambda z: 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2))),
        }[activation]
        return self.dense(function(self.dense(x, f"{path}/up", hidden)), f"{path}/down", x.shape[-1])

    def stack(
        self,
        x,
        path,
        *,
        depth,
        heads,
        hidden,
        norm,
        qkv,
        activation,
        epsilon,
        lengths=None,
        context=None,
        context_lengths=None,
        visible=None,
        alpha=None,
    ):
        """Returns the output and every block's attention weights, those of the context after the block's own."""
        recorded = []
        for i in range(depth):
            block = f"{path}/block_{i}"

            def attend(y, block=block):
                y = y + self.params.get(f"{block}/attention_shift", 0.0)
                out, weights = self.attention(y, f"{block}/attention", heads, qkv, lengths, visible=visible)
                recorded.append(weights)
                return out

            def attend_context(y, block=block):
                out, weights = self.attention(
                    y, f"{block}/cross_attention", heads, "separate", context_lengths, context=context
                )
                recorded.append(weights)
                return out

            def mlp(y, block=block):
                return self.mlp(y, f"{block}/mlp", hidden, activation)

            branches = [(attend, "attention_norm"), (mlp, "mlp_norm")]
            if context is not None:
                branches.insert(1, (attend_context, "cross_attention_norm"))
            for branch, name in branches:
                if norm == "none":
                    x = x + branch(x)
                elif norm == "pre":
                    x = x + branch(self.layer_norm(x, f"{block}/{name}", epsilon))
                else:
                    scale = alpha or ((2 * depth) ** 0.25 if norm == "deepnorm" else 1.0)
                    x = self.layer_norm(scale * x + branch(x), f"{block}/{name}", epsilon)
        return (self.layer_norm(x, f"{path}/norm", epsilon) if norm == "pre" else x), recorded

    def vit(self, images, *, patch, width, classes, pool, **stack):
        batch, height, _, channels = images.shape
        n = height // patch
        cut = images.reshape(batch, n, patch, n, patch, channels).transpose(0, 1, 3, 2, 4, 5)
        x = self.dense(cut.reshape(batch, n * n, patch * patch * channels), "patch_embedding", width)
        if pool == "token":
            token = np.broadcast_to(self.params["class_token"], (batch, 1, width))
            x = np.concatenate([token, x], axis=1)
        x, recorded = self.stack(x + self.params["positions/embedding"], "encoder", **stack)
        x = x[:, 0] if pool == "token" else x.mean(1)
        return self.dense(x, "head", classes), recorded

    def speech(self, features, frames, *, width, labels, freq_scale, kernel=7, stride=3, conv=False, **stack):
        """Logits (batch, length/stride, labels) of utterances of `frames` real frames, and the attention weights."""
        batch, length, filters = features.shape
        x = np.zeros_like(features, np.float64)
        for b, real in enumerate(frames):
            utterance = features[b, :real].astype(np.float64)
            x[b, :real] = (utterance - utterance.mean()) / (utterance.std() + 1e-7)
            x[b, :real] = x[b, :real] * self.params["input_norm/scale"] + self.params["input_norm/bias"]
        matrix = self.weight("front_end", 2 * width) if conv else self.params["front_end/kernel"].reshape(-1, 2 * width)
        before = (kernel - stride) // 2
        padded = np.concatenate([np.zeros((batch, before, filters)), x, np.zeros((batch, kernel, filters))], axis=1)
        windows = [padded[:, stride * t : stride * t + kernel].reshape(batch, -1) for t in range(length // stride)]
        both = np.stack(windows, axis=1) @ matrix + self.params["front_end/bias"]
        x = both[..., :width] / (1 + np.exp(-both[..., width:]))
        lengths = [real // stride for real in frames]
        for b, real in enumerate(lengths):
            seconds = 0.01 * stride * (np.arange(x.shape[1]) - np.arange(real).mean())
            for i in range(width):
                angle = seconds * freq_scale * 10_000.0 ** (-2 * (i // 2) / width)
                x[b, :, i] += np.cos(angle) if i % 2 else np.sin(angle)
        x, recorded = self.stack(x, "encoder", lengths=lengths, **stack)
        return self.dense(x, "head", labels), recorded

    def translate(self, source, inputs, *, width, alphas=(None, None), **stack):
        """ln p of every next token (batch, length, vocabulary) of an encoder-decoder with sinusoidal positions and one
        table for both languages and the logits; and the attention weights of encoder and decoder."""
        table = self.params["tokens/tables_0/embedding"].astype(np.float64)
        lengths, longest = (source != 0).sum(-1), inputs.shape[1]

        def embedded(tokens):
            position = np.arange(tokens.shape[1])[:, None]
            angle = position / 10_000.0 ** (np.arange(width // 2) / (width // 2))
            return table[tokens] * math.sqrt(width) + np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)

        memory, seen = self.stack(embedded(source), "encoder", lengths=lengths, alpha=alphas[0], **stack)
        causal = np.broadcast_to(np.tril(np.ones((longest, longest), bool)), (len(inputs), longest, longest))
        x, written = self.stack(
            embedded(inputs),
            "decoder",
            context=memory,
            context_lengths=lengths,
            visible=causal,
            alpha=alphas[1],
            **stack,
        )
        return log_softmax(x @ table.T), seen, written


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def flat(tree, prefix=""):
    """{'a': {'b': x}} as {'a/b': x}."""
    leaves = {}
    for name, value in tree.items():
        if hasattr(value, "items"):
            leaves.update(flat(value, f"{prefix}{name}/"))
        else:
            leaves[f"{prefix}{name}"] = np.asarray(value)
    return leaves
